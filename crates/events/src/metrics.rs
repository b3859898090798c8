//! The series of the receivers of events. The label `sink` is the name of a receiver.

use parking_lot::Mutex;
use prometheus::{
    GaugeVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    core::{Collector, Desc},
    proto::MetricFamily,
    register_int_counter_vec_with_registry, register_int_gauge_vec_with_registry,
};
use std::{sync::Arc, time::SystemTime};
use tokio::sync::watch;

const SINK: [&str; 1] = ["sink"];

/// How far a receiver is.
pub(crate) struct Position {
    name: String,
    /// The last sequence number of the journal.
    appended: watch::Receiver<u64>,
    now: Mutex<Now>,
}

#[derive(Clone, Copy)]
struct Now {
    cursor: u64,
    /// When the oldest event that waits happened.
    oldest: Option<SystemTime>,
}

impl Position {
    pub(crate) fn set(&self, cursor: u64, oldest: Option<SystemTime>) {
        *self.now.lock() = Now { cursor, oldest };
    }

    /// How many events of the journal the receiver has not got, those that it does not want included.
    pub(crate) fn pending(&self) -> u64 {
        let cursor = self.now.lock().cursor;
        self.appended.borrow().saturating_sub(cursor)
    }
}

/// The series of one receiver.
pub(crate) struct Series {
    pub(crate) delivered: IntCounter,
    pub(crate) failures: IntCounter,
    pub(crate) up: IntGauge,
    pub(crate) position: Arc<Position>,
}

/// Registers the series of receivers, each with its cursor.
pub(crate) fn register(
    registry: &Registry,
    sinks: &[(String, u64)],
    appended: &watch::Receiver<u64>,
) -> Result<Vec<Series>, prometheus::Error> {
    let delivered: IntCounterVec = register_int_counter_vec_with_registry!(
        "castier_events_delivered_total",
        "Events that a receiver has acknowledged",
        &SINK,
        registry
    )?;
    let failures: IntCounterVec = register_int_counter_vec_with_registry!(
        "castier_events_failures_total",
        "Attempts to deliver events that were not acknowledged, and reads and writes of the journal that failed",
        &SINK,
        registry
    )?;
    let up: IntGaugeVec = register_int_gauge_vec_with_registry!(
        "castier_events_sink_up",
        "Whether the last attempt to deliver to a receiver succeeded; 1 before the first one",
        &SINK,
        registry
    )?;
    let series: Vec<_> = sinks
        .iter()
        .map(|(name, cursor)| {
            let up = up.with_label_values(&[name]);
            up.set(1);
            let now = Mutex::new(Now { cursor: *cursor, oldest: None });
            Series {
                delivered: delivered.with_label_values(&[name]),
                failures: failures.with_label_values(&[name]),
                up,
                position: Arc::new(Position { name: name.clone(), appended: appended.clone(), now }),
            }
        })
        .collect();
    let positions = series.iter().map(|series| series.position.clone()).collect();
    registry.register(Box::new(Waiting::new(positions)?))?;
    Ok(series)
}

/// Computed when they are read, since they change while nothing happens here.
struct Waiting {
    pending: IntGaugeVec,
    oldest: GaugeVec,
    positions: Vec<Arc<Position>>,
}

impl Waiting {
    fn new(positions: Vec<Arc<Position>>) -> Result<Self, prometheus::Error> {
        let pending = Opts::new("castier_events_pending", "Events of the journal that a receiver has not acknowledged yet");
        let oldest = Opts::new(
            "castier_events_oldest_seconds",
            "How long the oldest event has waited that a receiver has not acknowledged; 0: none waits",
        );
        Ok(Self { pending: IntGaugeVec::new(pending, &SINK)?, oldest: GaugeVec::new(oldest, &SINK)?, positions })
    }
}

impl Collector for Waiting {
    fn desc(&self) -> Vec<&Desc> {
        [self.pending.desc(), self.oldest.desc()].concat()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        for position in &self.positions {
            let oldest = position.now.lock().oldest.map_or(0.0, |time| time.elapsed().unwrap_or_default().as_secs_f64());
            self.pending.with_label_values(&[&position.name]).set(position.pending().try_into().unwrap_or(i64::MAX));
            self.oldest.with_label_values(&[&position.name]).set(oldest);
        }
        [self.pending.collect(), self.oldest.collect()].concat()
    }
}

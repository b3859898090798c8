//! Tells others of blobs: webhooks, NATS JetStream and RabbitMQ get a CloudEvent for each blob that was stored, deleted or found corrupt.
//!
//! - [`Event`]: the CloudEvent, which the outbox appends to the journal.
//! - [`Journal`]: where events wait, with a cursor for each receiver. This crate reads it; the outbox implements it.
//! - [`start`]: a task for each receiver (`dispatcher.rs`), which delivers in order, and advances the cursor only behind what was acknowledged. So
//!   each event is delivered at least once, and a receiver that is away holds up neither requests nor other receivers.
//! - `webhook.rs`, `nats.rs`, `rabbitmq.rs`: how each protocol delivers and acknowledges; `sink.rs` says what they must keep to.

mod dispatcher;
mod event;
mod journal;
mod metrics;
mod nats;
mod rabbitmq;
mod sink;
mod webhook;

use castier_config::{EventSink, Protocol};
use dispatcher::Dispatcher;
pub use event::{CorruptSource, Event, Kind};
pub use journal::{Journal, JournalError};
use prometheus::Registry;
use sink::Sink;
use std::{sync::Arc, time::Duration};
use tokio::{
    task::JoinSet,
    time::{Instant, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;

/// How long a dispatcher may take to end when it is told to do so at once. It writes its cursor.
const END: Duration = Duration::from_secs(1);

/// The running dispatchers.
#[derive(Debug)]
pub struct Running {
    tasks: JoinSet<()>,
    finish: CancellationToken,
    end: CancellationToken,
}

/// Starts a dispatcher for each receiver, on the current runtime. Events that are appended after it has returned reach every receiver.
///
/// # Errors
/// A line that names the key: a file cannot be read, or the journal cannot.
pub fn start(sinks: &[EventSink], journal: &Arc<dyn Journal>, registry: &Registry) -> Result<Running, String> {
    let mut positions = Vec::new();
    let mut connectors = Vec::new();
    for sink in sinks {
        let name = sink.name().to_owned();
        let connector = connector(sink).map_err(|why| format!("events {name}: {why}"))?;
        let cursor = journal.cursor(&name).map_err(|error| format!("events {name}: the journal in disk.path: {error}"))?;
        positions.push((name, cursor));
        connectors.push(connector);
    }
    let appended = journal.appended();
    let series = metrics::register(registry, &positions, &appended).map_err(|error| format!("metrics: {error}"))?;
    let (finish, end) = (CancellationToken::new(), CancellationToken::new());
    let mut tasks = JoinSet::new();
    for (((sink, connector), (name, cursor)), series) in sinks.iter().zip(connectors).zip(positions).zip(series) {
        let dispatcher = Dispatcher {
            name,
            url: sink.url.as_ref().map(ToString::to_string).unwrap_or_default(),
            types: sink.types.clone(),
            sink: connector,
            timeout: sink.timeout.get(),
            journal: journal.clone(),
            series,
            cursor,
            saved: cursor,
            appended: appended.clone(),
            finish: finish.clone(),
            end: end.clone(),
            trouble: None,
        };
        tasks.spawn(dispatcher.run());
    }
    Ok(Running { tasks, finish, end })
}

fn connector(sink: &EventSink) -> Result<Box<dyn Sink>, String> {
    let url = sink.url.as_ref().ok_or("url: is missing")?;
    Ok(match url.protocol() {
        Protocol::Webhook => Box::new(webhook::Webhook::new(sink, url)?),
        Protocol::Nats => Box::new(nats::Nats::new(sink, url)?),
        Protocol::RabbitMq => Box::new(rabbitmq::RabbitMq::new(sink, url)?),
    })
}

impl Running {
    /// Delivers what waits, as far as receivers take it within this time, and ends. What is left is delivered after the next start.
    pub async fn stop(mut self, within: Duration) {
        self.finish.cancel();
        let deadline = Instant::now() + within;
        while let Ok(Some(_)) = timeout_at(deadline, self.tasks.join_next()).await {}
        self.end.cancel();
        timeout(END, async { while self.tasks.join_next().await.is_some() {} }).await.ok();
        // What hangs even now is in the journal's store. Dropping the tasks ends them.
    }
}

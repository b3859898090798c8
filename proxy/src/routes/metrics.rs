//! The series of the routes. The label `route` has the configured routes only.

use castier_routes::Names;
use castier_serverkit::series::{counters, gauge, gauges, status_label};
use http::StatusCode;
use prometheus::{IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Registry};
use std::time::SystemTime;

/// How a request of a route was answered: the label `result`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// From what is kept, without a question.
    Hit,
    /// From what is kept, after the upstream said that it holds still, or that the client may have it.
    Revalidated,
    /// From what is kept, because the upstream could not answer.
    Stale,
    /// With a body that came from the upstream for this request, or for another one at the same time.
    Miss,
    /// With 404 or 410.
    Absent,
    /// With 401 or 403, from the upstream or remembered.
    Refused,
    /// Passed on to the upstream, and not kept.
    Relayed,
    /// With another status, or not to its end.
    Error,
}

impl Outcome {
    const ALL: [Self; 8] = [Self::Hit, Self::Revalidated, Self::Stale, Self::Miss, Self::Absent, Self::Refused, Self::Relayed, Self::Error];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Hit => "hit",
            Self::Revalidated => "revalidated",
            Self::Stale => "stale",
            Self::Miss => "miss",
            Self::Absent => "absent",
            Self::Refused => "refused",
            Self::Relayed => "relayed",
            Self::Error => "error",
        }
    }
}

/// The families of series.
pub struct Series {
    requests: IntCounterVec,
    questions: IntCounterVec,
    saved: IntCounterVec,
    unparsed: IntCounterVec,
    up: IntGaugeVec,
    names: IntGauge,
    names_bytes: IntGauge,
    names_capacity: IntGauge,
    names_failures: IntGauge,
}

/// The series of one route.
pub(crate) struct RouteMetrics {
    requests: [IntCounter; Outcome::ALL.len()],
    questions: IntCounterVec,
    label: String,
    saved: IntCounter,
    unparsed: IntCounter,
    up: IntGauge,
}

/// The figures of one route since the start, for `/stats`.
#[derive(Clone, Debug, serde::Serialize)]
pub struct RouteFigures {
    /// The route.
    pub route: String,
    /// Its upstream.
    pub upstream: String,
    /// Whether the upstream answers, as the last question showed.
    pub up: bool,
    /// The circuit breaker of the upstream: `closed`, `open` or `half-open`.
    pub breaker: &'static str,
    /// Since when it answers, or does not; `None` if that has never changed.
    #[serde(skip)]
    pub since: Option<SystemTime>,
    /// Requests.
    pub requests: u64,
    /// Requests that needed no body from the upstream.
    pub hits: u64,
    /// Of these, those for which the upstream was asked.
    pub revalidated: u64,
    /// Of these, those that got an old answer.
    pub stale: u64,
    /// Requests whose body came from the upstream.
    pub misses: u64,
    /// Requests that were refused.
    pub refused: u64,
    /// Questions to the upstream.
    pub questions: u64,
    /// Bytes that came out of the cache.
    pub saved_bytes: u64,
}

impl Series {
    /// Registers all families.
    ///
    /// # Errors
    /// A name that is registered already.
    pub fn new(r: &Registry) -> prometheus::Result<Self> {
        Ok(Self {
            requests: counters(r, "castier_route_requests_total", "Requests of a route", &["route", "result"])?,
            questions: counters(r, "castier_route_questions_total", "Questions to the upstream of a route, by status", &["route", "code"])?,
            saved: counters(r, "castier_route_saved_bytes_total", "Bytes sent to clients of a route from what is kept", &["route"])?,
            unparsed: counters(
                r,
                "castier_route_unparsed_total",
                "Metadata that was passed on unread because it cannot be parsed",
                &["route"],
            )?,
            up: gauges(r, "castier_route_upstream_up", "Whether the upstream of a route answers, as the last question showed", &["route"])?,
            names: gauge(r, "castier_names", "Names in the name table")?,
            names_bytes: gauge(r, "castier_names_bytes", "Bytes of limits.names in use")?,
            names_capacity: gauge(r, "castier_names_capacity_bytes", "The bound of the name table: limits.names; 0 without routes")?,
            names_failures: gauge(r, "castier_names_write_failures", "Writes of the name table that have failed since the start")?,
        })
    }

    pub(crate) fn route(&self, label: &str) -> RouteMetrics {
        let up = self.up.with_label_values(&[label]);
        up.set(1);
        RouteMetrics {
            requests: Outcome::ALL.map(|outcome| self.requests.with_label_values(&[label, outcome.as_str()])),
            questions: self.questions.clone(),
            label: label.to_owned(),
            saved: self.saved.with_label_values(&[label]),
            unparsed: self.unparsed.with_label_values(&[label]),
            up,
        }
    }

    /// Sets the gauges of the name table.
    pub fn names_are(&self, names: &Names) {
        let (count, bytes) = names.size();
        self.names.set(gauged(count));
        self.names_bytes.set(gauged(bytes));
        self.names_capacity.set(gauged(names.capacity()));
        self.names_failures.set(gauged(names.failed_writes()));
    }
}

fn gauged(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

impl RouteMetrics {
    pub(crate) fn request(&self, outcome: Outcome) {
        self.requests[outcome as usize].inc();
    }

    /// A question was answered with this status, or not at all.
    pub(crate) fn question(&self, status: Option<StatusCode>) {
        let code = match status {
            None => "none",
            // RFC 9110 does not register it, so it would count as `4xx`.
            Some(StatusCode::TOO_MANY_REQUESTS) => "429",
            Some(status) => status_label(status.as_u16()),
        };
        self.questions.with_label_values(&[&self.label, code]).inc();
    }

    /// A counter of bytes that clients get from what is kept.
    pub(crate) fn saved(&self, bytes: u64) {
        self.saved.inc_by(bytes);
    }

    pub(crate) fn unparsed(&self) {
        self.unparsed.inc();
    }

    pub(crate) fn up(&self, up: bool) {
        self.up.set(up.into());
    }

    pub(crate) fn figures(
        &self,
        route: &str,
        upstream: &str,
        (up, since): (bool, Option<SystemTime>),
        breaker: &'static str,
    ) -> RouteFigures {
        let count = |outcome: Outcome| self.requests[outcome as usize].get();
        let questions = prometheus::core::Collector::collect(&self.questions);
        let own = |metric: &&prometheus::proto::Metric| {
            metric.get_label().iter().any(|label| label.name() == "route" && label.value() == self.label)
        };
        let questions =
            questions.iter().flat_map(|family| family.get_metric().iter().filter(own)).map(|m| m.get_counter().get_value() as u64);
        RouteFigures {
            route: route.to_owned(),
            upstream: upstream.to_owned(),
            up,
            breaker,
            since,
            requests: self.requests.iter().map(IntCounter::get).sum(),
            hits: count(Outcome::Hit) + count(Outcome::Revalidated) + count(Outcome::Stale),
            revalidated: count(Outcome::Revalidated),
            stale: count(Outcome::Stale),
            misses: count(Outcome::Miss),
            refused: count(Outcome::Refused),
            questions: questions.sum(),
            saved_bytes: self.saved.get(),
        }
    }
}

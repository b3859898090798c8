//! The series of the tier beside those of its cache. Labels are finite and never hold a digest.

use crate::{
    http2::frames::Flood,
    recent::{ClientRequest, Recent},
};
use castier_blob::Digest;
use castier_cache::{Limit, Tier, TierStats};
use castier_serverkit::series::{CLIENT_GONE, Series, counters, gauge, gauges, histograms, status_label};
use prometheus::{Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, core::Collector};
use std::{
    net::IpAddr,
    sync::{Arc, OnceLock},
    time::Duration,
};

/// The listener that got a request: the `listener` label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listener {
    /// For clients.
    Public,
    /// For peers.
    Peer,
}

impl Listener {
    /// The value of the label.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Public => "public",
            Self::Peer => "peer",
        }
    }
}

/// The target of a request: the `route` label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// `/cas/<digest>`, malformed ones included.
    Blob,
    /// `/cas`.
    Collection,
    /// Anything that castier relays to the origin unchanged.
    Relay,
    /// Rejected: the head was unreadable, over a limit, or unauthorised.
    Refused,
    /// Messages between nodes other than blobs: health checks, purges, notices of stored blobs.
    Control,
    /// A configured route.
    Route,
}

impl Route {
    /// The value of the label.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Blob => "blob",
            Self::Collection => "collection",
            Self::Relay => "relay",
            Self::Refused => "refused",
            Self::Control => "control",
            Self::Route => "route",
        }
    }
}

/// How a request was answered: the `result` label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// By a tier, or without looking up a blob.
    Hit,
    /// By a flight that this request started, or by the origin.
    Miss,
    /// By a flight that another request started.
    Collapsed,
    /// With 404. `request` counts an error with status 404 as this.
    Absent,
    /// With another status of 400 or more, or with a cut connection.
    Error,
}

impl Served {
    const ALL: [&'static str; 5] = ["hit", "miss", "collapsed", "absent", "error"];
}

/// A finished request: answered, or abandoned by the client.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// The listener that got it.
    pub listener: Listener,
    /// Its method, from a finite set.
    pub method: &'static str,
    /// Its target.
    pub route: Route,
    /// The status of its answer.
    pub code: u16,
    /// How it was answered.
    pub served: Served,
    /// The time from its head to the last byte of the answer.
    pub took: Duration,
    /// The time from its head to the first byte of the answer.
    pub first_byte: Option<Duration>,
    /// The bytes of the body that were sent.
    pub bytes: u64,
    /// The client's address.
    pub client: Option<IpAddr>,
    /// The requested blob.
    pub digest: Option<Digest>,
}

/// Raises a gauge by one until it is dropped.
pub struct Counted<'a>(&'a IntGauge);

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// The series.
pub struct Metrics {
    series: Series,
    /// The series of the cache.
    pub cache: Arc<castier_cache::Metrics>,
    /// The series of sources.
    pub upstream: Arc<castier_upstream::Metrics>,
    /// Those of the bucket.
    pub bucket: Arc<castier_bucket::Metrics>,
    /// Those of the outbox.
    pub outbox: Arc<castier_outbox::Metrics>,
    /// The series of the cluster.
    pub cluster: Arc<castier_cluster::Metrics>,
    requests: IntCounterVec,
    /// The series of GETs of blobs that were answered with 200, looked up once: hits must be fast.
    answered_gets: [OnceLock<IntCounter>; 2],
    durations: [[Histogram; 5]; 6],
    first_bytes: [[Histogram; 5]; 6],
    in_flight: IntGauge,
    uploads: IntGauge,
    /// Bytes served: by listener, and from the tiers in the order of [`Tier`] or from flights.
    served: [[IntCounter; 4]; 2],
    /// Requests of clients that got status 500 or above, or whose answer was cut because a source failed. Only in `/stats`.
    client_errors: IntCounter,
    /// The series of the routes.
    pub routes: crate::routes::Series,
    /// The most active clients and digests, for `/stats`.
    pub recent: Recent,
    shed: IntCounterVec,
    tls_expiry: IntGaugeVec,
    tls_reload_failures: IntCounterVec,
    /// What is denied to clients.
    pub access: Arc<castier_access::Metrics>,
    /// The memory limit of the control group in bytes; 0 if there is none.
    pub memory_limit: IntGauge,
    /// The most memory that the configuration allows, in bytes.
    pub memory_planned: IntGauge,
    /// Client connections open now.
    pub connections: IntGauge,
    /// Connections from peers that are open now.
    pub peer_connections: IntGauge,
    /// Requests over HTTP/2 that are open now.
    pub http2_streams: IntGauge,
    http2_floods: IntCounterVec,
}

impl Metrics {
    /// For series that depend on the config.
    pub fn registry(&self) -> &prometheus::Registry {
        self.series.registry()
    }

    /// Registers all series. Those with known labels start at 0.
    ///
    /// # Errors
    /// Prometheus does not allow a name or label: a bug in this file.
    pub fn new() -> prometheus::Result<Self> {
        let series = Series::new("castier_log_dropped_total", "Log records that a sink did not take in time")?;
        let r = series.registry().clone();
        let routes = [Route::Blob, Route::Collection, Route::Relay, Route::Refused, Route::Control, Route::Route];
        let by_result = |vec: HistogramVec| routes.map(|route| Served::ALL.map(|result| vec.with_label_values(&[route.as_str(), result])));
        let durations = histograms(
            &r,
            "castier_http_request_duration_seconds",
            "Time from a request's head to the end of its answer",
            &["route", "result"],
        )?;
        let first_bytes = histograms(
            &r,
            "castier_http_first_byte_seconds",
            "Time from a request's head to the first byte of its answer",
            &["route", "result"],
        )?;
        let response_bytes =
            counters(&r, "castier_http_response_bytes_total", "Bytes of blobs sent to clients and peers", &["from", "listener"])?;
        let froms = ["memory", "mirror", "disk", "flight"];
        let info = gauges(&r, "castier_build_info", "The running version", &["version"])?;
        info.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        let metrics = Self {
            cache: Arc::new(castier_cache::Metrics::new(&r)?),
            upstream: Arc::new(castier_upstream::Metrics::new(&r)?),
            bucket: Arc::new(castier_bucket::Metrics::new(&r)?),
            outbox: Arc::new(castier_outbox::Metrics::new(&r)?),
            cluster: Arc::new(castier_cluster::Metrics::new(&r)?),
            requests: counters(&r, "castier_http_requests_total", "Requests answered", &["listener", "method", "route", "code"])?,
            answered_gets: Default::default(),
            durations: by_result(durations),
            first_bytes: by_result(first_bytes),
            in_flight: gauge(&r, "castier_http_requests_in_flight", "Requests being answered now")?,
            uploads: gauge(&r, "castier_uploads_in_progress", "Uploads in progress")?,
            served: [Listener::Public, Listener::Peer]
                .map(|listener| froms.map(|from| response_bytes.with_label_values(&[from, listener.as_str()]))),
            client_errors: IntCounter::new("errors", "Not registered")?,
            routes: crate::routes::Series::new(&r)?,
            recent: Recent::default(),
            shed: counters(&r, "castier_shed_requests_total", "Requests refused at a limit", &["reason"])?,
            tls_expiry: gauges(
                &r,
                "castier_tls_certificate_expiry_seconds",
                "When the first certificate of a listener expires, in seconds since 1970; no series without TLS",
                &["listener"],
            )?,
            tls_reload_failures: counters(
                &r,
                "castier_tls_reload_failures_total",
                "How often changed certificate files could not be used",
                &["listener"],
            )?,
            access: Arc::new(castier_access::Metrics::new(&r)?),
            memory_limit: gauge(&r, "castier_memory_limit_bytes", "Memory limit of the control group; 0: none")?,
            memory_planned: gauge(&r, "castier_memory_planned_bytes", "Most memory that the configuration allows")?,
            connections: gauge(&r, "castier_connections", "Open client connections")?,
            peer_connections: gauge(&r, "castier_peer_connections", "Open connections from peers")?,
            http2_streams: gauge(&r, "castier_http2_streams", "Open requests over HTTP/2")?,
            http2_floods: counters(
                &r,
                "castier_http2_floods_total",
                "HTTP/2 connections that were closed because their client sent too many frames of a kind",
                &["kind"],
            )?,
            series,
        };
        metrics.begin_at_zero();
        Ok(metrics)
    }

    /// Creates the series with known labels at 0, so that rates have a start.
    fn begin_at_zero(&self) {
        for limit in Limit::ALL {
            self.shed.with_label_values(&[limit.as_str()]);
        }
        for flood in Flood::ALL {
            self.http2_floods.with_label_values(&[flood.as_str()]);
        }
    }

    /// Counts an HTTP/2 connection that was closed because of a flood.
    pub fn http2_flood(&self, flood: Flood) {
        self.http2_floods.with_label_values(&[flood.as_str()]).inc();
    }

    /// Records a finished request.
    pub fn request(&self, request: &Request) {
        let Request { listener, method, route, code, .. } = *request;
        let served = if request.served == Served::Error && code == 404 { Served::Absent } else { request.served };
        self.durations[route as usize][served as usize].observe(request.took.as_secs_f64());
        if let Some(first_byte) = request.first_byte {
            self.first_bytes[route as usize][served as usize].observe(first_byte.as_secs_f64());
        }
        let series = || self.requests.with_label_values(&[listener.as_str(), method, route.as_str(), status_label(code)]);
        if code == 200 && method == "GET" && route == Route::Blob {
            self.answered_gets[listener as usize].get_or_init(series).inc();
        } else {
            series().inc();
        }
        if listener == Listener::Public {
            if code >= 500 {
                self.client_errors.inc();
            }
            self.recent.note(&ClientRequest {
                client: request.client,
                // No blob was sent and none was refused.
                digest: request.digest.filter(|_| code != CLIENT_GONE),
                reads: route == Route::Blob && matches!(method, "GET" | "HEAD"),
                code,
                bytes: request.bytes,
                first_byte: request.first_byte,
            });
        }
    }

    /// Counts a running request until the result is dropped.
    pub fn answering(&self) -> Counted<'_> {
        self.in_flight.inc();
        Counted(&self.in_flight)
    }

    /// Counts a running upload until the result is dropped.
    pub fn uploading(&self) -> Counted<'_> {
        self.uploads.inc();
        Counted(&self.uploads)
    }

    /// Counts an answer to a client that was cut because a source failed.
    pub fn answer_cut(&self, listener: Listener) {
        if listener == Listener::Public {
            self.client_errors.inc();
        }
    }

    /// Requests of clients: all finished ones; those that failed (see `client_errors`); those that are running.
    pub fn client_requests(&self) -> (u64, u64, u64) {
        let total = sum(&self.requests, ("listener", Listener::Public.as_str()));
        (total, self.client_errors.get(), u64::try_from(self.in_flight.get()).unwrap_or(0))
    }

    /// Counts bytes of answers that came from this tier; without a tier, from a flight.
    pub fn served_from(&self, listener: Listener, tier: Option<Tier>, bytes: u64) {
        self.served[listener as usize][tier.map_or(Tier::ALL.len(), |tier| tier as usize)].inc_by(bytes);
    }

    /// The bytes of blobs that were sent to clients.
    pub fn served_to_clients(&self) -> u64 {
        self.served[Listener::Public as usize].iter().map(IntCounter::get).sum()
    }

    /// Counts a request that was refused at a limit.
    pub fn shed(&self, limit: Limit) {
        self.shed.with_label_values(&[limit.as_str()]).inc();
    }

    /// The series of the certificates of a listener.
    pub fn certificates(&self, listener: Listener) -> castier_serverkit::tls::Metrics {
        let labels = &[listener.as_str()];
        castier_serverkit::tls::Metrics {
            expiry: self.tls_expiry.with_label_values(labels),
            reload_failures: self.tls_reload_failures.with_label_values(labels),
        }
    }

    /// The number of refused requests, by limit.
    pub fn sheds(&self) -> [(&'static str, u64); Limit::ALL.len()] {
        Limit::ALL.map(|limit| (limit.as_str(), self.shed.with_label_values(&[limit.as_str()]).get()))
    }

    /// Sets the number of open connections of a listener.
    pub fn connections_at(&self, listener: Listener) -> &IntGauge {
        match listener {
            Listener::Public => &self.connections,
            Listener::Peer => &self.peer_connections,
        }
    }

    /// The text for Prometheus, with the tiers' figures now.
    pub fn render(&self, tiers: &[(Tier, TierStats)]) -> String {
        self.cache.tiers_are(tiers);
        self.series.text().unwrap_or_else(|error| {
            tracing::error!(%error, "metrics could not be written");
            String::new()
        })
    }
}

/// All series of a family with this label together.
fn sum(family: &IntCounterVec, (name, value): (&str, &str)) -> u64 {
    let has = |metric: &prometheus::proto::Metric| metric.get_label().iter().any(|own| own.name() == name && own.value() == value);
    let families = family.collect();
    let metrics = families.iter().flat_map(prometheus::proto::MetricFamily::get_metric);
    metrics.filter(|metric| has(metric)).map(|metric| metric.get_counter().get_value() as u64).sum()
}

//! The series of the tier beside those of its cache. Labels are finite and never hold a digest.

use crate::recent::{Asked, Recent};
use castier_blob::Digest;
use castier_cache::{Limit, Tier, TierStats};
use castier_serverkit::series::{CLIENT_GONE, Series, add, counter, counters, gauge, gauges, histograms, status_label};
use prometheus::{GaugeVec, Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, core::Collector};
use std::{
    net::IpAddr,
    sync::{Arc, OnceLock},
    time::Duration,
};

/// Where a request came in: the `listener` label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listener {
    /// From a client.
    Public,
    /// From another node of the cluster.
    Peer,
}

impl Listener {
    /// As it stands in labels.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Public => "public",
            Self::Peer => "peer",
        }
    }
}

/// What a request was about: the `route` label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// `/cas/<digest>`, malformed ones included.
    Blob,
    /// `/cas`.
    Collection,
    /// Anything that goes to the origin unchanged.
    Relay,
    /// Nothing that could be understood, or that was let in.
    Refused,
    /// What nodes tell each other beside blobs: health, purges, what was stored.
    Control,
}

impl Route {
    /// As it stands in labels.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Blob => "blob",
            Self::Collection => "collection",
            Self::Relay => "relay",
            Self::Refused => "refused",
            Self::Control => "control",
        }
    }
}

/// How a request was answered: the `result` label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// From a tier, or without needing one.
    Hit,
    /// By a flight that this request started, or by the origin.
    Miss,
    /// By a flight that another request had started.
    Collapsed,
    /// With 404. Counted as such wherever a 404 would be an error.
    Absent,
    /// With another status of 400 or more, or by cutting the connection.
    Error,
}

impl Served {
    const ALL: [&'static str; 5] = ["hit", "miss", "collapsed", "absent", "error"];
}

/// A request that was answered, or whose client left.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// Where it came in.
    pub listener: Listener,
    /// Its method, out of a finite set.
    pub method: &'static str,
    /// What it was about.
    pub route: Route,
    /// The status it got.
    pub code: u16,
    /// How it was answered.
    pub served: Served,
    /// From its head to the last byte of the answer.
    pub took: Duration,
    /// From its head to the first byte of the answer.
    pub first_byte: Option<Duration>,
    /// How much of a body was sent.
    pub bytes: u64,
    /// Who sent it.
    pub client: Option<IpAddr>,
    /// The blob that it was about.
    pub digest: Option<Digest>,
}

/// A gauge that is one higher for as long as this lives.
pub struct Counted<'a>(&'a IntGauge);

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// The series of one other node. They end with this.
pub struct PeerSeries {
    name: String,
    up: IntGaugeVec,
    probe: GaugeVec,
    errors: IntCounterVec,
    /// Attempts at it that failed.
    failed: IntCounter,
}

impl PeerSeries {
    /// Whether it is up.
    pub fn set_up(&self, up: bool) {
        self.up.with_label_values(&[&self.name]).set(up.into());
    }

    /// How long the last probe took, answered or not.
    pub fn set_probe(&self, took: Duration) {
        self.probe.with_label_values(&[&self.name]).set(took.as_secs_f64());
    }

    /// How many attempts at it failed.
    pub fn errors(&self) -> u64 {
        self.failed.get()
    }
}

impl Drop for PeerSeries {
    fn drop(&mut self) {
        // They were there: this made them.
        let name = [self.name.as_str()];
        self.up.remove_label_values(&name).ok();
        self.probe.remove_label_values(&name).ok();
        self.errors.remove_label_values(&name).ok();
    }
}

/// The series.
pub struct Metrics {
    series: Series,
    /// The series of the cache.
    pub cache: Arc<castier_cache::Metrics>,
    requests: IntCounterVec,
    /// The series of the one kind of request that must cost nothing, found once.
    hit_requests: [OnceLock<IntCounter>; 2],
    durations: [[Histogram; 5]; 5],
    first_bytes: [[Histogram; 5]; 5],
    in_flight: IntGauge,
    uploads: IntGauge,
    /// Bytes served: by listener, and from the tiers in the order of [`Tier`] or from flights.
    served: [[IntCounter; 4]; 2],
    /// Bytes received from the origin and from peers.
    source_bytes: [IntCounter; 2],
    /// Requests of clients whose answers were an error of ours, or were cut for a source's sake. Part of `/stats` alone.
    client_errors: IntCounter,
    /// Who asks for what.
    pub recent: Recent,
    origin_up: IntGauge,
    shed: IntCounterVec,
    certificate_expiry: IntGaugeVec,
    /// What the control group lets this process hold, in bytes; 0 if there is no limit.
    pub memory_limit: IntGauge,
    /// What the configuration lets this process hold, in bytes.
    pub memory_planned: IntGauge,
    cluster_peers: IntGaugeVec,
    cluster_changes: IntCounter,
    /// Attempts at peers that failed, those that have left included.
    pub peer_errors: IntCounter,
    peer_up: IntGaugeVec,
    peer_probe: GaugeVec,
    peer_failures: IntCounterVec,
    members_hash: IntGauge,
    /// Client connections open now.
    pub connections: IntGauge,
    /// Connections that other nodes have opened to this one.
    pub peer_connections: IntGauge,
}

impl Metrics {
    /// All series, those with known labels at 0 from the start.
    ///
    /// # Errors
    /// A name or label that Prometheus does not allow: a mistake in this file.
    pub fn new() -> prometheus::Result<Self> {
        let series = Series::new("castier_log_dropped_total", "Log records that a sink did not take in time")?;
        let r = series.registry().clone();
        let routes = [Route::Blob, Route::Collection, Route::Relay, Route::Refused, Route::Control];
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
        let source_bytes = counters(&r, "castier_source_bytes_total", "Bytes of blobs received from a source", &["source"])?;
        let info = gauges(&r, "castier_build_info", "The version that runs", &["version"])?;
        info.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        let metrics = Self {
            cache: Arc::new(castier_cache::Metrics::new(&r)?),
            requests: counters(&r, "castier_http_requests_total", "Requests answered", &["listener", "method", "route", "code"])?,
            hit_requests: Default::default(),
            durations: by_result(durations),
            first_bytes: by_result(first_bytes),
            in_flight: gauge(&r, "castier_http_requests_in_flight", "Requests being answered now")?,
            uploads: gauge(&r, "castier_uploads_in_progress", "Uploads now")?,
            served: [Listener::Public, Listener::Peer]
                .map(|listener| froms.map(|from| response_bytes.with_label_values(&[from, listener.as_str()]))),
            source_bytes: ["origin", "peer"].map(|source| source_bytes.with_label_values(&[source])),
            client_errors: IntCounter::new("errors", "Not registered")?,
            recent: Recent::default(),
            origin_up: gauge(&r, "castier_origin_up", "Whether the origin answers, as the last requests found it")?,
            shed: counters(&r, "castier_shed_requests_total", "Requests turned away at a limit", &["reason"])?,
            certificate_expiry: gauges(
                &r,
                "castier_certificate_expiry_timestamp_seconds",
                "When the first of a listener's certificates expires",
                &["listener"],
            )?,
            memory_limit: gauge(&r, "castier_memory_limit_bytes", "The memory limit of the control group; 0: none")?,
            memory_planned: gauge(&r, "castier_memory_planned_bytes", "The memory that the configuration may come to take")?,
            cluster_peers: gauges(&r, "castier_cluster_peers", "Other nodes of the cluster", &["state"])?,
            cluster_changes: counter(&r, "castier_cluster_changes_total", "Changes of who is in the cluster, and who of them is up")?,
            peer_errors: IntCounter::new("peer_errors", "Not registered")?,
            peer_up: gauges(&r, "castier_peer_up", "Whether another node of the cluster answers", &["peer"])?,
            peer_probe: add(
                &r,
                GaugeVec::new(Opts::new("castier_peer_probe_seconds", "Time of the last probe of another node of the cluster"), &["peer"])?,
            )?,
            peer_failures: counters(&r, "castier_peer_errors_total", "Attempts at another node of the cluster that failed", &["peer"])?,
            members_hash: gauge(&r, "castier_cluster_members_hash", "Equal on all nodes that agree on who the members are")?,
            connections: gauge(&r, "castier_connections", "Client connections open")?,
            peer_connections: gauge(&r, "castier_peer_connections", "Connections open from other nodes of the cluster")?,
            series,
        };
        metrics.begin_at_zero();
        // Until somebody finds that it does not.
        metrics.origin_up.set(1);
        Ok(metrics)
    }

    /// Makes the series with known labels exist, so that rates have a start.
    fn begin_at_zero(&self) {
        for state in ["up", "down"] {
            self.cluster_peers.with_label_values(&[state]);
        }
        for limit in Limit::ALL {
            self.shed.with_label_values(&[limit.as_str()]);
        }
    }

    /// A request was answered.
    pub fn request(&self, request: &Request) {
        let Request { listener, method, route, code, .. } = *request;
        let served = if request.served == Served::Error && code == 404 { Served::Absent } else { request.served };
        self.durations[route as usize][served as usize].observe(request.took.as_secs_f64());
        if let Some(first_byte) = request.first_byte {
            self.first_bytes[route as usize][served as usize].observe(first_byte.as_secs_f64());
        }
        let series = || self.requests.with_label_values(&[listener.as_str(), method, route.as_str(), status_label(code)]);
        if code == 200 && method == "GET" && route == Route::Blob {
            self.hit_requests[listener as usize].get_or_init(series).inc();
        } else {
            series().inc();
        }
        if listener == Listener::Public {
            if code >= 500 {
                self.client_errors.inc();
            }
            self.recent.note(&Asked {
                client: request.client,
                // Nobody was given an answer to read, or refused one.
                digest: request.digest.filter(|_| code != CLIENT_GONE),
                reads: route == Route::Blob && matches!(method, "GET" | "HEAD"),
                code,
                bytes: request.bytes,
                first_byte: request.first_byte,
            });
        }
    }

    /// A request is being answered, for as long as this lives.
    pub fn answering(&self) -> Counted<'_> {
        self.in_flight.inc();
        Counted(&self.in_flight)
    }

    /// An upload is on its way, for as long as this lives.
    pub fn uploading(&self) -> Counted<'_> {
        self.uploads.inc();
        Counted(&self.uploads)
    }

    /// The answer to a client was cut, by no fault of the client's.
    pub fn answer_cut(&self, listener: Listener) {
        if listener == Listener::Public {
            self.client_errors.inc();
        }
    }

    /// Requests of clients that were answered; those whose answers were an error of ours; those being answered.
    pub fn client_requests(&self) -> (u64, u64, u64) {
        let total = sum(&self.requests, ("listener", Listener::Public.as_str()));
        (total, self.client_errors.get(), u64::try_from(self.in_flight.get()).unwrap_or(0))
    }

    /// So many bytes of answers came from this tier, or, without one, from a flight.
    pub fn served_from(&self, listener: Listener, tier: Option<Tier>, bytes: u64) {
        self.served[listener as usize][tier.map_or(Tier::ALL.len(), |tier| tier as usize)].inc_by(bytes);
    }

    /// How many bytes of blobs clients were sent.
    pub fn served_to_clients(&self) -> u64 {
        self.served[Listener::Public as usize].iter().map(IntCounter::get).sum()
    }

    /// So many bytes came from a source.
    pub fn received(&self, source: &str, bytes: u64) {
        self.source_bytes[usize::from(source != "origin")].inc_by(bytes);
    }

    /// How many bytes came from the origin, and from peers.
    pub fn received_bytes(&self) -> (u64, u64) {
        let [origin, peers] = &self.source_bytes;
        (origin.get(), peers.get())
    }

    /// Whether the origin answers.
    pub fn set_origin_up(&self, up: bool) {
        self.origin_up.set(up.into());
    }

    /// A request was turned away.
    pub fn shed(&self, limit: Limit) {
        self.shed.with_label_values(&[limit.as_str()]).inc();
    }

    /// The certificates of a listener are good until then, in seconds since 1970.
    pub fn certificate_expires(&self, listener: Listener, at: i64) {
        self.certificate_expiry.with_label_values(&[listener.as_str()]).set(at);
    }

    /// How often requests were turned away, by the limit.
    pub fn sheds(&self) -> [(&'static str, u64); Limit::ALL.len()] {
        Limit::ALL.map(|limit| (limit.as_str(), self.shed.with_label_values(&[limit.as_str()]).get()))
    }

    /// Makes the series of another node.
    pub fn peer(&self, name: &str) -> PeerSeries {
        let (up, probe, errors) = (self.peer_up.clone(), self.peer_probe.clone(), self.peer_failures.clone());
        probe.with_label_values(&[name]);
        let series = PeerSeries { name: name.to_owned(), up, probe, failed: errors.with_label_values(&[name]), errors };
        series.set_up(true);
        series
    }

    /// An attempt at another node failed.
    pub fn peer_failed(&self, peer: &PeerSeries) {
        peer.failed.inc();
        self.peer_errors.inc();
    }

    /// What the members are, as one number.
    pub fn set_members_hash(&self, hash: u64) {
        self.members_hash.set(i64::try_from(hash).unwrap_or(0));
    }

    /// The cluster changed: so many peers are up now, and so many down.
    pub fn cluster_changed(&self, up: usize, down: usize) {
        self.cluster_changes.inc();
        for (state, count) in [("up", up), ("down", down)] {
            self.cluster_peers.with_label_values(&[state]).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }

    /// How many connections are open at a listener.
    pub fn connections_at(&self, listener: Listener) -> &IntGauge {
        match listener {
            Listener::Public => &self.connections,
            Listener::Peer => &self.peer_connections,
        }
    }

    /// The text that Prometheus scrapes, with the tiers' state as of now.
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

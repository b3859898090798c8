//! The JSON of `/stats`. docs/operations.md describes its fields.

use super::{
    Admin, Phase,
    history::{Figures, FirstByte, Past, TierLevel},
    problems::{NodeProblem, NodeState},
    utc::Utc,
};
use crate::{groupcache::GroupcacheStats, memory_plan, recent::Top, routes::RouteFigures};
use castier_cache::{DiskState, Tier as CacheTier, TierStats};
use castier_cluster as cluster;
use serde::Serialize;
use std::time::{Duration, Instant, SystemTime};

/// The length of the list `flights`.
const FLIGHTS: usize = 20;

/// `/stats` without its lists. castier logs it every `log.stats_interval`.
#[derive(Serialize)]
pub struct Brief {
    #[serde(flatten)]
    groupcache: GroupcacheStats,
    version: &'static str,
    /// This node's name in its cluster.
    node: Option<String>,
    uptime_seconds: f64,
    started: Utc,
    now: Utc,
    state: Phase,
    origin: OriginStats,
    disk_tier: DiskTierStats,
    tiers: TiersStats,
    problems: Vec<NodeProblem>,
    requests: RequestStats,
    bytes: ByteStats,
    first_byte: FirstByte,
    flights_total: usize,
}

/// The whole answer.
#[derive(Serialize)]
pub struct Stats {
    #[serde(flatten)]
    brief: Brief,
    #[serde(skip_serializing_if = "Option::is_none")]
    cluster: Option<cluster::Status>,
    members: Vec<MemberRow>,
    routes: Vec<RouteRow>,
    flights: Vec<FlightRow>,
    top: Top,
    history: Past,
}

#[derive(Serialize)]
struct OriginStats {
    up: bool,
    /// Its circuit breaker: `closed`, `open` or `half-open`.
    breaker: &'static str,
    since: Option<Utc>,
    requests: u64,
    errors: u64,
    bytes: u64,
}

#[derive(Serialize)]
struct DiskTierStats {
    state: &'static str,
    since: Option<Utc>,
    path: Option<String>,
    filesystem_avail_bytes: u64,
    errors: u64,
}

#[derive(Serialize)]
struct TiersStats {
    memory: TierReport,
    mirror: TierReport,
    disk: TierReport,
}

#[derive(Serialize)]
struct TierReport {
    #[serde(flatten)]
    stats: TierStats,
    evicted_age_seconds: Option<f64>,
    full_in_seconds: Option<u64>,
}

#[derive(Serialize)]
struct RequestStats {
    total: u64,
    errors: u64,
    in_flight: u64,
    shed: u64,
    connections: u64,
}

#[derive(Serialize)]
struct ByteStats {
    served: u64,
    from_origin: u64,
    from_peers: u64,
}

#[derive(Serialize)]
struct MemberRow {
    name: String,
    #[serde(rename = "self")]
    itself: bool,
    up: bool,
    since: Option<Utc>,
    share: f64,
    probe_ms: Option<f64>,
    errors: u64,
}

#[derive(Serialize)]
struct RouteRow {
    #[serde(flatten)]
    figures: RouteFigures,
    since: Option<Utc>,
}

#[derive(Serialize)]
struct FlightRow {
    digest: String,
    bytes: u64,
    size: Option<u64>,
    age_seconds: f64,
    readers: usize,
    from: &'static str,
}

impl Admin {
    /// The whole answer, now.
    pub fn stats(&self) -> Stats {
        let (flights_total, flights) = self.node.cache.in_progress(FLIGHTS);
        let flights = flights.into_iter().map(|flight| FlightRow {
            digest: flight.key.to_string(),
            bytes: flight.bytes,
            size: flight.size,
            age_seconds: rounded(flight.age),
            readers: flight.readers,
            from: flight.from.as_str(),
        });
        let members = self.members.as_ref().map(|members| members.figures()).unwrap_or_default().into_iter().map(|member| MemberRow {
            name: member.name,
            itself: member.itself,
            up: member.up,
            since: member.since.map(Utc),
            share: member.share,
            probe_ms: member.probe.map(|probe| rounded(probe * 1000)),
            errors: member.errors,
        });
        let routes = self.route_figures().into_iter().map(|figures| RouteRow { since: figures.since.map(Utc), figures });
        Stats {
            brief: Brief { flights_total, ..self.brief() },
            cluster: self.members.as_ref().map(|members| members.status()),
            members: members.collect(),
            routes: routes.collect(),
            flights: flights.collect(),
            top: self.metrics.recent.top(),
            history: self.history.lock().past(),
        }
    }

    /// The figures of the routes.
    fn route_figures(&self) -> Vec<RouteFigures> {
        self.routes.figures()
    }

    /// The answer without `top`, `history`, `flights`, `members`, `routes` and `cluster`.
    pub fn brief(&self) -> Brief {
        let (metrics, now) = (&self.metrics, Instant::now());
        let tiers = self.node.cache.tier_stats();
        let (first_byte, [memory, mirror, disk]) = {
            let history = self.history.lock();
            let tier = |tier: CacheTier| {
                let stats = tiers[tier as usize].1;
                TierReport {
                    stats,
                    evicted_age_seconds: metrics.cache.evicted_age(tier).map(|age| age.as_secs_f64()),
                    full_in_seconds: history.full_in(tier as usize, now, level(stats)),
                }
            };
            (history.first_byte(&metrics.recent.first_byte()), CacheTier::ALL.map(tier))
        };
        let origin = self.origin.origin_state();
        let (from_origin, from_peers) = metrics.upstream.received_bytes();
        let (total, errors, in_flight) = metrics.client_requests();
        let (disk_state, disk_since) = self.node.cache.disk().map_or((None, None), |disk| {
            let (state, since) = disk.state();
            (Some(state), since)
        });
        Brief {
            groupcache: GroupcacheStats::of(&self.metrics),
            version: env!("CARGO_PKG_VERSION"),
            node: self.members.as_ref().map(|members| members.advertised().to_owned()),
            uptime_seconds: rounded(self.began.elapsed()),
            started: Utc(self.started),
            now: Utc(SystemTime::now()),
            state: self.phase(),
            origin: OriginStats {
                up: origin.is_none_or(|origin| origin.up),
                breaker: origin.map(|origin| origin.breaker).unwrap_or_default().as_str(),
                since: origin.and_then(|origin| origin.since).map(Utc),
                requests: origin.map_or(0, |origin| origin.requests),
                errors: origin.map_or(0, |origin| origin.errors),
                bytes: from_origin,
            },
            disk_tier: DiskTierStats {
                state: match disk_state {
                    None => "none",
                    Some(DiskState::Ok) => "ok",
                    Some(DiskState::ReadOnly) => "read-only",
                    Some(DiskState::NotAnswering) => "not answering",
                },
                since: disk_since.map(Utc),
                path: self.node.cache.disk().map(|disk| disk.path().display().to_string()),
                filesystem_avail_bytes: u64::try_from(metrics.cache.disk_avail.get()).unwrap_or(0),
                errors: metrics.cache.all_disk_errors(),
            },
            tiers: TiersStats { memory, mirror, disk },
            problems: self.problems(),
            requests: RequestStats {
                total,
                errors,
                in_flight,
                shed: metrics.sheds().iter().map(|(_, count)| count).sum(),
                connections: u64::try_from(metrics.connections.get()).unwrap_or(0),
            },
            bytes: ByteStats { served: metrics.served_to_clients(), from_origin, from_peers },
            first_byte,
            flights_total: self.node.cache.in_progress(0).0,
        }
    }

    /// Ends a step of the history. Call it every [`super::STEP`].
    pub fn step(&self) {
        let (metrics, now) = (&self.metrics, Instant::now());
        let tiers = self.node.cache.tier_stats().map(|(_, stats)| level(stats));
        let (requests, errors, _) = metrics.client_requests();
        let figures = Figures {
            requests,
            gets: metrics.cache.client_gets(),
            hits: metrics.cache.client_hits(),
            errors,
            bytes_served: metrics.served_to_clients(),
            bytes_from_origin: metrics.upstream.received_bytes().0,
            first_byte: metrics.recent.first_byte(),
            tiers,
        };
        self.history.lock().step(SystemTime::now(), now, figures);
        metrics.recent.rotate(now);
        // Dates new problems, even if nobody reads `/stats`.
        self.problems();
    }

    fn problems(&self) -> Vec<NodeProblem> {
        let origin = self.origin.origin_state().filter(|origin| !origin.up);
        let disk = self.node.cache.disk().map(|disk| disk.state());
        let since = |state| disk.filter(|(now, _)| *now == state).map(|(_, since)| since.unwrap_or(self.started));
        let members = self.members.as_ref().map(|members| members.figures()).unwrap_or_default();
        let down = members.into_iter().filter(|member| !member.up);
        let upstreams_down = self.route_figures().into_iter().filter(|route| !route.up);
        let node = NodeState {
            origin_down: origin.map(|origin| origin.since.unwrap_or(self.started)),
            disk_read_only: since(DiskState::ReadOnly),
            disk_silent: since(DiskState::NotAnswering),
            peers_down: down.map(|member| (member.name, member.since.unwrap_or(self.started))).collect(),
            upstreams_down: upstreams_down.map(|route| (route.route, route.since.unwrap_or(self.started))).collect(),
            sheds: self.metrics.sheds().to_vec(),
            corrupt: ["origin", "peer", "disk"].map(|source| (source, self.metrics.cache.corrupt_count(source))).to_vec(),
            log_dropped: castier_serverkit::log::drops().to_vec(),
            memory: self.memory_limit.and_then(|limit| Some((memory_plan::resident()?, limit))),
        };
        self.problems.lock().update(SystemTime::now(), &node)
    }
}

const fn level(stats: TierStats) -> TierLevel {
    TierLevel { bytes: stats.bytes, capacity: stats.capacity, evictions: stats.evictions }
}

/// Seconds, rounded to milliseconds.
fn rounded(time: Duration) -> f64 {
    (time.as_secs_f64() * 1000.0).round() / 1000.0
}

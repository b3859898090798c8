//! What `/stats` tells: the node at this moment, its past quarter of an hour, and who asks for what.

use super::{
    Admin, Phase,
    history::{Figures, Fill, FirstByte, Past},
    problems::{Problem, Seen},
    utc::Utc,
};
use crate::{
    disk::DiskState,
    ladder::{self, TierName},
    members, plan,
    recent::Top,
    tier::TierStats,
};
use serde::Serialize;
use std::time::{Duration, Instant, SystemTime};

/// How many flights are told, the oldest first.
const FLIGHTS: usize = 20;

/// The node in a few lines: what goes to the log.
#[derive(Serialize)]
pub struct Brief {
    #[serde(flatten)]
    groupcache: ladder::Stats,
    version: &'static str,
    /// This node's name in its cluster.
    node: Option<String>,
    uptime_seconds: f64,
    started: Utc,
    now: Utc,
    state: Phase,
    origin: Origin,
    disk_tier: DiskTier,
    tiers: Tiers,
    problems: Vec<Problem>,
    requests: Requests,
    bytes: Bytes,
    first_byte: FirstByte,
    flights_total: usize,
}

/// All of it.
#[derive(Serialize)]
pub struct Stats {
    #[serde(flatten)]
    brief: Brief,
    #[serde(skip_serializing_if = "Option::is_none")]
    cluster: Option<members::Status>,
    members: Vec<Member>,
    flights: Vec<Flight>,
    top: Top,
    history: Past,
}

#[derive(Serialize)]
struct Origin {
    up: bool,
    since: Option<Utc>,
    requests: u64,
    errors: u64,
    bytes: u64,
}

#[derive(Serialize)]
struct DiskTier {
    state: &'static str,
    since: Option<Utc>,
    path: Option<String>,
    filesystem_avail_bytes: u64,
    errors: u64,
}

#[derive(Serialize)]
struct Tiers {
    memory: Tier,
    mirror: Tier,
    disk: Tier,
}

#[derive(Serialize)]
struct Tier {
    #[serde(flatten)]
    stats: TierStats,
    evicted_age_seconds: Option<f64>,
    full_in_seconds: Option<u64>,
}

#[derive(Serialize)]
struct Requests {
    total: u64,
    errors: u64,
    in_flight: u64,
    shed: u64,
    connections: u64,
}

#[derive(Serialize)]
struct Bytes {
    served: u64,
    from_origin: u64,
    from_peers: u64,
}

#[derive(Serialize)]
struct Member {
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
struct Flight {
    digest: String,
    bytes: u64,
    size: Option<u64>,
    age_seconds: f64,
    readers: usize,
    from: &'static str,
}

impl Admin {
    /// Everything, as of now.
    pub fn stats(&self) -> Stats {
        let (flights_total, flights) = self.ladder.going(FLIGHTS);
        let flights = flights.into_iter().map(|flight| Flight {
            digest: flight.digest.to_string(),
            bytes: flight.bytes,
            size: flight.size,
            age_seconds: rounded(flight.age),
            readers: flight.readers,
            from: flight.from,
        });
        let members = self.members.as_ref().map(|members| members.figures()).unwrap_or_default().into_iter().map(|member| Member {
            name: member.name,
            itself: member.itself,
            up: member.up,
            since: member.since.map(Utc),
            share: member.share,
            probe_ms: member.probe.map(|probe| rounded(probe * 1000)),
            errors: member.errors,
        });
        Stats {
            brief: Brief { flights_total, ..self.brief() },
            cluster: self.members.as_ref().map(|members| members.status()),
            members: members.collect(),
            flights: flights.collect(),
            top: self.metrics.recent.top(),
            history: self.history.lock().past(),
        }
    }

    /// What goes to the log: without `top`, `history`, `flights`, and `members`.
    pub fn brief(&self) -> Brief {
        let (metrics, now) = (&self.metrics, Instant::now());
        let tiers = self.ladder.tiers();
        let (first_byte, [memory, mirror, disk]) = {
            let history = self.history.lock();
            let tier = |tier: TierName| {
                let stats = tiers[tier as usize].1;
                Tier {
                    stats,
                    evicted_age_seconds: metrics.evicted_age(tier).map(|age| age.as_secs_f64()),
                    full_in_seconds: history.full_in(tier as usize, now, fill(stats)),
                }
            };
            (history.first_byte(&metrics.recent.first_byte()), [TierName::Memory, TierName::Mirror, TierName::Disk].map(tier))
        };
        let origin = self.ladder.origin_state();
        let (from_origin, from_peers) = metrics.received_bytes();
        let (total, errors, in_flight) = metrics.client_requests();
        let (disk_state, disk_since) = self.ladder.disk().map_or((None, None), |disk| {
            let (state, since) = disk.state();
            (Some(state), since)
        });
        Brief {
            groupcache: self.ladder.stats(),
            version: env!("CARGO_PKG_VERSION"),
            node: self.members.as_ref().map(|members| members.advertised().to_owned()),
            uptime_seconds: rounded(self.began.elapsed()),
            started: Utc(self.started),
            now: Utc(SystemTime::now()),
            state: self.phase(),
            origin: Origin {
                up: origin.is_none_or(|origin| origin.up),
                since: origin.and_then(|origin| origin.since).map(Utc),
                requests: origin.map_or(0, |origin| origin.requests),
                errors: origin.map_or(0, |origin| origin.errors),
                bytes: from_origin,
            },
            disk_tier: DiskTier {
                state: match disk_state {
                    None => "none",
                    Some(DiskState::Ok) => "ok",
                    Some(DiskState::ReadOnly) => "read-only",
                    Some(DiskState::NotAnswering) => "not answering",
                },
                since: disk_since.map(Utc),
                path: self.ladder.disk().map(|disk| disk.path().display().to_string()),
                filesystem_avail_bytes: u64::try_from(metrics.disk_avail.get()).unwrap_or(0),
                errors: metrics.all_disk_errors(),
            },
            tiers: Tiers { memory, mirror, disk },
            problems: self.problems(),
            requests: Requests {
                total,
                errors,
                in_flight,
                shed: metrics.sheds().iter().map(|(_, count)| count).sum(),
                connections: u64::try_from(metrics.connections.get()).unwrap_or(0),
            },
            bytes: Bytes { served: metrics.served_to_clients(), from_origin, from_peers },
            first_byte,
            flights_total: self.ladder.going(0).0,
        }
    }

    /// Ends a step of the history. To be called every [`super::STEP`].
    pub fn step(&self) {
        let (metrics, now) = (&self.metrics, Instant::now());
        let tiers = self.ladder.tiers().map(|(_, stats)| fill(stats));
        let (requests, errors, _) = metrics.client_requests();
        let hits: u64 = [TierName::Memory, TierName::Mirror, TierName::Disk].map(|tier| metrics.hits(tier)).iter().sum();
        let figures = Figures {
            requests,
            gets: metrics.gets.get().saturating_sub(metrics.gets_from_peers.get()),
            hits: hits.saturating_sub(metrics.hits_from_peers.get()),
            errors,
            bytes_served: metrics.served_to_clients(),
            bytes_from_origin: metrics.received_bytes().0,
            first_byte: metrics.recent.first_byte(),
            tiers,
        };
        self.history.lock().step(SystemTime::now(), now, figures);
        metrics.recent.rotate(now);
        // What happens between two looks is told as of the second.
        self.problems();
    }

    fn problems(&self) -> Vec<Problem> {
        let origin = self.ladder.origin_state().filter(|origin| !origin.up);
        let disk = self.ladder.disk().map(|disk| disk.state());
        let since = |state| disk.filter(|(now, _)| *now == state).map(|(_, since)| since.unwrap_or(self.started));
        let members = self.members.as_ref().map(|members| members.figures()).unwrap_or_default();
        let down = members.into_iter().filter(|member| !member.up);
        let seen = Seen {
            origin_down: origin.map(|origin| origin.since.unwrap_or(self.started)),
            disk_read_only: since(DiskState::ReadOnly),
            disk_silent: since(DiskState::NotAnswering),
            peers_down: down.map(|member| (member.name, member.since.unwrap_or(self.started))).collect(),
            sheds: self.metrics.sheds().to_vec(),
            corrupt: ["origin", "peer", "disk"].map(|source| (source, self.metrics.corrupt_count(source))).to_vec(),
            log_dropped: self.metrics.log_dropped().to_vec(),
            memory: self.memory_limit.and_then(|limit| Some((plan::resident()?, limit))),
        };
        self.problems.lock().look(SystemTime::now(), &seen)
    }
}

const fn fill(stats: TierStats) -> Fill {
    Fill { bytes: stats.bytes, capacity: stats.capacity, evictions: stats.evictions }
}

/// In seconds, to the millisecond.
fn rounded(time: Duration) -> f64 {
    (time.as_secs_f64() * 1000.0).round() / 1000.0
}

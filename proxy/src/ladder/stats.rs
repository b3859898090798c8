//! What a node tells of itself in numbers.

use super::Ladder;
use crate::{
    metrics::Outcome,
    tier::{TierName, TierStats},
};
use serde::Serialize;

/// Groupcache's statistics, under groupcache's names.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Stats {
    /// Any get, from clients or peers.
    gets: u64,
    /// Gets that a tier answered.
    cache_hits: u64,
    /// Loads from peers.
    peer_loads: u64,
    /// Peers that failed.
    peer_errors: u64,
    /// Gets that no tier could answer.
    loads: u64,
    /// Loads left after coalescing.
    loads_deduped: u64,
    /// Loads that the origin answered, with a blob or with its absence.
    local_loads: u64,
    /// Loads that the origin did not answer.
    local_load_errs: u64,
    /// Gets that came from peers.
    server_requests: u64,
}

impl Ladder {
    /// The state of every tier, by name. Those that are not configured are empty.
    pub fn tiers(&self) -> [(&'static str, TierStats); 3] {
        let tiers = &self.tiers;
        [
            (TierName::Memory, tiers.memory.stats(self.metrics.hits(TierName::Memory))),
            (TierName::Mirror, tiers.mirror.as_ref().map(|mirror| mirror.stats(self.metrics.hits(TierName::Mirror))).unwrap_or_default()),
            (TierName::Disk, tiers.disk.as_ref().map(|disk| disk.stats(self.metrics.hits(TierName::Disk))).unwrap_or_default()),
        ]
        .map(|(name, stats)| (name.as_str(), stats))
    }

    /// Groupcache's figures.
    pub fn stats(&self) -> Stats {
        let metrics = &self.metrics;
        let [(_, memory), (_, mirror), (_, disk)] = self.tiers();
        let ended = |source, outcome| metrics.source_loads(source, outcome);
        Stats {
            gets: metrics.gets.get(),
            cache_hits: memory.hits + mirror.hits + disk.hits,
            peer_loads: ended("peer", Outcome::Ok) + ended("peer", Outcome::Absent),
            peer_errors: metrics.peer_errors.get(),
            loads: metrics.loads.get(),
            loads_deduped: metrics.flights.get(),
            local_loads: ended("origin", Outcome::Ok) + ended("origin", Outcome::Absent),
            local_load_errs: ended("origin", Outcome::Error),
            server_requests: metrics.gets_from_peers.get(),
        }
    }
}

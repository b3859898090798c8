//! What a node tells of itself in groupcache's figures.

use crate::metrics::Metrics;
use castier_cache::{LoadResult, SourceKind, Tier};
use serde::Serialize;

/// Groupcache's statistics, under groupcache's names.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct GroupcacheStats {
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

impl GroupcacheStats {
    /// The figures as of now.
    pub fn of(metrics: &Metrics) -> Self {
        let (gets, server_requests, loads, loads_deduped) = metrics.cache.ledger();
        let ended = |source, result| metrics.cache.source_loads(source, result);
        Self {
            gets,
            cache_hits: Tier::ALL.map(|tier| metrics.cache.hits(tier)).iter().sum(),
            peer_loads: ended(SourceKind::Peer, LoadResult::Ok) + ended(SourceKind::Peer, LoadResult::Absent),
            peer_errors: metrics.cluster.peer_errors(),
            loads,
            loads_deduped,
            local_loads: ended(SourceKind::Origin, LoadResult::Ok) + ended(SourceKind::Origin, LoadResult::Absent),
            local_load_errs: ended(SourceKind::Origin, LoadResult::Error),
            server_requests,
        }
    }
}

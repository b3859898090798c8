//! The series of the cluster.

use castier_serverkit::series::{add, counter, counters, gauge, gauges};
use prometheus::{GaugeVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry};
use std::time::Duration;

/// The series of one peer. Dropping it removes them.
pub(crate) struct PeerSeries {
    name: String,
    up: IntGaugeVec,
    probe: GaugeVec,
    errors: IntCounterVec,
    /// Requests to it that failed.
    failed: IntCounter,
}

impl PeerSeries {
    /// Sets whether it is up.
    pub(crate) fn set_up(&self, up: bool) {
        self.up.with_label_values(&[&self.name]).set(up.into());
    }

    /// Sets how long the last probe took, answered or not.
    pub(crate) fn set_probe(&self, took: Duration) {
        self.probe.with_label_values(&[&self.name]).set(took.as_secs_f64());
    }

    /// The number of failed requests to it.
    pub(crate) fn errors(&self) -> u64 {
        self.failed.get()
    }
}

impl Drop for PeerSeries {
    fn drop(&mut self) {
        // The series exist, so removing them cannot fail.
        let name = [self.name.as_str()];
        self.up.remove_label_values(&name).ok();
        self.probe.remove_label_values(&name).ok();
        self.errors.remove_label_values(&name).ok();
    }
}

/// The series.
pub struct Metrics {
    cluster_peers: IntGaugeVec,
    cluster_changes: IntCounter,
    /// Failed requests to peers, those that have left included. Only in `/stats`.
    peer_errors: IntCounter,
    peer_up: IntGaugeVec,
    peer_probe: GaugeVec,
    peer_failures: IntCounterVec,
    members_hash: IntGauge,
}

impl Metrics {
    /// All series, registered with `r`. Those with known labels start at 0.
    ///
    /// # Errors
    /// A name that is registered already.
    pub fn new(r: &Registry) -> prometheus::Result<Self> {
        let metrics = Self {
            peer_errors: IntCounter::new("peer_errors", "Not registered")?,
            cluster_peers: gauges(r, "castier_cluster_peers", "Peers, by state", &["state"])?,
            cluster_changes: counter(r, "castier_cluster_changes_total", "Changes of the members of the cluster and of their state")?,
            peer_up: gauges(r, "castier_peer_up", "Whether a peer is up", &["peer"])?,
            peer_probe: add(r, GaugeVec::new(Opts::new("castier_peer_probe_seconds", "Duration of the last probe of a peer"), &["peer"])?)?,
            peer_failures: counters(r, "castier_peer_errors_total", "Failed requests to a peer", &["peer"])?,
            members_hash: gauge(r, "castier_cluster_members_hash", "Hash of the list of members; equal on all nodes that agree on it")?,
        };
        for state in ["up", "down"] {
            metrics.cluster_peers.with_label_values(&[state]);
        }
        Ok(metrics)
    }

    /// The number of failed requests to peers.
    pub fn peer_errors(&self) -> u64 {
        self.peer_errors.get()
    }

    /// Creates the series of a peer.
    pub(crate) fn peer(&self, name: &str) -> PeerSeries {
        let (up, probe, errors) = (self.peer_up.clone(), self.peer_probe.clone(), self.peer_failures.clone());
        probe.with_label_values(&[name]);
        let series = PeerSeries { name: name.to_owned(), up, probe, failed: errors.with_label_values(&[name]), errors };
        series.set_up(true);
        series
    }

    /// Counts a failed request to a peer.
    pub(crate) fn peer_failed(&self, peer: &PeerSeries) {
        peer.failed.inc();
        self.peer_errors.inc();
    }

    /// Sets the hash of the list of members.
    pub(crate) fn set_members_hash(&self, hash: u64) {
        self.members_hash.set(i64::try_from(hash).unwrap_or(0));
    }

    /// Records a change of the cluster, and how many peers are up and down now.
    pub(crate) fn cluster_changed(&self, up: usize, down: usize) {
        self.cluster_changes.inc();
        for (state, count) in [("up", up), ("down", down)] {
            self.cluster_peers.with_label_values(&[state]).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }
}

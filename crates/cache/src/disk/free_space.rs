//! Publishes the free space of the tier's file system as metrics.

use super::Stop;
use crate::metrics::Metrics;
use std::{path::Path, time::Duration};

/// The time between two updates. Each written blob causes one more.
const INTERVAL: Duration = Duration::from_secs(10);

/// Updates the metrics until the tier closes. Blocks.
pub(super) fn poll(root: &Path, metrics: &Metrics, stop: &Stop) {
    loop {
        update(root, metrics);
        if stop.within(INTERVAL) {
            return;
        }
    }
}

/// Updates the metrics once. If the file system cannot be asked, the old values stay. Blocks.
pub(super) fn update(root: &Path, metrics: &Metrics) {
    if let Ok(system) = rustix::fs::statvfs(root) {
        metrics.disk_space(system.f_bavail.saturating_mul(system.f_frsize), system.f_favail);
    }
}

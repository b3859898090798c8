//! How much the tier's file system still takes.

use super::walk::Stop;
use crate::metrics::Metrics;
use std::{path::Path, time::Duration};

/// How often it is looked at, beside each time a blob has been written.
const EVERY: Duration = Duration::from_secs(10);

/// Looks again and again, until the tier closes.
pub(super) fn keep_looking(root: &Path, metrics: &Metrics, stop: &Stop) {
    loop {
        look(root, metrics);
        if stop.within(EVERY) {
            return;
        }
    }
}

/// Looks once. A file system that cannot be asked leaves the figures as they are.
pub(super) fn look(root: &Path, metrics: &Metrics) {
    if let Ok(system) = rustix::fs::statvfs(root) {
        metrics.disk_space(system.f_bavail.saturating_mul(system.f_frsize), system.f_favail);
    }
}

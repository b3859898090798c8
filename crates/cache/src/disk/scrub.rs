//! The scrub: reads all files again and again, at a limited rate, and verifies them by their SHA-256.

use super::{
    Stop,
    blob::{DiskBlob, OpenError},
    scan::each_entry,
    store::Store,
};
use castier_blob::{Digest, Verifier};
use std::{
    sync::{Arc, Weak},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};
use tokio::sync::mpsc;

/// The pause between two passes, so that a small tier is not read without end.
const PAUSE: Duration = Duration::from_secs(60);
/// Each file counts as at least this many bytes, so that a tier of tiny files is not opened at full speed.
const MIN_COST: u64 = 4096;

/// Reads all blobs again and again until the tier closes, at `rate` bytes per second; 0 turns the scrub off. Sends the digests of damaged
/// blobs to `damaged`. Blocks.
pub(super) fn scrub(store: &Arc<Store>, stop: &Stop, rate: u64, damaged: &mpsc::Sender<Digest>) {
    if rate == 0 {
        return;
    }
    let mut limiter = RateLimiter { rate, since: Instant::now(), spent: 0 };
    loop {
        for first in 0..=u8::MAX {
            let mut digests = Vec::new();
            each_entry(&store.directory(first), |digest, _| {
                digests.extend(digest);
                Ok(())
            })
            .ok();
            for digest in digests {
                if !scrub_one(store, &digest, stop, &mut limiter, damaged) {
                    return;
                }
            }
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        store.metrics.disk_scrub_last_pass.set(i64::try_from(now.as_secs()).unwrap_or(i64::MAX));
        if stop.within(PAUSE) {
            return;
        }
    }
}

/// Verifies one blob. Returns false if the tier closes.
fn scrub_one(store: &Arc<Store>, digest: &Digest, stop: &Stop, limiter: &mut RateLimiter, damaged: &mpsc::Sender<Digest>) -> bool {
    if !limiter.wait_for(MIN_COST, stop) {
        return false;
    }
    if !store.has(digest) {
        return true;
    }
    let mut open = true;
    let mut verifier = Verifier::of(*digest, ());
    let opened = DiskBlob::open(Weak::new(), store.reads.clone(), *digest, &store.path(digest));
    let damage = match &opened {
        Ok(blob) => {
            let read = blob.read_through(|piece| {
                verifier.update(piece);
                open = limiter.wait_for(piece.len() as u64, stop);
                open
            });
            let why = match read {
                Ok(false) => return false,
                Ok(true) => verifier.finish().err().map(|mismatch| mismatch.to_string()),
                Err(why) => Some(why),
            };
            why.zip(blob.file().get().ok())
        }
        Err(OpenError::Damaged(file)) => Some(("the trailer does not match its checksum".to_owned(), file)),
        // The next get handles these, under the lock of the subdirectory.
        Err(OpenError::Missing | OpenError::Unfinished | OpenError::NotAFile | OpenError::Io(_)) => return true,
    };
    store.metrics.disk_scrubbed.inc();
    if let Some((why, file)) = damage
        && store.quarantine(digest, file, &why)
    {
        damaged.try_send(*digest).ok();
    }
    true
}

/// Limits reads to a rate.
struct RateLimiter {
    /// Bytes per second.
    rate: u64,
    /// The start of the current accounting period.
    since: Instant,
    /// Bytes since then.
    spent: u64,
}

impl RateLimiter {
    /// Waits until `bytes` more are allowed. Returns false if the tier closes first.
    fn wait_for(&mut self, bytes: u64, stop: &Stop) -> bool {
        self.spent += bytes;
        let due = self.since + Duration::from_secs_f64(self.spent as f64 / self.rate as f64);
        let now = Instant::now();
        if now > due + Duration::from_secs(1) {
            // After a stall or a pause: do not catch up.
            (self.since, self.spent) = (now, 0);
        }
        !stop.within(due.saturating_duration_since(now))
    }
}

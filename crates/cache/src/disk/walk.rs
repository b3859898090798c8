//! Walks over all files: once at the start to fill the index, and then for ever to find what rotted.

use super::{
    blob::{DiskBlob, Unopened},
    store::{Scanned, Store},
};
use castier_blob::{Digest, Verifier};
use crossbeam_channel::{Receiver, RecvTimeoutError};
use std::{
    convert::Infallible,
    fs, io,
    path::PathBuf,
    sync::{Arc, Weak},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};
use tokio::sync::mpsc;

/// How often a long scan says how far it is.
const REPORT: Duration = Duration::from_secs(10);
/// From the end of a scrub to the next: a small tier needs no reading without end.
const REST: Duration = Duration::from_secs(60);
/// What looking at a file costs at least, so that a tier of tiny files is not opened in a rush.
const LEAST: u64 = 4096;

/// Disconnected when the tier closes.
pub(super) struct Stop(pub(super) Receiver<Infallible>);

impl Stop {
    /// Waits; true if the tier closes before the time is over.
    pub(super) fn within(&self, wait: Duration) -> bool {
        !matches!(self.0.recv_timeout(wait), Err(RecvTimeoutError::Timeout))
    }
}

/// Fills the index from the directories. The tier serves meanwhile.
pub(super) fn scan(store: &Store, stop: &Stop) {
    let started = Instant::now();
    let (mut told, mut blobs, mut rubbish) = (started, 0_u64, 0_u64);
    let (mut foreign, mut stranger) = (0_u64, None);
    for first in 0..=u8::MAX {
        let directory = store.directory(first);
        let seen = each_blob(&directory, |named, entry| {
            let scanned = named.map_or(Ok(Scanned::Foreign), |digest| store.scan(&digest, entry));
            match scanned.inspect_err(|error| tracing::warn!(%error, path = %entry.path().display(), "a kept file cannot be looked at"))? {
                Scanned::Blob => blobs += 1,
                Scanned::Rubbish => rubbish += 1,
                Scanned::Foreign => {
                    foreign += 1;
                    stranger.get_or_insert_with(|| entry.path());
                }
            }
            if blobs.is_multiple_of(256) {
                // Makes room as it goes, where the directory holds more than the tier may.
                store.sweep();
            }
            Ok(())
        });
        if let Err(error) = seen {
            tracing::warn!(%error, path = %directory.display(), "a directory of the disk tier could not be listed to its end");
        }
        store.metrics.disk_scan_progress.set(f64::from(u16::from(first) + 1) / 256.0);
        if told.elapsed() >= REPORT {
            told = Instant::now();
            tracing::info!(blobs, percent = u32::from(first) * 100 / 256, "listing the disk tier");
        }
        if stop.within(Duration::ZERO) {
            return;
        }
    }
    store.scanned();
    if let Some(example) = stranger {
        tracing::warn!(files = foreign, example = %example.display(), "files in the disk tier that are none of its blobs are left alone");
    }
    tracing::info!(blobs, rubbish, seconds = started.elapsed().as_secs_f64(), "the disk tier is listed");
}

/// Reads all blobs back, again and again, at `rate` bytes a second, and tells what it finds `rotten`.
pub(super) fn scrub(store: &Arc<Store>, stop: &Stop, rate: u64, rotten: &mpsc::Sender<Digest>) {
    if rate == 0 {
        return;
    }
    let mut pace = Pace { rate, since: Instant::now(), spent: 0 };
    loop {
        for first in 0..=u8::MAX {
            let mut digests = Vec::new();
            each_blob(&store.directory(first), |named, _| {
                digests.extend(named);
                Ok(())
            })
            .ok();
            for digest in digests {
                if !scrub_one(store, &digest, stop, &mut pace, rotten) {
                    return;
                }
            }
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        store.metrics.disk_scrub_last_pass.set(i64::try_from(now.as_secs()).unwrap_or(i64::MAX));
        if stop.within(REST) {
            return;
        }
    }
}

/// Reads one blob back; false if the tier closes.
fn scrub_one(store: &Arc<Store>, digest: &Digest, stop: &Stop, pace: &mut Pace, rotten: &mpsc::Sender<Digest>) -> bool {
    if !pace.spend(LEAST, stop) {
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
                open = pace.spend(piece.len() as u64, stop);
                open
            });
            let why = match read {
                Ok(false) => return false,
                Ok(true) => verifier.finish().err().map(|mismatch| mismatch.to_string()),
                Err(why) => Some(why),
            };
            why.zip(blob.file().get().ok())
        }
        Err(Unopened::Damaged(file)) => Some(("the trailer does not match its checksum".to_owned(), file)),
        // These are for the next get to see to, as it holds the lock.
        Err(Unopened::Vanished | Unopened::Unfinished | Unopened::NoFile | Unopened::Unknown(_)) => return true,
    };
    store.metrics.disk_scrubbed.inc();
    if let Some((why, file)) = damage
        && store.quarantine(digest, file, &why)
    {
        rotten.try_send(*digest).ok();
    }
    true
}

/// Calls `visit` for every entry of a shelf, with the digest if it is named like a blob of that shelf.
fn each_blob(directory: &PathBuf, mut visit: impl FnMut(Option<Digest>, &fs::DirEntry) -> io::Result<()>) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let named = entry.file_name().to_str().and_then(|name| name.parse::<Digest>().ok());
        let here = named.filter(|digest| directory.ends_with(format!("{:02x}", digest.as_bytes()[0])));
        // One file that cannot be looked at does not hide the others.
        visit(here, &entry).ok();
    }
    Ok(())
}

/// Holds a reader to a rate.
struct Pace {
    rate: u64,
    /// When counting began.
    since: Instant,
    /// Bytes since then.
    spent: u64,
}

impl Pace {
    /// Waits until `bytes` more are due; false if the tier closes first.
    fn spend(&mut self, bytes: u64, stop: &Stop) -> bool {
        self.spent += bytes;
        let due = self.since + Duration::from_secs_f64(self.spent as f64 / self.rate as f64);
        let now = Instant::now();
        if now > due + Duration::from_secs(1) {
            // After a stall or a rest: what was not read then is not made up for.
            (self.since, self.spent) = (now, 0);
        }
        !stop.within(due.saturating_duration_since(now))
    }
}

//! The scan: lists all directories once, after the start, and fills the index.

use super::{
    Stop,
    store::{Scanned, Store},
};
use castier_blob::Digest;
use std::{
    fs, io,
    path::PathBuf,
    time::{Duration, Instant},
};

/// The time between two log lines about the progress of a long scan.
const REPORT: Duration = Duration::from_secs(10);

/// Fills the index from the directories. The tier serves meanwhile. Blocks.
pub(super) fn scan(store: &Store, stop: &Stop) {
    let started = Instant::now();
    let (mut reported, mut blobs, mut unfinished) = (started, 0_u64, 0_u64);
    let (mut foreign, mut foreign_example) = (0_u64, None);
    for first in 0..=u8::MAX {
        let directory = store.directory(first);
        let listed = each_entry(&directory, |digest, entry| {
            let scanned = digest.map_or(Ok(Scanned::Foreign), |digest| store.scan(&digest, entry));
            match scanned
                .inspect_err(|error| tracing::warn!(%error, path = %entry.path().display(), "a file of the disk tier cannot be read"))?
            {
                Scanned::Blob => blobs += 1,
                Scanned::Unfinished => unfinished += 1,
                Scanned::Foreign => {
                    foreign += 1;
                    foreign_example.get_or_insert_with(|| entry.path());
                }
            }
            if blobs.is_multiple_of(256) {
                // The directory may hold more than the tier's capacity: delete evicted files during the scan.
                store.sweep();
            }
            Ok(())
        });
        if let Err(error) = listed {
            tracing::warn!(%error, path = %directory.display(), "a directory of the disk tier could not be listed completely");
        }
        store.metrics.disk_scan_progress.set(f64::from(u16::from(first) + 1) / 256.0);
        if reported.elapsed() >= REPORT {
            reported = Instant::now();
            tracing::info!(blobs, percent = u32::from(first) * 100 / 256, "listing the disk tier");
        }
        if stop.within(Duration::ZERO) {
            return;
        }
    }
    store.scanned();
    if let Some(example) = foreign_example {
        tracing::warn!(files = foreign, example = %example.display(), "the disk tier ignores files in its directory that are not its own");
    }
    tracing::info!(blobs, rubbish = unfinished, seconds = started.elapsed().as_secs_f64(), "the disk tier is listed");
}

/// Calls `visit` for every entry of a subdirectory. The digest is `None` if the entry's name is not that of a blob of this subdirectory.
/// An error of `visit` does not end the listing.
///
/// # Errors
/// The directory cannot be listed to its end.
pub(super) fn each_entry(directory: &PathBuf, mut visit: impl FnMut(Option<Digest>, &fs::DirEntry) -> io::Result<()>) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let digest = entry.file_name().to_str().and_then(|name| name.parse::<Digest>().ok());
        let here = digest.filter(|digest| directory.ends_with(format!("{:02x}", digest.as_bytes()[0])));
        visit(here, &entry).ok();
    }
    Ok(())
}

//! The disk tier's directory.

use super::{Blob, Castier, MIB, Reply, Request, eventually, metrics, stats::Metrics};
use castier_blob::Digest;
use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};
use tempfile::TempDir;

/// A directory for a disk tier. It stays when castier ends.
pub(crate) struct Cache {
    dir: TempDir,
}

/// A file of the tier.
#[derive(Clone, Debug)]
pub(crate) struct Kept {
    pub(crate) digest: Digest,
    pub(crate) path: PathBuf,
    /// Its length.
    pub(crate) len: u64,
    /// Its bytes on the disk, as `du` counts.
    pub(crate) taken: u64,
}

impl Cache {
    pub(crate) fn new() -> Self {
        Self { dir: TempDir::new().unwrap() }
    }

    pub(crate) fn root(&self) -> &Path {
        self.dir.path()
    }

    /// The tier's configuration, with a tiny memory tier, and without the scrub, so that only gets read files.
    pub(crate) fn config(&self, capacity: &str, more: &str) -> String {
        let path = self.root();
        format!("disk.path = {path:?}\ndisk.capacity = \"{capacity}\"\ndisk.scrub_rate = 0\nmemory.max_blob = \"64KiB\"\n{more}")
    }

    /// All finished files, in any order. Skips files that are deleted in the meantime.
    pub(crate) fn files(&self) -> Vec<Kept> {
        let shelves = fs::read_dir(self.root()).unwrap().flatten().filter(|shelf| shelf.file_name().len() == 2);
        let entries = shelves.flat_map(|shelf| fs::read_dir(shelf.path()).unwrap().flatten());
        let kept = |entry: fs::DirEntry| {
            let metadata = entry.metadata().ok()?;
            let digest = entry.file_name().to_str().unwrap().parse().expect("a digest");
            Some(Kept { digest, path: entry.path(), len: metadata.len(), taken: metadata.blocks() * 512 })
        };
        entries.filter_map(kept).collect()
    }

    pub(crate) fn file(&self, blob: &Blob) -> PathBuf {
        let name = blob.digest.to_string();
        self.root().join(&name[..2]).join(name)
    }

    /// The number of entries in the directory `name`.
    pub(crate) fn count(&self, name: &str) -> usize {
        fs::read_dir(self.root().join(name)).unwrap().count()
    }
}

/// A metric of the disk tier.
pub(crate) fn of_disk(metrics: &Metrics, name: &str) -> u64 {
    metrics.sum(name, &[("tier", "disk")])
}

/// Waits until the disk tier has this many blobs.
pub(crate) async fn kept(castier: &Castier, blobs: u64) {
    let what = format!("{blobs} blobs on disk");
    eventually(&what, async || (of_disk(&metrics(castier).await, "castier_tier_blobs") == blobs).then_some(())).await;
}

/// Waits until the scan is complete.
pub(crate) async fn scanned(castier: &Castier) {
    eventually("the scan", async || (metrics(castier).await.total("castier_disk_scan_progress_ratio") == 1).then_some(())).await;
}

/// Gets the whole blob, and a range across the border of two blocks. Both must come from disk.
pub(crate) async fn assert_hit(castier: &Castier, blob: &Blob) {
    let reply = super::get(castier.public, blob).await;
    reply.assert_is(blob);
    assert_eq!(reply.cache_status(), "castier; hit; detail=disk");
    if blob.size == 0 {
        return;
    }
    let (from, end) = (blob.size / 3, (blob.size - blob.size / 4).min(blob.size / 3 + MIB));
    let part = Request::get(blob.path()).header("Range", format!("bytes={from}-{}", end - 1)).send(castier.public).await;
    assert_part(&part, blob, from, end);
    assert_eq!(part.cache_status(), "castier; hit; detail=disk");
}

#[track_caller]
fn assert_part(reply: &Reply, blob: &Blob, from: u64, end: u64) {
    assert_eq!(reply.status, 206, "{}", reply.head.first);
    assert_eq!(reply.header("content-range"), Some(format!("bytes {from}-{}/{}", end - 1, blob.size).as_str()));
    assert!(reply.complete && reply.body == blob.bytes(from, end), "another part");
}

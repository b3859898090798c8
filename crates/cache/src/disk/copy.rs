//! Copies an upload into the tier while it goes to the origin. The upload never waits for the disk. Bytes that are not written yet count
//! against `disk.write_behind`; when that budget is exhausted, the copy is abandoned.

use super::{Disk, store::ForgetEpoch};
use crate::{metrics::Skip, resource::Visibility};
use bytes::Bytes;
use castier_blob::{Digest, Verified};
use std::sync::{Arc, atomic::Ordering};
use tokio::sync::mpsc;

/// How many parts one write takes at most.
const BATCH: usize = 64;

/// The sending end of a copy. If dropped before [`Self::keep`], nothing is kept.
pub struct DiskCopy {
    disk: Arc<Disk>,
    /// To the task that writes. The budget `disk.write_behind` bounds it.
    parts: mpsc::UnboundedSender<CopyStep>,
    /// Bytes taken so far.
    size: u64,
}

enum CopyStep {
    Part(Bytes, QueueLease),
    /// The blob is complete and must be kept.
    End(Digest, ForgetEpoch),
}

/// Bytes reserved in the budget `disk.write_behind`; released on drop.
struct QueueLease {
    disk: Arc<Disk>,
    bytes: u64,
}

impl QueueLease {
    fn take(disk: &Arc<Disk>, bytes: u64) -> Option<Self> {
        disk.behind.take(bytes).then(|| Self { disk: disk.clone(), bytes })
    }
}

impl Drop for QueueLease {
    fn drop(&mut self) {
        self.disk.behind.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl Disk {
    /// Starts a copy. Ask [`Self::admits`] first. Needs a tokio runtime.
    pub fn copy(self: &Arc<Self>) -> DiskCopy {
        let (parts, steps) = mpsc::unbounded_channel();
        tokio::spawn(write(self.clone(), steps));
        DiskCopy { disk: self.clone(), parts, size: 0 }
    }
}

impl DiskCopy {
    /// Takes the next bytes, without waiting. Returns `None` if the copy is abandoned: the budget is exhausted, or a write failed.
    #[must_use]
    pub fn take(mut self, part: Bytes) -> Option<Self> {
        let Some(lease) = QueueLease::take(&self.disk, part.len() as u64) else {
            self.disk.store.metrics.disk_skipped(Skip::Queue);
            return None;
        };
        self.size += part.len() as u64;
        // Fails if the writing task has ended because a write failed. That task has counted it.
        self.parts.send(CopyStep::Part(part, lease)).is_ok().then_some(self)
    }

    /// Keeps the blob in the background, once it is written. If the blob is forgotten after this call, it is not kept.
    pub fn keep(copy: Verified<Self>) {
        let (digest, size) = (copy.digest(), copy.size());
        let copy = copy.into_content();
        if size != copy.size {
            tracing::error!(%digest, size, copied = copy.size, "the copy of an upload does not have the upload's length, and is not kept");
            return;
        }
        let epoch = copy.disk.store.epoch(&digest);
        copy.parts.send(CopyStep::End(digest, epoch)).ok();
    }
}

/// The task that writes.
async fn write(disk: Arc<Disk>, mut steps: mpsc::UnboundedReceiver<CopyStep>) {
    // Held until the copy is complete, so that `Disk::close` waits for it.
    let Some(_lease) = QueueLease::take(&disk, super::QUEUE_OVERHEAD) else { return disk.store.metrics.disk_skipped(Skip::Queue) };
    let Some(mut file) = disk.file(Vec::new()).await else { return };
    let mut batch = Vec::with_capacity(BATCH);
    while steps.recv_many(&mut batch, BATCH).await > 0 {
        let (mut parts, mut leases, mut end) = (Vec::with_capacity(batch.len()), Vec::with_capacity(batch.len()), None);
        for step in batch.drain(..) {
            match step {
                CopyStep::Part(part, lease) => {
                    parts.push(part);
                    leases.push(lease);
                }
                CopyStep::End(digest, epoch) => end = Some((digest, epoch)),
            }
        }
        let Some(grown) = file.grow(parts).await else { return };
        file = grown;
        drop(leases);
        if let Some((digest, epoch)) = end {
            return super::commit(disk.store.clone(), digest, Visibility::Public, file, epoch).await;
        }
    }
}

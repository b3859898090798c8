//! A copy of an upload on its way into the tier. The upload never waits for the disk: what comes faster than it is written waits within
//! `disk.write_behind`, and when that is used up the copy is given up.

use super::{Disk, store::Accepted};
use crate::metrics::Skip;
use bytes::Bytes;
use castier_blob::{Digest, Verified};
use std::sync::{Arc, atomic::Ordering};
use tokio::sync::mpsc;

/// How many parts are written at once.
const BATCH: usize = 64;

/// The sending end of a copy. Dropped before [`Self::keep`], it leaves nothing.
pub struct DiskCopy {
    disk: Arc<Disk>,
    /// What comes next, within `disk.write_behind`.
    parts: mpsc::UnboundedSender<Next>,
    /// What was taken so far.
    size: u64,
}

enum Next {
    Part(Bytes, Held),
    /// All bytes are there, and the blob shall be kept.
    End(Digest, Accepted),
}

/// A part of `disk.write_behind`.
struct Held {
    disk: Arc<Disk>,
    bytes: u64,
}

impl Held {
    fn take(disk: &Arc<Disk>, bytes: u64) -> Option<Self> {
        disk.behind.take(bytes).then(|| Self { disk: disk.clone(), bytes })
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.disk.behind.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl Disk {
    /// Begins a copy. Ask [`Self::admits`] first.
    pub fn copy(self: &Arc<Self>) -> DiskCopy {
        let (parts, next) = mpsc::unbounded_channel();
        tokio::spawn(write(self.clone(), next));
        DiskCopy { disk: self.clone(), parts, size: 0 }
    }
}

impl DiskCopy {
    /// Takes the next bytes, without waiting for anything; none if the copy had to be given up.
    #[must_use]
    pub fn take(mut self, part: Bytes) -> Option<Self> {
        let Some(held) = Held::take(&self.disk, part.len() as u64) else {
            self.disk.store.metrics.disk_skipped(Skip::Queue);
            return None;
        };
        self.size += part.len() as u64;
        // The other end is gone if the disk has failed, which is counted there.
        self.parts.send(Next::Part(part, held)).is_ok().then_some(self)
    }

    /// Keeps the copy, as soon as it is written. What is forgotten from now on is not kept.
    pub fn keep(copy: Verified<Self>) {
        let (digest, size) = (copy.digest(), copy.size());
        let copy = copy.into_content();
        if size != copy.size {
            tracing::error!(%digest, size, copied = copy.size, "the copy of an upload is not as long as the upload, and is not kept");
            return;
        }
        let accepted = copy.disk.store.accept(&digest);
        copy.parts.send(Next::End(digest, accepted)).ok();
    }
}

/// The receiving end.
async fn write(disk: Arc<Disk>, mut next: mpsc::UnboundedReceiver<Next>) {
    // Until all is done: the end of the process waits for it, for a while.
    let Some(_held) = Held::take(&disk, super::WAITS) else { return disk.store.metrics.disk_skipped(Skip::Queue) };
    let Some(mut file) = disk.file(Vec::new()).await else { return };
    let mut batch = Vec::with_capacity(BATCH);
    while next.recv_many(&mut batch, BATCH).await > 0 {
        let (mut parts, mut held, mut end) = (Vec::with_capacity(batch.len()), Vec::with_capacity(batch.len()), None);
        for next in batch.drain(..) {
            match next {
                Next::Part(part, hold) => {
                    parts.push(part);
                    held.push(hold);
                }
                Next::End(digest, accepted) => end = Some((digest, accepted)),
            }
        }
        let Some(grown) = file.grow(parts).await else { return };
        file = grown;
        drop(held);
        if let Some((digest, accepted)) = end {
            return super::place(disk.store.clone(), digest, file, accepted).await;
        }
    }
}

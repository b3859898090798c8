//! The writing side of a flight: the sink of its verifier. Bytes go to the flight's readers at once, and to the spool's file, if it has one, behind
//! them: the source is read on while another thread writes.
//!
//! Invariants:
//! - One write at a time, in the order of the bytes. So a file has a front of the blob and never a hole, and the checksums of the disk tier's file see
//!   every byte once.
//! - What the file lacks is in the spool's window: one batch that is being written, and one that gathers. A source that is faster than the disk waits.
//!   Without a window nothing gathers.

use super::{Admit, BATCH, Spools};
use crate::{
    disk::{Disk, DiskFile},
    fault::Fault,
    flights::Flight,
    tiers::Tiers,
    via::Owner,
};
use bytes::Bytes;
use castier_blob::Sink;
use futures::{FutureExt, future::BoxFuture};
use std::{convert::Infallible, sync::Arc};

/// After so many bytes the writer yields to the readers' tasks. A source that always has more at hand would keep them waiting; yielding for each chunk
/// would cost as much as the chunk.
const YIELD_AFTER: u64 = BATCH / 2;

/// Puts bytes at the end of a flight's spool, and moves the spool to a file when they become too many for memory: to a file of the disk tier, which can
/// keep it with a rename, or else to a file without a name.
pub(crate) struct SpoolWriter {
    spools: Arc<Spools>,
    tiers: Tiers,
    flight: Arc<Flight>,
    /// The disk tier's file, while the bytes go there and no write has it.
    tier_file: Option<Box<DiskFile>>,
    under_way: Option<BoxFuture<'static, Written>>,
    /// The offset where the bytes end that were given to a write.
    given: u64,
    /// Whether the spool may use the disk tier's file.
    use_tier: UseTier,
    /// The file that held the front of the blob can neither be written nor read any more.
    lost: bool,
}

/// Whether a spool may go to a file of the disk tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum UseTier {
    /// If the tier takes the blob.
    IfItTakes,
    /// The tier has failed this flight.
    No,
}

/// What holds a blob that a flight has brought.
pub(crate) enum Landed {
    /// One piece of memory.
    Memory(Bytes),
    /// A file of the disk tier.
    File(Box<DiskFile>),
    /// A file without a name, which no tier can keep.
    Unnamed,
}

impl Landed {
    pub(crate) fn memory(self) -> Option<Bytes> {
        if let Self::Memory(bytes) = self { Some(bytes) } else { None }
    }

    pub(crate) fn file(self) -> Option<DiskFile> {
        if let Self::File(file) = self { Some(*file) } else { None }
    }
}

/// How a write ended.
enum Written {
    /// The disk tier's file; none if it could not be written.
    Tier(Option<Box<DiskFile>>),
    Unnamed(Result<(), Fault>),
}

impl SpoolWriter {
    pub(crate) fn new(spools: Arc<Spools>, tiers: Tiers, flight: Arc<Flight>, use_tier: UseTier) -> Self {
        Self { spools, tiers, flight, tier_file: None, under_way: None, given: 0, use_tier, lost: false }
    }

    /// Whether bytes that came are gone, so that they must be fetched once more.
    pub(crate) const fn has_lost(&self) -> bool {
        self.lost
    }

    /// Prepares the spool for `more` bytes: leases what they need, and opens a file if they are too many for memory.
    pub(crate) async fn admit(&mut self, more: u64) -> Result<(), Fault> {
        loop {
            let admitted = self.flight.state.lock().spool.admit(&self.spools, more);
            match admitted? {
                Admit::Memory | Admit::File => return Ok(()),
                Admit::NeedsFile => self.open_file().await?,
            }
        }
    }

    /// Lets the file catch up after bytes were written, as far as it must.
    pub(crate) async fn catch_up(&mut self, just_written: u64) -> Result<(), Fault> {
        let (length, backlog) = {
            let spool = &self.flight.state.lock().spool;
            (spool.length(), spool.backlog())
        };
        let Some(most) = backlog else { return Ok(()) };
        let gathered = length - self.given;
        if gathered / YIELD_AFTER != (gathered - just_written) / YIELD_AFTER {
            tokio::task::yield_now().await;
        }
        if most == 0 {
            self.settle().await?;
            self.begin_write(1);
            self.settle().await?;
        } else if gathered >= most {
            self.settle().await?;
            self.begin_write(BATCH);
        }
        Ok(())
    }

    /// Waits until the file, if there is one, has everything.
    pub(crate) async fn flush(&mut self) -> Result<(), Fault> {
        loop {
            self.settle().await?;
            if !self.begin_write(1) {
                return Ok(());
            }
        }
    }

    /// Moves a spool that is in memory to a file.
    async fn open_file(&mut self) -> Result<(), Fault> {
        let (parts, len, size, owner) = {
            let state = self.flight.state.lock();
            (state.spool.in_memory(), state.spool.length(), state.size, state.owner)
        };
        let may_use_tier = owner == Owner::ThisNode && self.use_tier == UseTier::IfItTakes;
        let size = size.unwrap_or(len);
        let admits = |disk: &Disk| self.flight.key.digest().map_or_else(|| disk.takes(size), |digest| disk.admits(&digest, size));
        let tier = self.tiers.disk.as_ref().filter(|disk| may_use_tier && admits(disk));
        self.tier_file = match tier {
            Some(disk) => disk.file(parts.clone()).await.map(Box::new),
            None => None,
        };
        let file = match &self.tier_file {
            Some(tier) => tier.file().clone(),
            None => self.spools.files.make(parts).await?,
        };
        self.given = len;
        let mut state = self.flight.state.lock();
        state.in_tier_file = self.tier_file.is_some();
        state.spool.move_to_file(&self.spools, file)
    }

    /// Begins to write what the file lacks, up to a multiple of `unit`; false if that is nothing. No other write may be under way.
    fn begin_write(&mut self, unit: u64) -> bool {
        let (unwritten, to) = {
            let spool = &self.flight.state.lock().spool;
            let to = spool.length() / unit * unit;
            (spool.unwritten(to), to)
        };
        let Some((file, at, parts)) = unwritten else { return false };
        self.given = to;
        self.under_way = Some(match self.tier_file.take() {
            Some(tier) => tier.grow(parts).map(|tier| Written::Tier(tier.map(Box::new))).boxed(),
            None => self.spools.files.write(&file, parts, at).map(Written::Unnamed).boxed(),
        });
        true
    }

    /// Waits for the write under way.
    async fn settle(&mut self) -> Result<(), Fault> {
        let Some(write) = self.under_way.take() else { return Ok(()) };
        match write.await {
            Written::Tier(Some(tier)) => self.tier_file = Some(tier),
            Written::Unnamed(written) => written?,
            Written::Tier(None) => return self.leave_tier().await,
        }
        self.flight.state.lock().spool.wrote(self.given);
        Ok(())
    }

    /// The disk tier's file system is full or broken. That costs a cache entry, and never a request: what could be written moves to a file without a
    /// name, where the rest follows.
    async fn leave_tier(&mut self) -> Result<(), Fault> {
        let (file, written) = {
            let state = self.flight.state.lock();
            (state.spool.file(), state.spool.written())
        };
        let Some(file) = file else { return Err(Fault::Internal("a write without a file".into())) };
        let elsewhere = self.spools.files.copy(&file, written).await.inspect_err(|_| self.lost = true)?;
        self.given = written;
        // Readers that could not read the old file wait for this.
        self.flight.update(|state| {
            state.in_tier_file = false;
            state.spool.move_to_file(&self.spools, elsewhere)
        })
    }
}

impl Sink for SpoolWriter {
    type Content = Landed;
    type Error = Infallible;

    /// Readers have the bytes when this returns; most often the file has not. Call [`Self::admit`] first, and [`Self::catch_up`] afterwards.
    fn write(&mut self, bytes: &Bytes) -> Result<(), Infallible> {
        self.flight.update(|state| state.spool.push(bytes.clone()));
        Ok(())
    }

    fn close(self) -> Landed {
        // Joined off the lock: the fill is the only writer.
        let parts = self.flight.state.lock().spool.parts();
        match (parts, self.tier_file) {
            (Some(parts), _) => Landed::Memory(super::join(parts)),
            (None, Some(file)) => Landed::File(file),
            (None, None) => Landed::Unnamed,
        }
    }
}

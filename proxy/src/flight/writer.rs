//! The writing side of a flight. Bytes go to its readers at once, and to its spool's file, if it has one, behind them: the source is read
//! on while another thread writes.
//!
//! Invariants:
//! - One write at a time, in the order of the bytes. So a file has a front of the blob and never a hole, and the checksums of the disk
//!   tier's file see every byte once.
//! - What the file lacks is in the spool's window: one batch that is being written and one that gathers. A source that is faster
//!   than the disk waits. Without a window nothing gathers.

use super::{Flight, Flights};
use crate::{
    disk::DiskFile,
    fault::Fault,
    spool::{Admit, BATCH},
};
use bytes::Bytes;
use futures::{FutureExt, future::BoxFuture};

/// After so many bytes it is the readers' turn: a source that always has more at hand would keep them waiting for long, and one turn for
/// each chunk costs as much as the chunk.
const TURN: u64 = BATCH / 2;

/// Puts bytes at the end of a flight's spool, and moves it to a file when they become too many for memory: to a file of the disk tier, which
/// can keep it as it is, or else to one without a name.
#[derive(Default)]
pub(super) struct Writer {
    /// The disk tier's file, while the bytes go there and no write has it.
    kept: Option<Box<DiskFile>>,
    under_way: Option<BoxFuture<'static, Wrote>>,
    /// Where the bytes end that were given to a write.
    given: u64,
    /// The disk tier has failed this flight.
    without_tier: bool,
    /// The front of the blob was in a file that can neither be written nor read any more.
    lost: bool,
}

/// What a write came to.
enum Wrote {
    /// The disk tier's file; none if it could not be written.
    Kept(Option<Box<DiskFile>>),
    Unnamed(Result<(), Fault>),
}

impl Writer {
    /// One that begins anew, after another has [lost](Self::has_lost) what it had.
    pub(super) fn without_tier() -> Self {
        Self { without_tier: true, ..Self::default() }
    }

    /// Whether bytes that came are gone, so that they must be fetched once more.
    pub(super) const fn has_lost(&self) -> bool {
        self.lost
    }

    /// Takes the next bytes. Readers have them when this returns, and most often the file has not.
    pub(super) async fn append(&mut self, flights: &Flights, flight: &Flight, chunk: Bytes) -> Result<(), Fault> {
        let len = chunk.len() as u64;
        let window = loop {
            let admitted = flight.state.lock().spool.admit(&flights.room, len);
            match admitted? {
                Admit::Memory => {
                    flight.update(|state| state.spool.push(chunk));
                    return Ok(());
                }
                Admit::File { window } => break window,
                Admit::NeedsFile => self.open_file(flights, flight).await?,
            }
        };
        let gathered = flight.update(|state| {
            state.spool.push(chunk);
            state.spool.length() - self.given
        });
        if gathered / TURN != (gathered - len) / TURN {
            tokio::task::yield_now().await;
        }
        if !window {
            self.settle(flights, flight).await?;
            self.write(flights, flight, 1);
            self.settle(flights, flight).await?;
        } else if gathered >= BATCH {
            self.settle(flights, flight).await?;
            self.write(flights, flight, BATCH);
        }
        Ok(())
    }

    /// Waits until the file, if there is one, has everything. Gives back the disk tier's, if it is that.
    pub(super) async fn finish(&mut self, flights: &Flights, flight: &Flight) -> Result<Option<DiskFile>, Fault> {
        loop {
            self.settle(flights, flight).await?;
            if !self.write(flights, flight, 1) {
                return Ok(self.kept.take().map(|tier| *tier));
            }
        }
    }

    /// Moves a spool that is in memory to a file.
    async fn open_file(&mut self, flights: &Flights, flight: &Flight) -> Result<(), Fault> {
        let (parts, len, size, foreign) = {
            let state = flight.state.lock();
            (state.spool.in_memory(), state.spool.length(), state.size, state.leg.is_foreign())
        };
        self.kept = match flights
            .tiers
            .disk
            .as_ref()
            .filter(|disk| !foreign && !self.without_tier && disk.admits(&flight.digest, size.unwrap_or(len)))
        {
            Some(disk) => disk.file(parts.clone()).await.map(Box::new),
            None => None,
        };
        let file = match &self.kept {
            Some(tier) => tier.file().clone(),
            None => flights.room.files.make(parts).await?,
        };
        self.given = len;
        let mut state = flight.state.lock();
        state.on_tier_file = self.kept.is_some();
        state.spool.move_to_file(&flights.room, file)
    }

    /// Begins to write what the file has not, up to a multiple of `unit`; false if that is nothing. No other write may be under way.
    fn write(&mut self, flights: &Flights, flight: &Flight, unit: u64) -> bool {
        let (unwritten, to) = {
            let spool = &flight.state.lock().spool;
            let to = spool.length() / unit * unit;
            (spool.unwritten(to), to)
        };
        let Some((file, at, parts)) = unwritten else { return false };
        self.given = to;
        self.under_way = Some(match self.kept.take() {
            Some(tier) => tier.grow(parts).map(|tier| Wrote::Kept(tier.map(Box::new))).boxed(),
            None => flights.room.files.write(&file, parts, at).map(Wrote::Unnamed).boxed(),
        });
        true
    }

    /// Waits for the write under way.
    async fn settle(&mut self, flights: &Flights, flight: &Flight) -> Result<(), Fault> {
        let Some(write) = self.under_way.take() else { return Ok(()) };
        match write.await {
            Wrote::Kept(Some(tier)) => self.kept = Some(tier),
            Wrote::Unnamed(written) => written?,
            Wrote::Kept(None) => return self.go_elsewhere(flights, flight).await,
        }
        flight.state.lock().spool.wrote(self.given);
        Ok(())
    }

    /// The disk tier's file system is full or broken. That costs a cache entry, and never a request: what could be written moves to a file
    /// without a name, where the rest will follow.
    async fn go_elsewhere(&mut self, flights: &Flights, flight: &Flight) -> Result<(), Fault> {
        let (file, written) = {
            let state = flight.state.lock();
            (state.spool.file(), state.spool.written())
        };
        let Some(file) = file else { return Err(Fault::Internal("a write without a file".into())) };
        let elsewhere = flights.room.files.copy(&file, written).await.inspect_err(|_| self.lost = true)?;
        self.given = written;
        let mut state = flight.state.lock();
        state.on_tier_file = false;
        state.spool.move_to_file(&flights.room, elsewhere)
    }
}

//! What a request sees of a flight.

use super::{Asker, Flight, Flights, HOLD_BACK, Joined, Phase, course::Leg};
use crate::{
    fault::Fault,
    spool::{PIECE, Piece},
};
use bytes::Bytes;
use std::sync::{Arc, atomic::Ordering};
use tokio::sync::watch;

/// One request's view of a flight: an offset into its spool.
pub struct Reader {
    flights: Arc<Flights>,
    flight: Arc<Flight>,
    tick: watch::Receiver<()>,
    asker: Asker,
    follower: bool,
    /// The whole blob, where that was found after the flight's file had failed.
    whole: Option<Bytes>,
    /// This reader has been on another flight, whose file failed.
    moved: bool,
    /// Offset of the next byte.
    at: u64,
    /// Where this response ends; none while the blob's length is not known.
    end: Option<u64>,
}

/// What a reader can be told before it reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opened {
    /// The origin says that there is no such blob.
    Absent,
    /// The blob's bytes can be read, and this is its size, unless it streams with none announced.
    Blob(Option<u64>),
}

impl Reader {
    /// Call under the map's lock, where flights cannot be abandoned.
    pub(super) fn new(flights: &Arc<Flights>, flight: Arc<Flight>, asker: Asker, follower: bool) -> Self {
        flight.readers.fetch_add(1, Ordering::AcqRel);
        if follower {
            flights.metrics.flight_followers.inc();
        }
        let tick = flight.tick.subscribe();
        Self { flights: flights.clone(), tick, flight, asker, follower, whole: None, moved: false, at: 0, end: None }
    }

    /// Waits until the response can begin: the blob has verified, or it is too large to wait for and bytes of the wanted part can leave.
    /// `part` picks first offset and end, given the size. With `need_size`, a blob of unknown length is waited for.
    ///
    /// # Errors
    /// The flight's fault.
    pub async fn open(&mut self, need_size: bool, part: impl Fn(Option<u64>) -> (u64, Option<u64>)) -> Result<Opened, Fault> {
        loop {
            if let Some(opened) = self.try_open(need_size, &part)? {
                return Ok(opened);
            }
            self.changed().await?;
        }
    }

    fn try_open(&mut self, need_size: bool, part: impl Fn(Option<u64>) -> (u64, Option<u64>)) -> Result<Option<Opened>, Fault> {
        let mut state = self.flight.state.lock();
        match &state.phase {
            Phase::Opening => Ok(None),
            Phase::Absent => Ok(Some(Opened::Absent)),
            Phase::Failed(fault) => Err(fault.clone()),
            Phase::Verified => {
                let size = state.spool.length();
                let (first, end) = part(Some(size));
                (self.at, self.end) = (first, Some(end.unwrap_or(size)));
                Ok(Some(Opened::Blob(Some(size))))
            }
            Phase::Filling => {
                let known = state.size.unwrap_or(state.spool.length());
                if known <= self.flights.buffer_up_to || (need_size && state.size.is_none()) {
                    return Ok(None);
                }
                let (first, end) = part(state.size);
                let nothing = end == Some(first);
                let may_leave = end
                    .map_or(state.spool.length().saturating_sub(HOLD_BACK), |end| end.saturating_sub(HOLD_BACK).min(state.spool.length()));
                if !nothing && may_leave <= first {
                    return Ok(None);
                }
                state.released |= !nothing;
                (self.at, self.end) = (first, end);
                Ok(Some(Opened::Blob(state.size)))
            }
        }
    }

    /// The next bytes of the response, at most [`PIECE`]; none at its end.
    ///
    /// # Errors
    /// The flight's fault: the response must then be cut.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Fault> {
        loop {
            if let Some(whole) = &self.whole {
                let at = usize::try_from(self.at).unwrap_or(usize::MAX).min(whole.len());
                let end = self.end.and_then(|end| usize::try_from(end).ok()).unwrap_or(whole.len());
                let bytes = whole.slice(at..end.min(at + PIECE).min(whole.len()).max(at));
                self.at += bytes.len() as u64;
                return Ok((!bytes.is_empty()).then_some(bytes));
            }
            let (piece, at) = {
                let state = self.flight.state.lock();
                let len = state.spool.length();
                let limit = match &state.phase {
                    Phase::Failed(fault) => return Err(fault.clone()),
                    Phase::Verified => self.end.unwrap_or(len),
                    _ => self.end.map_or(len.saturating_sub(HOLD_BACK), |end| end.saturating_sub(HOLD_BACK).min(len)),
                };
                if matches!(state.phase, Phase::Verified) && self.at >= limit {
                    return Ok(None);
                }
                (limit.checked_sub(self.at).filter(|n| *n > 0).map(|n| state.spool.read(self.at, n)), self.at)
            };
            let bytes = match piece {
                Some(Piece::Memory(bytes)) => bytes,
                Some(Piece::File(file, len)) => match self.flights.room.files.read(file, at, len).await {
                    Ok(bytes) => bytes,
                    Err(fault) => {
                        // Boxed, so that no reader carries what so few need.
                        Box::pin(self.file_failed(fault)).await?;
                        continue;
                    }
                },
                None => {
                    self.changed().await?;
                    continue;
                }
            };
            self.at += bytes.len() as u64;
            return Ok(Some(bytes));
        }
    }

    /// The flight's file cannot be read. While the flight goes on, that is for its fill to see to, which meets the same when it writes. If it
    /// has ended, the rest comes from another flight, like any blob that is asked for.
    async fn file_failed(&mut self, fault: Fault) -> Result<(), Fault> {
        let (ended, digest) = (matches!(self.flight.state.lock().phase, Phase::Verified), self.flight.digest);
        if !ended {
            return self.changed().await;
        }
        if self.moved {
            return Err(fault);
        }
        tracing::debug!(%digest, %fault, at = self.at, "the file of a blob on its way cannot be read; going on from elsewhere");
        let (flights, metrics) = (self.flights.clone(), self.flights.metrics.clone());
        flights.give_up_file(&self.flight);
        // A get of its own, so that the ledger balances.
        metrics.gets.inc();
        if self.asker == Asker::Peer {
            metrics.gets_from_peers.inc();
        }
        let mut next = match flights.join(&digest, self.asker, true) {
            Joined::Kept(bytes, tier) => {
                metrics.hit(tier);
                if self.asker == Asker::Peer {
                    metrics.hits_from_peers.inc();
                }
                self.whole = Some(bytes);
                return Ok(());
            }
            Joined::OnDisk => return Err(fault),
            Joined::Led(reader) => {
                metrics.flights.inc();
                reader
            }
            Joined::Followed(reader) => {
                metrics.collapsed.inc();
                reader
            }
        };
        metrics.loads.inc();
        let part = (self.at, self.end);
        if next.open(self.end.is_some(), |_| part).await? == Opened::Absent {
            return Err(Fault::Unusable { source_name: "origin", why: "the blob is gone".into() });
        }
        next.moved = true;
        *self = next;
        Ok(())
    }

    /// Whether the bytes come from another node just now.
    pub fn from_peer(&self) -> bool {
        !matches!(self.flight.state.lock().leg, Leg::Origin)
    }

    /// Whether a tier has the blob, or will have it once it has verified, as far as that depends on this node's limits. False where that
    /// cannot be known. Of a blob that is on its way to memory, this leases memory for the rest: so what is said here stays true.
    pub fn is_stored(&self) -> bool {
        let mut state = self.flight.state.lock();
        if matches!(state.phase, Phase::Verified) {
            return state.kept;
        }
        let (Some(size), foreign, tiers) = (state.size, state.leg.is_foreign(), &self.flights.tiers) else { return false };
        if state.spool.file().is_some() {
            return state.on_tier_file && !foreign;
        }
        tiers.memory_takes(size, foreign) && state.spool.reserve(size) || tiers.disk_keeps(&self.flight.digest, size, foreign)
    }

    /// Stays with the flight to its end, reading nothing: keeps it from being abandoned.
    ///
    /// # Errors
    /// The flight's fault.
    pub async fn finished(&mut self) -> Result<(), Fault> {
        loop {
            match &self.flight.state.lock().phase {
                Phase::Verified | Phase::Absent => return Ok(()),
                Phase::Failed(fault) => return Err(fault.clone()),
                Phase::Opening | Phase::Filling => {}
            }
            self.changed().await?;
        }
    }

    async fn changed(&mut self) -> Result<(), Fault> {
        self.tick.changed().await.map_err(|_| Fault::Internal("the flight is gone".into()))
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        if self.follower {
            self.flights.metrics.flight_followers.dec();
        }
        if self.flight.readers.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.flight.nudge.notify_one();
        }
    }
}

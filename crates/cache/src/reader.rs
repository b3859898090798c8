//! What a get returns: how the blob was found, and a reader of the wanted part.

use crate::{
    buffer,
    cache::Cache,
    disk::DiskBlob,
    fault::Fault,
    flights::{Asker, Flight, HOLD_BACK, Phase, State},
    resource::{Key, Location, Resource},
    spool::Piece,
    via::{Owner, Tier, Via},
};
use bytes::Bytes;
use std::{
    ops::Range,
    sync::{Arc, atomic::Ordering},
};
use tokio::sync::watch;

/// The most bytes that a reader returns at once, and so the most that a slow client holds of a blob that is not in memory.
pub const PIECE: usize = buffer::SIZE;

/// A blob that was found, or is on its way.
pub struct Hit {
    /// The blob's size; none while it streams from a source that does not tell it.
    pub size: Option<u64>,
    /// How it was found.
    pub via: Via,
    /// The wanted part.
    pub reader: Reader,
}

/// The part of a blob that a request wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// All bytes.
    Whole,
    /// These bytes, which the blob must have.
    Bytes(Range<u64>),
    /// The request can tell only when the size is known. An answer to the question with a size must not be this.
    AfterSize,
}

impl Part {
    /// The offsets of the part of a blob of this size.
    fn range(self, size: u64) -> Range<u64> {
        match self {
            Self::Bytes(range) => range,
            Self::Whole | Self::AfterSize => 0..size,
        }
    }
}

/// Reads a part of a blob. If the disk fails, it goes on at the same offset from the next place that has the blob, most often a flight. The client
/// notices a pause at most.
pub enum Reader {
    /// From memory: the rest of the part.
    Memory(Bytes),
    /// From the disk.
    Disk(DiskReader),
    /// From a flight, as the bytes come.
    Flight(FlightReader),
}

impl Hit {
    /// A blob that is in memory.
    pub(crate) fn memory(bytes: Bytes, tier: Tier, part: impl Fn(Option<u64>) -> Part) -> Self {
        let size = bytes.len() as u64;
        let reader = Reader::Memory(match part(Some(size)) {
            Part::Bytes(range) => bytes.slice(range.start as usize..range.end as usize),
            Part::Whole | Part::AfterSize => bytes,
        });
        Self { size: Some(size), via: Via::Tier(tier), reader }
    }

    /// A blob that is on the disk.
    pub(crate) fn disk(
        cache: &Arc<Cache>,
        at: &Arc<dyn Location>,
        blob: Arc<DiskBlob>,
        asker: Asker,
        part: impl Fn(Option<u64>) -> Part,
    ) -> Self {
        let size = blob.size();
        let range = part(Some(size)).range(size);
        let reader = DiskReader { cache: cache.clone(), at: at.clone(), asker, blob, left: range };
        Self { size: Some(size), via: Via::Tier(Tier::Disk), reader: Reader::Disk(reader) }
    }
}

impl Reader {
    /// The next bytes, at most [`PIECE`]; none at the end of the part.
    ///
    /// # Errors
    /// No place can give the rest. The response must be cut.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Fault> {
        loop {
            // Boxed, so that no reader carries the state of what hardly ever happens.
            *self = match self {
                Self::Memory(rest) => {
                    let piece = rest.split_to(rest.len().min(PIECE));
                    return Ok((!piece.is_empty()).then_some(piece));
                }
                Self::Disk(reader) => match reader.next().await {
                    Some(piece) => return Ok(piece),
                    None => Box::pin(reader.go_on_elsewhere()).await?,
                },
                Self::Flight(reader) => match reader.next().await? {
                    Read::Piece(piece) => return Ok(piece),
                    Read::FileLost(fault) => Box::pin(reader.go_on_elsewhere(fault)).await?,
                },
            };
        }
    }
}

/// Reads a part of a blob from the disk.
pub struct DiskReader {
    cache: Arc<Cache>,
    /// Where the rest is looked for if the disk fails.
    at: Arc<dyn Location>,
    asker: Asker,
    blob: Arc<DiskBlob>,
    /// What is still to be read.
    left: Range<u64>,
}

impl DiskReader {
    /// The next piece, or the end; none if the disk can no longer give the blob.
    async fn next(&mut self) -> Option<Option<Bytes>> {
        if self.left.is_empty() {
            return Some(None);
        }
        let most = usize::try_from(self.left.end - self.left.start).unwrap_or(usize::MAX).min(PIECE);
        let piece = self.blob.read(self.left.start, most).await.ok()?;
        self.left.start += piece.len() as u64;
        Some(Some(piece))
    }

    async fn go_on_elsewhere(&self) -> Result<Reader, Fault> {
        let digest = self.blob.digest();
        if self.cache.tiers.disk.as_ref().is_some_and(|disk| disk.answers()) {
            tracing::warn!(%digest, at = self.left.start, "the disk failed; the answer goes on from elsewhere");
        }
        let left = self.left.clone();
        let resource = Resource { key: Key::Blob(digest), at: self.at.clone() };
        self.cache.get_past_disk(&resource, self.asker, |_| Part::Bytes(left.clone())).await
    }
}

/// One request's view of a flight: an offset into its spool.
pub struct FlightReader {
    cache: Arc<Cache>,
    flight: Arc<Flight>,
    changed: watch::Receiver<()>,
    asker: Asker,
    /// Another request had started the flight.
    collapsed: bool,
    /// This request has read another flight before, whose file failed.
    moved: bool,
    /// Offset of the next byte.
    at: u64,
    /// The offset at which the part ends; none while the blob's size is not known.
    end: Option<u64>,
}

enum Read {
    /// The next piece, or the end.
    Piece(Option<Bytes>),
    /// The flight has ended, and its file cannot be read any more.
    FileLost(Fault),
}

impl FlightReader {
    /// The reader of the request that starts the flight. Call it under the map's lock, where flights cannot be abandoned.
    pub(crate) fn lead(cache: &Arc<Cache>, flight: Arc<Flight>, asker: Asker) -> Self {
        Self::new(cache, flight, asker, false)
    }

    /// The reader of a request that joins the flight. Call it as [`Self::lead`].
    pub(crate) fn follow(cache: &Arc<Cache>, flight: Arc<Flight>, asker: Asker) -> Self {
        cache.metrics.flight_followers.inc();
        Self::new(cache, flight, asker, true)
    }

    fn new(cache: &Arc<Cache>, flight: Arc<Flight>, asker: Asker, collapsed: bool) -> Self {
        flight.readers.fetch_add(1, Ordering::AcqRel);
        let changed = flight.changed.subscribe();
        Self { cache: cache.clone(), flight, changed, asker, collapsed, moved: false, at: 0, end: None }
    }

    /// Whether the flight was begun for this location.
    pub(crate) fn is_at(&self, at: &Arc<dyn Location>) -> bool {
        Arc::ptr_eq(&self.flight.at, at)
    }

    /// Whether the flight asks another location than the one with this [`Location::id`].
    pub(crate) fn is_elsewhere(&self, location: u64) -> bool {
        self.flight.at.id() != location
    }

    /// Waits until the response can begin: the blob has verified, or it is too large to wait for and bytes of the wanted part can leave. `None`: the
    /// blob is absent.
    ///
    /// # Errors
    /// The flight's fault.
    pub(crate) async fn open(mut self, part: impl Fn(Option<u64>) -> Part) -> Result<Option<Hit>, Fault> {
        loop {
            match self.try_open(&part)? {
                Opened::NotYet => self.wait().await?,
                Opened::Absent => return Ok(None),
                Opened::At { size, via } => return Ok(Some(Hit { size, via, reader: Reader::Flight(self) })),
            }
        }
    }

    fn try_open(&mut self, part: impl Fn(Option<u64>) -> Part) -> Result<Opened, Fault> {
        let flight = self.flight.clone();
        let mut state = flight.state.lock();
        let size = match &state.phase {
            Phase::Opening => return Ok(Opened::NotYet),
            Phase::Absent => return Ok(Opened::Absent),
            Phase::Failed(fault) => return Err(fault.clone()),
            Phase::Verified => {
                let size = state.spool.length();
                let range = part(Some(size)).range(size);
                (self.at, self.end) = (range.start, Some(range.end));
                Some(size)
            }
            Phase::Filling => {
                let known = state.size.unwrap_or(state.spool.length());
                if known <= self.cache.buffer_up_to {
                    return Ok(Opened::NotYet);
                }
                let (first, end) = match (part(state.size), state.size) {
                    (Part::AfterSize, None) => return Ok(Opened::NotYet),
                    (part, Some(size)) => {
                        let range = part.range(size);
                        (range.start, Some(range.end))
                    }
                    (Part::Bytes(range), None) => (range.start, Some(range.end)),
                    (Part::Whole, None) => (0, None),
                };
                let is_empty = end == Some(first);
                if !is_empty && may_leave(state.spool.length(), end) <= first {
                    return Ok(Opened::NotYet);
                }
                state.released |= !is_empty;
                (self.at, self.end) = (first, end);
                state.size
            }
        };
        let kept = self.will_be_kept(&mut state);
        Ok(Opened::At { size, via: Via::Flight { from: state.from, collapsed: self.collapsed, kept } })
    }

    /// Whether a tier has the blob, or will have it once it has verified, as far as that depends on this node's limits. False where that cannot be
    /// known. Of a blob that is on its way to memory, this leases memory for the rest, so that the answer stays true.
    fn will_be_kept(&self, state: &mut State) -> bool {
        if matches!(state.phase, Phase::Verified) {
            return state.kept;
        }
        let (Some(size), owner, tiers) = (state.size, state.owner, &self.cache.tiers) else { return false };
        if state.spool.file().is_some() {
            return state.in_tier_file && owner == Owner::ThisNode;
        }
        let disk_keeps = || match self.flight.key {
            Key::Blob(digest) => tiers.disk_keeps(&digest, size, owner),
            Key::Name(_) => owner == Owner::ThisNode && tiers.disk.as_ref().is_some_and(|disk| disk.takes(size)),
        };
        tiers.memory_takes(size, owner) && state.spool.reserve(size) || disk_keeps()
    }

    async fn next(&mut self) -> Result<Read, Fault> {
        loop {
            let piece = {
                let state = self.flight.state.lock();
                let len = state.spool.length();
                let limit = match &state.phase {
                    Phase::Failed(fault) => return Err(fault.clone()),
                    Phase::Absent => return Err(Fault::Internal("a flight that gave bytes ended as absent".into())),
                    Phase::Verified => {
                        let end = self.end.unwrap_or(len);
                        if self.at >= end {
                            return Ok(Read::Piece(None));
                        }
                        end
                    }
                    Phase::Opening | Phase::Filling => may_leave(len, self.end),
                };
                limit.checked_sub(self.at).filter(|left| *left > 0).map(|left| state.spool.read(self.at, left))
            };
            let bytes = match piece {
                Some(Piece::Memory(bytes)) => bytes,
                Some(Piece::File(file, len)) => match self.cache.spools.files.read(file.clone(), self.at, len).await {
                    Ok(bytes) => bytes,
                    Err(fault) => {
                        let (is_current, is_verified) = {
                            let state = self.flight.state.lock();
                            let is_current = state.spool.file().is_some_and(|current| Arc::ptr_eq(&current, &file));
                            (is_current, matches!(state.phase, Phase::Verified))
                        };
                        match (is_current, is_verified) {
                            (true, true) => return Ok(Read::FileLost(fault)),
                            // The fill meets the same when it writes, and sees to it.
                            (true, false) => self.wait().await?,
                            // It has: the bytes are in another file by now.
                            (false, _) => {}
                        }
                        continue;
                    }
                },
                None => {
                    self.wait().await?;
                    continue;
                }
            };
            self.at += bytes.len() as u64;
            return Ok(Read::Piece(Some(bytes)));
        }
    }

    /// The flight has ended, and its file has failed: the rest comes from memory or from another flight.
    async fn go_on_elsewhere(&self, fault: Fault) -> Result<Reader, Fault> {
        if self.moved {
            return Err(fault);
        }
        let key = self.flight.key;
        tracing::debug!(%key, %fault, at = self.at, "the file of a flight cannot be read; the answer goes on from elsewhere");
        // Nobody shall join it any more.
        self.cache.flights.take_out(&self.flight);
        let end = self.end.unwrap_or_else(|| self.flight.state.lock().spool.length());
        // The other flight of a name may bring another body.
        let Key::Blob(_) = key else { return Err(fault) };
        let resource = Resource { key, at: self.flight.at.clone() };
        let mut reader = self.cache.get_past_disk(&resource, self.asker, |_| Part::Bytes(self.at..end)).await?;
        if let Reader::Flight(reader) = &mut reader {
            reader.moved = true;
        }
        Ok(reader)
    }

    /// Stays with the flight to its end, reading nothing, so that it is not abandoned.
    ///
    /// # Errors
    /// The flight's fault.
    pub(crate) async fn finished(&mut self) -> Result<(), Fault> {
        loop {
            match &self.flight.state.lock().phase {
                Phase::Verified | Phase::Absent => return Ok(()),
                Phase::Failed(fault) => return Err(fault.clone()),
                Phase::Opening | Phase::Filling => {}
            }
            self.wait().await?;
        }
    }

    async fn wait(&mut self) -> Result<(), Fault> {
        self.changed.changed().await.map_err(|_| Fault::Internal("the flight is gone".into()))
    }
}

/// What can be said to a request that reads a flight.
enum Opened {
    NotYet,
    Absent,
    At { size: Option<u64>, via: Via },
}

/// The offset up to which unverified bytes may leave, when `length` have come and the response ends at `end`.
fn may_leave(length: u64, end: Option<u64>) -> u64 {
    end.map_or(length.saturating_sub(HOLD_BACK), |end| end.saturating_sub(HOLD_BACK).min(length))
}

impl Drop for FlightReader {
    fn drop(&mut self) {
        if self.collapsed {
            self.cache.metrics.flight_followers.dec();
        }
        if self.flight.readers.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.flight.wake.notify_one();
        }
    }
}

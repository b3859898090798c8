//! An upload on its way: its bytes are hashed as they come, a copy for the tiers is made beside, and the last bytes wait until all of them have matched.

use crate::{
    budget::Lease,
    cache::Cache,
    disk::{Disk, DiskCopy},
    fault::Fault,
    purges::Before,
    resource::Visibility,
    via::Owner,
};
use bytes::Bytes;
use castier_blob::{Digest, Sink, Verified, Verifier};
use futures::{StreamExt, stream::BoxStream};
use std::{convert::Infallible, sync::Arc};

/// The bytes of a request's body.
pub type Body<'a> = BoxStream<'a, Result<Bytes, Fault>>;

/// Uploads up to this size are read whole before they are sent on: they can then be sent again.
pub const SMALL: usize = 64 << 10;

/// An upload. It can be offered to one store after the other until bytes have left that are not at hand any more.
pub struct Upload<'a> {
    /// The name that the bytes must have; none: any.
    digest: Option<Digest>,
    /// The size that was announced.
    size: Option<u64>,
    state: State,
    /// Bytes that came and have not been handed out: all of them, while none have been.
    held: Bytes,
    rest: Body<'a>,
    /// Bytes have been handed out that are not in `held`.
    begun: bool,
    /// The purges before the upload began; none without a copy.
    purges: Option<Before>,
}

enum State {
    Coming(Verifier<Copy>),
    Whole(Verified<Copied>),
    /// The bytes are not the blob that they claim to be.
    Wrong,
}

/// What an upload hands out next.
pub enum Next {
    /// More follows.
    Part(Bytes),
    /// The last bytes: all have come, and they match. Possibly empty.
    Last(Bytes),
}

/// One upload to another node may take this share of `fill.memory` for its copy: a quarter, so that a large one leaves enough for the flights.
const REWIND_SHARE: u64 = 4;

/// Which tiers may take the copy of an upload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyTo {
    /// All of them.
    Tiers,
    /// Memory, up to [`REWIND_SHARE`]. Another node will keep the blob; but the client sends its bytes only once, and that node may fail.
    Memory,
}

impl<'a> Upload<'a> {
    /// An upload with no copy for any tier. Reads the first bytes, and all of a small upload.
    ///
    /// # Errors
    /// The client's; [`Fault::Mismatch`] if a small upload is not the blob named `digest`.
    pub async fn new(digest: Option<Digest>, size: Option<u64>, body: Body<'a>) -> Result<Self, Fault> {
        Self::with_copy(digest, size, body, Copy::Nowhere, None).await
    }

    async fn with_copy(
        digest: Option<Digest>,
        size: Option<u64>,
        mut rest: Body<'a>,
        copy: Copy,
        purges: Option<Before>,
    ) -> Result<Self, Fault> {
        let mut verifier = match digest {
            Some(digest) => Verifier::of(digest, copy),
            None => Verifier::any(copy),
        };
        let (mut held, mut ended) = (Vec::new(), false);
        while !ended && held.len() <= SMALL {
            match rest.next().await.transpose()? {
                Some(chunk) => {
                    let Ok(()): Result<(), Infallible> = verifier.write(&chunk);
                    held.extend_from_slice(&chunk);
                }
                None => ended = true,
            }
        }
        let state = if ended { State::Whole(verifier.finish().map_err(Fault::Mismatch)?) } else { State::Coming(verifier) };
        Ok(Self { digest, size, state, held: held.into(), rest, begun: false, purges })
    }

    /// The name that the bytes must have; none: any.
    pub const fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// The size that the client announced.
    pub const fn size(&self) -> Option<u64> {
        self.size
    }

    /// All bytes, if they are at hand and match: such an upload can be sent as often as need be.
    pub fn whole(&self) -> Option<&Bytes> {
        (matches!(self.state, State::Whole(_)) && !self.begun).then_some(&self.held)
    }

    /// Name and size, once all bytes have come and match.
    pub fn verified(&self) -> Option<(Digest, u64)> {
        if let State::Whole(verified) = &self.state { Some((verified.digest(), verified.size())) } else { None }
    }

    /// The next bytes to send. The last of them wait until all have matched, so a store never sees a complete upload of something else. Safe to cancel
    /// and call again.
    ///
    /// # Errors
    /// The client's; [`Fault::Mismatch`] instead of the last bytes.
    pub async fn next(&mut self) -> Result<Next, Fault> {
        self.begun = true;
        loop {
            let verifier = match &mut self.state {
                State::Coming(verifier) => verifier,
                State::Whole(_) => return Ok(Next::Last(std::mem::take(&mut self.held))),
                State::Wrong => return Err(Fault::Internal("an upload was read on after a mismatch".into())),
            };
            let Some(chunk) = self.rest.next().await.transpose()? else {
                self.verify()?;
                return Ok(Next::Last(std::mem::take(&mut self.held)));
            };
            if chunk.is_empty() {
                continue;
            }
            let Ok(()): Result<(), Infallible> = verifier.write(&chunk);
            let ready = std::mem::replace(&mut self.held, chunk);
            if !ready.is_empty() {
                return Ok(Next::Part(ready));
            }
        }
    }

    /// Takes back bytes that were handed out and did not arrive. They are handed out again first.
    pub fn put_back(&mut self, mut bytes: Vec<u8>) {
        bytes.extend_from_slice(&self.held);
        self.held = bytes.into();
    }

    /// Reads the rest, for a store that has answered before the end: what it says counts only for bytes that match.
    ///
    /// # Errors
    /// As [`Self::next`].
    pub async fn drain(&mut self) -> Result<(), Fault> {
        while let Next::Part(_) = self.next().await? {}
        Ok(())
    }

    fn verify(&mut self) -> Result<(), Fault> {
        if let State::Coming(verifier) = std::mem::replace(&mut self.state, State::Wrong) {
            self.state = State::Whole(verifier.finish().map_err(Fault::Mismatch)?);
        }
        Ok(())
    }

    /// Makes the upload ready for another store, from its first byte, which this node will store itself; false if the bytes are gone.
    pub fn rewind(&mut self) -> bool {
        let bytes = match &mut self.state {
            State::Coming(verifier) => {
                verifier.sink().allow_disk();
                if self.begun { verifier.sink().again() } else { None }
            }
            State::Whole(verified) if self.begun => verified.content().memory().cloned(),
            State::Whole(_) | State::Wrong => None,
        };
        if let Some(bytes) = bytes {
            (self.held, self.begun) = (bytes, false);
        }
        !self.begun
    }
}

impl Cache {
    /// Begins an upload of which a copy is made. Reads the first bytes, and all of a small upload. Call it before the origin hears of the upload: see
    /// `purges`.
    ///
    /// # Errors
    /// As [`Upload::new`].
    pub async fn upload<'a>(
        self: &Arc<Self>,
        digest: Option<Digest>,
        size: Option<u64>,
        body: Body<'a>,
        to: CopyTo,
    ) -> Result<Upload<'a>, Fault> {
        let purges = self.purges.before(digest.as_ref());
        let target = Target { cache: self.clone(), digest, size, to };
        Upload::with_copy(digest, size, body, Copy::Memory(target, Vec::new(), self.memory_budget().empty()), Some(purges)).await
    }

    /// Keeps the copy of an upload that the origin has stored, unless the blob was purged since the upload began.
    pub fn keep(&self, upload: Upload<'_>, owner: Owner) {
        let (State::Whole(verified), Some(before)) = (upload.state, upload.purges) else { return };
        let Some(_no_purge) = self.purges.unchanged(&verified.digest(), &before) else { return };
        match verified.content() {
            Copied::Memory(_, lease) if self.tiers.memory.takes(verified.size()) => {
                // Held until the tier has the blob: see `Memory::keep`.
                let _lease = lease.clone();
                verified.narrow(Copied::into_memory).and_then(|blob| self.tiers.keep(blob, owner, Visibility::Public));
            }
            // Accepted here and written later, unless a purge comes between the two.
            Copied::Disk(_) if owner == Owner::ThisNode => {
                if let Some(copy) = verified.narrow(Copied::into_disk) {
                    DiskCopy::keep(copy);
                }
            }
            Copied::Memory(..) | Copied::Disk(_) | Copied::Nowhere => {}
        }
    }
}

/// A copy of an upload, given up as soon as it fits into no tier.
enum Copy {
    Memory(Target, Vec<u8>, Lease),
    Disk(DiskCopy),
    Nowhere,
}

/// What a copy is of, and where it may go.
struct Target {
    cache: Arc<Cache>,
    digest: Option<Digest>,
    /// The size that was announced.
    size: Option<u64>,
    to: CopyTo,
}

/// A complete copy.
enum Copied {
    Memory(Bytes, Arc<Lease>),
    Disk(DiskCopy),
    Nowhere,
}

impl Copied {
    const fn memory(&self) -> Option<&Bytes> {
        if let Self::Memory(bytes, _) = self { Some(bytes) } else { None }
    }

    fn into_memory(self) -> Option<Bytes> {
        if let Self::Memory(bytes, _) = self { Some(bytes) } else { None }
    }

    fn into_disk(self) -> Option<DiskCopy> {
        if let Self::Disk(copy) = self { Some(copy) } else { None }
    }
}

impl Copy {
    /// All that came, once more; none if it is not in memory, or if `fill.memory` is used up.
    fn again(&mut self) -> Option<Bytes> {
        let Self::Memory(_, bytes, lease) = self else { return None };
        lease.cover(2 * bytes.len() as u64).then(|| Bytes::copy_from_slice(bytes))
    }

    fn allow_disk(&mut self) {
        if let Self::Memory(target, ..) = self {
            target.to = CopyTo::Tiers;
        }
    }
}

impl Sink for Copy {
    type Content = Copied;
    type Error = Infallible;

    /// Leases memory as bytes come, and not for what is announced: a client that announces much and sends little must cost little.
    fn write(&mut self, part: &Bytes) -> Result<(), Infallible> {
        *self = match std::mem::replace(self, Self::Nowhere) {
            Self::Memory(target, mut bytes, mut lease) => {
                let after = (bytes.len() + part.len()) as u64;
                if target.memory_takes(after) && reserve(&mut bytes, part.len(), target.size, &mut lease) {
                    bytes.extend_from_slice(part);
                    Self::Memory(target, bytes, lease)
                } else {
                    target.disk(after).and_then(|disk| disk.copy().take(bytes.into())?.take(part.clone())).map_or(Self::Nowhere, Self::Disk)
                }
            }
            Self::Disk(copy) => copy.take(part.clone()).map_or(Self::Nowhere, Self::Disk),
            Self::Nowhere => Self::Nowhere,
        };
        Ok(())
    }

    fn close(self) -> Copied {
        match self {
            Self::Memory(_, mut bytes, lease) => {
                bytes.shrink_to_fit();
                Copied::Memory(bytes.into(), Arc::new(lease))
            }
            Self::Disk(copy) => Copied::Disk(copy),
            Self::Nowhere => Copied::Nowhere,
        }
    }
}

impl Target {
    /// Whether so many bytes may be in memory: for good, or until their owner has them.
    fn memory_takes(&self, bytes: u64) -> bool {
        let bytes = bytes.max(self.size.unwrap_or(0));
        match self.to {
            CopyTo::Memory => bytes <= self.cache.memory_budget().limit() / REWIND_SHARE,
            CopyTo::Tiers => self.cache.tiers.memory.takes(bytes),
        }
    }

    /// The disk tier, if it takes the copy, of which `bytes` have come.
    fn disk(&self, bytes: u64) -> Option<&Arc<Disk>> {
        let size = self.size.unwrap_or(bytes);
        let takes = |disk: &Disk| self.digest.map_or_else(|| disk.takes(size), |digest| disk.admits(&digest, size));
        self.cache.tiers.disk.as_ref().filter(|disk| self.to == CopyTo::Tiers && takes(disk))
    }
}

/// Reserves space for `more` bytes, if the lease covers it. What is allocated is at least doubled, so that bytes are seldom moved, but does not exceed
/// what was announced.
fn reserve(bytes: &mut Vec<u8>, more: usize, announced: Option<u64>, lease: &mut Lease) -> bool {
    let after = bytes.len() + more;
    if after <= bytes.capacity() {
        return true;
    }
    let announced = announced.and_then(|size| usize::try_from(size).ok()).unwrap_or(usize::MAX);
    let ample = (2 * bytes.capacity()).min(announced).max(after);
    let Some(capacity) = [ample, after].into_iter().find(|capacity| lease.cover(*capacity as u64)) else { return false };
    bytes.reserve_exact(capacity - bytes.len());
    true
}

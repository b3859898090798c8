//! A fill from start to end: it asks one source after the other, goes on where a transfer broke, verifies the blob, and has it kept.

use crate::{
    cache::Cache,
    fault::{Fault, Limit},
    flights::{Flight, Phase},
    metrics::LoadResult,
    parallel::{Broke, Reading},
    plan::{Outcome, Plan, Step, Then},
    resource::{HOME, Key},
    retries::Retries,
    source::{Answer, Ask, Incoming},
    spool::{Landed, Spool, SpoolWriter, UseTier},
    via::{Owner, SourceKind},
};
use castier_blob::{Digest, Verified, Verifier};
use futures::FutureExt;
use std::{
    convert::Infallible,
    panic::AssertUnwindSafe,
    sync::{Arc, atomic::Ordering},
    time::Instant,
};
use tokio::{sync::OwnedSemaphorePermit, time::timeout};

/// A fill at work.
pub(crate) struct Fill {
    cache: Arc<Cache>,
    flight: Arc<Flight>,
    plan: Box<dyn Plan>,
    verifier: Verifier<SpoolWriter>,
    retries: Retries,
    /// One of `fill.max_in_flight`. A fill whose bytes come from the blob's owner needs none: it has a permit for that peer. So a fill that the origin
    /// could feed never waits for one that waits for another node.
    permit: Option<OwnedSemaphorePermit>,
    /// Some of the bytes came from peers.
    has_peers_bytes: bool,
    /// The origin has sent wrong bytes already.
    origin_was_wrong: bool,
    /// The blob was replaced while ranges of it were read, so the rest of this flight asks for none.
    one_transfer: bool,
    /// How many bytes, and which, had come before the file that held them was lost.
    lost: Option<(u64, Digest)>,
}

/// How a source's answer ended, if not with a fault.
enum End {
    Whole,
    Absent,
    NotKept,
    Unable,
    StartOver,
    /// The source has another version by now than the one that some bytes are of.
    Replaced,
    Left,
}

impl Fill {
    /// Call it in the task of the request that starts the flight: the plan may take note of that request.
    pub(crate) fn new(cache: Arc<Cache>, flight: Arc<Flight>) -> Self {
        let plan = flight.at.plan(&flight.key);
        let verifier = new_verifier(&cache, &flight, UseTier::IfItTakes);
        cache.retry_budget.request();
        let retries = Retries::new(cache.retries, cache.retry_budget.clone());
        Self {
            cache,
            flight,
            plan,
            verifier,
            retries,
            permit: None,
            has_peers_bytes: false,
            origin_was_wrong: false,
            one_transfer: false,
            lost: None,
        }
    }

    /// Runs the flight from start to end.
    pub(crate) async fn run(mut self) {
        let (cache, flight) = (self.cache.clone(), self.flight.clone());
        let number = cache.flights.began(&flight);
        cache.metrics.flights_in_progress.inc();
        let phase = match AssertUnwindSafe(self.fill()).catch_unwind().await {
            Ok(Ok(phase)) => phase,
            Ok(Err(fault)) => Phase::Failed(fault),
            Err(_) => Phase::Failed(Fault::Internal("the fill panicked".into())),
        };
        // What follows may last long, and needs none of it.
        drop(self);
        let result = match &phase {
            Phase::Absent => LoadResult::Absent,
            Phase::Failed(fault) => {
                log_failure(&flight.key, fault);
                LoadResult::Error
            }
            _ => LoadResult::Ok,
        };
        let (from, unkept) = {
            let state = flight.state.lock();
            // A disk that hangs has the blob, and cannot give it.
            let offers = |digest| cache.tiers.disk.as_ref().is_none_or(|disk| disk.offers(&digest));
            let kept = state.kept && flight.key.digest().is_none_or(offers);
            (state.from, matches!(phase, Phase::Verified) && !kept && state.spool.parts().is_none())
        };
        cache.metrics.load_ended(from, result, flight.started.elapsed());
        if let Phase::Failed(fault) = &phase {
            cache.metrics.gave_up(from, fault);
        }
        cache.flights.ended(number);
        cache.metrics.flights_in_progress.dec();
        let is_absent = matches!(phase, Phase::Absent);
        flight.update(|state| state.phase = phase);
        if unkept {
            // No tier has the blob, but the spool's file has, as long as somebody reads it. A later request can join, so that the origin is not
            // asked again.
            while !cache.flights.take_out_deserted(&flight) {
                flight.wake.notified().await;
            }
        } else if is_absent && from == SourceKind::Origin && flight.at.id() == HOME {
            let limits = cache.limits.load();
            cache.flights.take_out_absent(&flight, limits.negative_ttl.get(), limits.max_negative);
        } else {
            // An absence that a peer has reported is the peer's to remember: an upload that reaches the peer ends it for all.
            cache.flights.take_out(&flight);
        }
    }

    async fn fill(&mut self) -> Result<Phase, Fault> {
        loop {
            let step = self.plan.next(self.flight.waiting());
            self.flight.enter(&step);
            if self.permit.is_none() && step.owner == Owner::ThisNode {
                self.permit = Some(self.cache.fill_permit().await?);
            }
            let before = self.verifier.seen();
            if before > 0 {
                self.cache.metrics.resumed(step.from);
            }
            let end = self.read_source(&step).await;
            let bytes = self.verifier.seen().saturating_sub(before);
            self.has_peers_bytes |= step.from == SourceKind::Peer && (bytes > 0 || matches!(end, Ok(End::Whole)));
            let fault = match end {
                Ok(End::Whole) => {
                    self.plan.report(Outcome::Whole, bytes);
                    if let Err(fault) = self.verifier.sink().flush().await {
                        self.fetch_again(fault)?;
                    } else {
                        match self.finish().await {
                            Err(fault) => self.begin_anew(fault)?,
                            Ok((digest, size)) => {
                                self.plan.report(Outcome::Verified(digest, size), 0);
                                return Ok(Phase::Verified);
                            }
                        }
                    }
                    continue;
                }
                Ok(End::Absent) if self.verifier.seen() == 0 && self.lost.is_none() => {
                    self.plan.report(Outcome::Absent, bytes);
                    return Ok(Phase::Absent);
                }
                Ok(End::Absent) => unusable(step.from, "the blob vanished midway"),
                Ok(End::StartOver) => {
                    self.plan.report(Outcome::Left, bytes);
                    self.begin_anew(unusable(step.from, "it has other bytes by now, and does not go on with those that came"))?;
                    continue;
                }
                Ok(End::Replaced) => {
                    // Nothing of the new version was added to the old one. Readers may have been given the old one's front: then the load goes on
                    // behind it, as after any transfer that broke, and the digest decides.
                    let fault = unusable(step.from, "the blob was replaced midway");
                    self.one_transfer = true;
                    if !self.flight.state.lock().released {
                        self.plan.report(Outcome::Left, bytes);
                        self.begin_anew(fault)?;
                        continue;
                    }
                    fault
                }
                Ok(End::Left) => {
                    self.plan.report(Outcome::Left, bytes);
                    continue;
                }
                Ok(end @ (End::NotKept | End::Unable)) => {
                    let outcome = if matches!(end, End::NotKept) { Outcome::NotKept } else { Outcome::Unable };
                    if self.plan.report(outcome, bytes) == Then::AskNext {
                        continue;
                    }
                    return Err(unusable(step.from, "it does not give the blob, and there is no other source"));
                }
                Err(fault) if self.verifier.sink().has_lost() => {
                    self.plan.report(Outcome::Left, bytes);
                    self.fetch_again(fault)?;
                    continue;
                }
                Err(fault) => fault,
            };
            tracing::debug!(key = %self.flight.key, %fault, at = self.verifier.seen(), "a transfer broke");
            if self.plan.report(Outcome::Failed(&fault), bytes) == Then::AskNext {
                continue;
            }
            let peers_may_be_wrong = step.from == SourceKind::Origin && self.has_peers_bytes && matches!(fault, Fault::Unusable { .. });
            if peers_may_be_wrong && !self.flight.state.lock().released {
                // The origin cannot go on from what a peer sent.
                self.begin_anew(fault)?;
                continue;
            }
            match self.retries.after(&fault, self.verifier.seen()) {
                Some(delay) => tokio::time::sleep(delay).await,
                None => return Err(fault),
            }
        }
    }

    /// Asks one source for the bytes that are missing, and takes all that comes.
    async fn read_source(&mut self, step: &Step) -> Result<End, Fault> {
        let ask = Ask { key: self.flight.key, from: self.verifier.seen() };
        let incoming = match open(&self.flight, step, ask).await? {
            None => return Ok(End::Left),
            Some(Answer::Bytes(incoming)) => incoming,
            Some(Answer::Absent) => return Ok(End::Absent),
            Some(Answer::NotKept) => return Ok(End::NotKept),
            Some(Answer::Unable) => return Ok(End::Unable),
            Some(Answer::StartOver) => return Ok(End::StartOver),
        };
        let size = self.announced(step.from, &incoming)?;
        let mut incoming =
            if self.one_transfer { Reading::One(incoming) } else { Reading::new(incoming, ask.from, step.from.as_str(), &self.cache) };
        loop {
            if size == Some(self.verifier.seen()) {
                return Ok(End::Whole);
            }
            let chunk = {
                let next = incoming.next();
                tokio::pin!(next);
                loop {
                    // Checked before the wait: the last reader may have left before anyone listened.
                    if self.is_abandoned(size) {
                        return Err(Fault::Abandoned);
                    }
                    if self.flight.must_leave() {
                        return Ok(End::Left);
                    }
                    tokio::select! {
                        chunk = &mut next => break match chunk {
                            Ok(chunk) => chunk,
                            Err(Broke::Replaced) => return Ok(End::Replaced),
                            Err(Broke::Fault(fault)) => return Err(fault),
                        },
                        () = self.flight.wake.notified() => {}
                    }
                }
            };
            let Some(chunk) = chunk else {
                let broke = |_| Fault::Unreachable { source_name: step.from.as_str(), why: "ended before the announced length".into() };
                return size.map_or(Ok(End::Whole), |size| Err(broke(size)));
            };
            let most = size.unwrap_or_else(|| self.cache.limits.load().max_blob.get());
            if self.verifier.seen() + chunk.len() as u64 > most {
                return Err(unusable(step.from, format!("more bytes than the {most} announced or allowed")));
            }
            self.take(step.from, chunk).await?;
        }
    }

    /// Notes the size that the source announces, and compares it with what was announced before.
    fn announced(&self, from: SourceKind, incoming: &Incoming) -> Result<Option<u64>, Fault> {
        let limit = self.cache.limits.load().max_blob.get();
        if let Some(size) = incoming.size.filter(|size| *size > limit) {
            return Err(unusable(from, format!("a blob of {size} bytes, over limits.max_blob")));
        }
        self.flight.update(|state| {
            if state.spool.length() == 0 {
                (state.phase, state.spool) = (Phase::Filling, Spool::new(&self.cache.spools, incoming.size));
                if !state.released {
                    // An earlier source has announced a size, and brought no byte.
                    state.size = incoming.size;
                }
            }
            if let (Some(before), Some(now)) = (state.size, incoming.size)
                && before != now
            {
                return Err(unusable(from, format!("announced {before} bytes first and {now} now")));
            }
            state.size = state.size.or(incoming.size);
            Ok(state.size)
        })
    }

    /// Hashes the next bytes and gives them to the readers.
    async fn take(&mut self, from: SourceKind, chunk: bytes::Bytes) -> Result<(), Fault> {
        let (seen, len) = (self.verifier.seen(), chunk.len() as u64);
        self.verifier.sink().admit(len).await?;
        // Bytes that are fetched again: where those end that were handed out before, both must be the same.
        if let Some((length, digest)) = self.lost.filter(|(length, _)| (seen..=seen + len).contains(length)) {
            let known = usize::try_from(length - seen).unwrap_or(usize::MAX).min(chunk.len());
            if self.verifier.digest_with(&chunk[..known]) != digest {
                return Err(unusable(from, "other bytes than the first time"));
            }
        }
        let Ok(()): Result<(), Infallible> = self.verifier.write(&chunk);
        self.verifier.sink().catch_up(len).await
    }

    /// Ends a flight that nobody reads, if too much is missing.
    fn is_abandoned(&self, size: Option<u64>) -> bool {
        let missing = size.map(|size| size.saturating_sub(self.verifier.seen()));
        if self.flight.readers.load(Ordering::Acquire) > 0 || missing.is_some_and(|missing| missing <= self.cache.finish_under) {
            return false;
        }
        self.cache.flights.take_out_deserted(&self.flight)
    }

    /// All bytes have come. Keeps the blob if they are the right ones. Returns its digest and its size.
    async fn finish(&mut self) -> Result<(Digest, u64), Fault> {
        if let Some((length, _)) = self.lost.filter(|(length, _)| *length > self.verifier.seen()) {
            // They were never compared with what readers were given, so they may differ.
            let why = format!("{} bytes now, and more than {length} the first time", self.verifier.seen());
            return Err(unusable(SourceKind::Origin, why));
        }
        let new = new_verifier(&self.cache, &self.flight, UseTier::IfItTakes);
        let verified = std::mem::replace(&mut self.verifier, new).finish().map_err(|mismatch| {
            let from = if self.has_peers_bytes { SourceKind::Peer } else { SourceKind::Origin };
            self.cache.metrics.corrupt(from.as_str(), self.flight.key.digest().as_ref());
            Fault::Corrupt { source_name: from.as_str(), mismatch }
        })?;
        let named = (verified.digest(), verified.size());
        keep(&self.flight, &self.cache, verified).await;
        Ok(named)
    }

    /// After wrong bytes: begins anew, if no reader has been given anything and there is a source left to try.
    fn begin_anew(&mut self, fault: Fault) -> Result<(), Fault> {
        let peers_are_blamed = self.plan.blame(&fault);
        let may_try = peers_are_blamed || !self.origin_was_wrong;
        if !may_try || !self.flight.begin_anew() {
            return Err(fault);
        }
        tracing::warn!(key = %self.flight.key, %fault, "wrong bytes came; the blob is fetched once more from the start");
        self.origin_was_wrong |= !peers_are_blamed;
        self.has_peers_bytes = false;
        self.verifier = new_verifier(&self.cache, &self.flight, UseTier::IfItTakes);
        self.lost = None;
        Ok(())
    }

    /// After the disk has lost what came, once: fetches it from the start, past the disk. The bytes that readers were given are compared with those that
    /// come now, so clients notice no more than a pause.
    fn fetch_again(&mut self, fault: Fault) -> Result<(), Fault> {
        if !self.verifier.sink().has_lost() || self.lost.is_some() {
            return Err(fault);
        }
        let (seen, digest) = (self.verifier.seen(), self.verifier.digest_with(&[]));
        tracing::warn!(key = %self.flight.key, %fault, at = seen, "the disk lost the front of a blob, which is fetched once more");
        self.lost = Some((seen, digest));
        self.verifier = new_verifier(&self.cache, &self.flight, UseTier::No);
        self.flight.fetch_again();
        Ok(())
    }
}

/// Has the tiers keep the blob, unless it was purged meanwhile.
async fn keep(flight: &Flight, cache: &Cache, verified: Verified<Landed>) {
    let (tiers, digest) = (&cache.tiers, verified.digest());
    let keeping = {
        // Under the lock, so that a purge comes before this and is seen here, or after it and finds the blob in the tier.
        let mut state = flight.state.lock();
        if let Landed::Memory(whole) = verified.content() {
            state.spool.replace_with(whole.clone());
        }
        match (verified.content(), &tiers.disk) {
            _ if state.detached => None,
            (Landed::Memory(_), _) => {
                if let Some(shared) = verified.narrow(Landed::memory).and_then(|blob| tiers.keep(blob, state.owner, state.visibility)) {
                    // The tier pays for the bytes from now on, also while they are read here.
                    state.spool.replace_with(shared);
                    state.spool.release();
                    state.kept = true;
                }
                None
            }
            (Landed::File(_), Some(disk)) if state.owner == Owner::ThisNode => {
                verified.narrow(Landed::file).map(|blob| (disk, disk.keep_file(blob, state.visibility)))
            }
            _ => None,
        }
    };
    if let Some((disk, keeping)) = keeping {
        keeping.await;
        flight.state.lock().kept = disk.knows(&digest).is_some();
    }
}

/// Asks a source. `None`: a peer has joined the flight before there was an answer, and this source may wait for another node.
async fn open(flight: &Flight, step: &Step, ask: Ask) -> Result<Option<Answer>, Fault> {
    let mut opened = step.source.open(ask);
    loop {
        if flight.must_leave() {
            return Ok(None);
        }
        tokio::select! {
            answer = &mut opened => return answer.map(Some),
            () = flight.wake.notified() => {}
        }
    }
}

impl Cache {
    /// One of `fill.max_in_flight`, after a wait of at most `fill.max_wait`, if fewer than `fill.max_waiting` wait.
    async fn fill_permit(&self) -> Result<OwnedSemaphorePermit, Fault> {
        let asked = Instant::now();
        let permit = match self.fill_permits.clone().try_acquire_owned() {
            Ok(permit) => Ok(Ok(permit)),
            Err(_) => {
                let _waits = self.waiting.try_acquire().map_err(|_| Fault::Busy(Limit::Fills))?;
                timeout(self.max_wait, self.fill_permits.clone().acquire_owned()).await
            }
        };
        self.metrics.waited(asked.elapsed());
        match permit {
            Ok(Ok(permit)) => Ok(permit),
            _ => Err(Fault::Busy(Limit::Fills)),
        }
    }
}

fn new_verifier(cache: &Cache, flight: &Arc<Flight>, use_tier: UseTier) -> Verifier<SpoolWriter> {
    let sink = SpoolWriter::new(cache.spools.clone(), cache.tiers.clone(), flight.clone(), use_tier);
    match flight.key {
        Key::Blob(digest) => Verifier::of(digest, sink),
        Key::Name(_) => Verifier::any(sink),
    }
}

fn unusable(from: SourceKind, why: impl Into<String>) -> Fault {
    Fault::Unusable { source_name: from.as_str(), why: why.into() }
}

fn log_failure(key: &Key, fault: &Fault) {
    match fault {
        Fault::Abandoned => tracing::debug!(%key, "a fill was abandoned: its last reader has left"),
        Fault::Internal(_) => tracing::error!(%key, %fault, "fill failed"),
        _ => tracing::warn!(%key, %fault, "fill failed"),
    }
}

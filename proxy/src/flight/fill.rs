//! A fill from its start to its end: along its course, over what breaks, to a blob that has verified.

use super::{
    Flight, Flights, Phase,
    attempts::Attempts,
    course::{Course, Leg},
    writer::Writer,
};
use crate::{
    disk::DiskFile,
    fault::{Fault, Limit},
    trace::Part,
    upstream::Answer,
};
use castier_blob::{Digest, Verifier};
use castier_wire::{
    self as wire,
    trace::{Attributes, Value},
};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::SemaphorePermit;

/// How a leg ended, if not with a fault.
pub(super) enum End {
    /// All bytes are in.
    Whole,
    /// The source says that there is no such blob.
    Absent,
    /// Nothing is wrong, but the bytes must come from elsewhere.
    Elsewhere,
}

/// What a fill has in hand.
struct Fill {
    course: Course,
    verifier: Verifier,
    writer: Writer,
    attempts: Attempts,
    /// The origin has not sent wrong bytes yet.
    may_start_over: bool,
    /// What was handed out before the file that held it was lost, if that has happened.
    before: Option<Verifier>,
}

impl Flights {
    /// Gets the blob from a source, verifies and keeps it.
    pub(super) async fn fill(&self, flight: &Arc<Flight>) -> Result<Phase, Fault> {
        let mut fill = Fill {
            course: Course::new(self.sources.peers.clone(), flight.digest),
            verifier: Verifier::of(flight.digest),
            writer: Writer::default(),
            attempts: Attempts::new(self.retries),
            may_start_over: true,
            before: None,
        };
        let mut place = None;
        loop {
            let leg = fill.course.next(flight.is_home());
            flight.take_leg(&leg);
            if place.is_none() && !leg.is_foreign() {
                place = Some(self.place().await?);
            }
            if fill.verifier.seen() > 0 {
                self.metrics.source_resume(leg.source());
            }
            let (part, before) = (Part::begin(), fill.verifier.seen());
            let went = part.over(self.go(flight, &leg, &mut fill)).await;
            part.end("GET", || {
                let from = match (&leg, &self.sources.peers) {
                    (Leg::Peer(member) | Leg::Peek(member), Some(peers)) => peers.url(member),
                    _ => self.sources.origin.url(),
                };
                told_of(&went, &flight.digest, &from, leg.source(), fill.verifier.seen().saturating_sub(before))
            });
            let fault = match went {
                Ok(End::Whole) => {
                    fill.course.answered(&leg);
                    let file = match fill.writer.finish(self, flight).await {
                        Err(fault) => {
                            fetch_again(flight, &mut fill, fault)?;
                            continue;
                        }
                        file => file?,
                    };
                    match self.land(flight, &mut fill, file).await {
                        Ok(()) => return Ok(Phase::Verified),
                        Err(fault) => self.start_over(flight, &mut fill, fault)?,
                    }
                    continue;
                }
                Ok(End::Absent) if fill.verifier.seen() == 0 => return Ok(Phase::Absent),
                Ok(End::Absent) => Fault::Unusable { source_name: leg.source(), why: "the blob vanished midway".into() },
                Ok(End::Elsewhere) => continue,
                Err(fault) if fill.writer.has_lost() => {
                    fetch_again(flight, &mut fill, fault)?;
                    continue;
                }
                Err(fault) => fault,
            };
            tracing::debug!(digest = %flight.digest, %fault, at = fill.verifier.seen(), "transfer broke, going on");
            match &leg {
                Leg::Peer(member) | Leg::Peek(member) if is_broken(&fault) => fill.course.failed(member, &fault),
                // It has done nothing wrong: no permit towards it was free, or this node has no descriptor for it.
                Leg::Peer(member) | Leg::Peek(member) if is_full(&fault) => fill.course.pass_over(member),
                // What a peer sent may be what the origin cannot go on from.
                Leg::Origin if matches!(fault, Fault::Unusable { .. }) && fill.course.has_peers_bytes() && flight.can_start_over() => {
                    self.start_over(flight, &mut fill, fault)?;
                }
                _ => match fill.attempts.after(&fault, fill.verifier.seen()) {
                    Some(delay) => tokio::time::sleep(delay).await,
                    None => return Err(fault),
                },
            }
        }
    }

    /// A place among the fills from the origin.
    async fn place(&self) -> Result<SemaphorePermit<'_>, Fault> {
        let asked = Instant::now();
        let place = tokio::time::timeout(self.max_wait, self.places.acquire()).await;
        self.metrics.waited(asked.elapsed());
        match place {
            Ok(Ok(place)) => Ok(place),
            _ => Err(Fault::Busy(Limit::Fills)),
        }
    }

    /// One leg: opens the source where the last one ended and takes all that comes.
    async fn go(&self, flight: &Arc<Flight>, leg: &Leg, fill: &mut Fill) -> Result<End, Fault> {
        let incoming = match self.open(flight, leg, fill.verifier.seen(), fill.course.patience()).await? {
            Some(Answer::Blob(incoming)) => *incoming,
            Some(Answer::Absent) => return Ok(End::Absent),
            Some(Answer::NotKept) | None => return Ok(End::Elsewhere),
            Some(Answer::Unable) => {
                fill.course.go_straight();
                return Ok(End::Elsewhere);
            }
        };
        let before = fill.verifier.seen();
        let end = self.pour(flight, incoming, &mut fill.verifier, fill.before.as_ref(), &mut fill.writer).await;
        // Who says that this is all, without a byte, has given what there is, too.
        if fill.verifier.seen() > before || matches!(end, Ok(End::Whole)) {
            fill.course.gives(leg);
        }
        end
    }

    /// None: the flight was turned home before there was an answer.
    async fn open(&self, flight: &Arc<Flight>, leg: &Leg, from: u64, patience: Duration) -> Result<Option<Answer>, Fault> {
        let digest = &flight.digest;
        let (Some(peers), Leg::Peer(member) | Leg::Peek(member)) = (&self.sources.peers, leg) else {
            return Ok(Some(
                self.sources.origin.open(digest, from).await?.map_or(Answer::Absent, |incoming| Answer::Blob(Box::new(incoming))),
            ));
        };
        let opened = peers.open(member, digest, from, !leg.is_foreign(), patience);
        tokio::pin!(opened);
        loop {
            if flight.must_turn() {
                return Ok(None);
            }
            tokio::select! {
                answer = &mut opened => return answer.map(Some),
                () = flight.nudge.notified() => {}
            }
        }
    }

    /// All bytes are in. Keeps the blob if it is the right one.
    async fn land(&self, flight: &Flight, fill: &mut Fill, file: Option<DiskFile>) -> Result<(), Fault> {
        let source_name = if fill.course.has_peers_bytes() { "peer" } else { "origin" };
        let verifier = std::mem::replace(&mut fill.verifier, Verifier::of(flight.digest));
        let verified = verifier.finish(()).map_err(|mismatch| {
            self.metrics.corrupt(source_name);
            Fault::Corrupt { source_name, mismatch }
        })?;
        self.settle(flight, verified, file).await;
        Ok(())
    }

    /// Begins anew after a `fault` in what came, if no reader has been given anything, and there is anything left to try.
    fn start_over(&self, flight: &Flight, fill: &mut Fill, fault: Fault) -> Result<(), Fault> {
        let peers_fault = fill.course.blame_peers(&fault);
        if !(peers_fault || fill.may_start_over) || !flight.start_over() {
            return Err(fault);
        }
        tracing::warn!(digest = %flight.digest, %fault, "a fill went wrong, trying once more from the start");
        fill.may_start_over &= peers_fault;
        fill.verifier = Verifier::of(flight.digest);
        fill.writer = Writer::default();
        fill.before = None;
        Ok(())
    }
}

/// The disk has lost what came, once: it is fetched from the start, past the disk. What readers were given must be what comes now, so the
/// two are compared, and nobody notices more than a pause.
fn fetch_again(flight: &Flight, fill: &mut Fill, fault: Fault) -> Result<(), Fault> {
    if !fill.writer.has_lost() || fill.before.is_some() {
        return Err(fault);
    }
    tracing::warn!(digest = %flight.digest, %fault, at = fill.verifier.seen(), "the disk lost the beginning of a blob, which is fetched once more");
    fill.before = Some(std::mem::replace(&mut fill.verifier, Verifier::of(flight.digest)));
    fill.writer = Writer::without_tier();
    flight.fetch_again();
    Ok(())
}

/// What a span tells of one source that was asked: how it failed, if it did, and the rest.
fn told_of(went: &Result<End, Fault>, digest: &Digest, from: &str, source: &'static str, bytes: u64) -> (Option<String>, Attributes) {
    let (scheme, authority) = from.split_once("://").unwrap_or_default();
    let default = if scheme == "https" { 443 } else { 80 };
    // Behind the last colon of `[::1]` there is no port.
    let split = authority.rsplit_once(':').and_then(|(address, port)| Some((address, port.parse().ok()?)));
    let (address, port) = split.unwrap_or((authority, default));
    let mut attributes = vec![
        ("http.request.method", Value::Word("GET")),
        ("url.full", Value::Text(format!("{from}{}", wire::blob_path(digest)))),
        ("server.address", Value::Text(address.trim_matches(['[', ']']).to_owned())),
        ("server.port", Value::Number(port)),
        ("castier.source", Value::Word(source)),
        ("http.response.body.size", Value::Number(i64::try_from(bytes).unwrap_or(i64::MAX))),
    ];
    match went {
        Ok(End::Whole) => attributes.push(("http.response.status_code", Value::Number(200))),
        Ok(End::Absent) => attributes.push(("http.response.status_code", Value::Number(404))),
        // The peer does not keep it, or this node turned to somebody else.
        Ok(End::Elsewhere) => {}
        Err(fault) => attributes.push(("error.type", Value::Word(fault.kind()))),
    }
    (went.as_ref().err().map(ToString::to_string), attributes)
}

/// Whether a limit of this node keeps it from asking this source now. Another source may be free.
const fn is_full(fault: &Fault) -> bool {
    matches!(fault, Fault::Busy(Limit::Fills | Limit::Requests | Limit::Files | Limit::Origin))
}

/// Whether it was the transfer that broke.
const fn is_broken(fault: &Fault) -> bool {
    matches!(fault, Fault::Unreachable { .. } | Fault::Silent { .. } | Fault::Unusable { .. })
}

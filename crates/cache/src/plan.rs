//! Whom a flight asks, and in which order.

use crate::{
    fault::Fault,
    flights::Asker,
    source::Source,
    via::{Owner, SourceKind},
};
use castier_blob::Digest;
use std::sync::Arc;

/// Chooses the sources of one flight. The flight asks one after the other, each from the offset where the last one stopped.
pub trait Plan: Send {
    /// The source to ask next. Once a peer waits for the flight (`Asker::Peer`) this must not be one that may itself wait for another node: so no two
    /// flights ever wait for each other.
    fn next(&mut self, waiting: Asker) -> Step;

    /// What came of the last step, and how many bytes it brought. Called once for each step, unless a limit keeps it from being tried; and once more
    /// with [`Outcome::Verified`].
    fn report(&mut self, outcome: Outcome<'_>, bytes: u64) -> Then;

    /// All bytes have come, from one or more sources, and they are not the blob. True if the plan blames peers, and will not ask them again: the
    /// flight may then begin anew without counting it against the origin.
    fn blame(&mut self, fault: &Fault) -> bool;
}

/// One source to ask.
pub struct Step {
    /// The source.
    pub source: Arc<dyn Source>,
    /// What kind it is.
    pub from: SourceKind,
    /// Whose the blob is if it comes this way.
    pub owner: Owner,
}

/// What came of a step.
#[derive(Clone, Copy, Debug)]
pub enum Outcome<'a> {
    /// All bytes came.
    Whole,
    /// Said after [`Outcome::Whole`] too: they are this blob, of this size.
    Verified(Digest, u64),
    /// The source says that there is no such blob.
    Absent,
    /// The source does not keep the blob, and was asked only for what it keeps.
    NotKept,
    /// The source works, but cannot help now.
    Unable,
    /// The flight left the source although nothing was wrong with it: a peer has joined the flight, or the disk lost what had come.
    Left,
    /// The source, the way to it, or a limit on it failed.
    Failed(&'a Fault),
}

/// What follows a step that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// The plan has another source to ask at once.
    AskNext,
    /// There is no other. The flight's rules for retries decide.
    Retry,
}

/// The plan of a cache with one source.
pub struct OneSource(pub Arc<dyn Source>);

impl Plan for OneSource {
    fn next(&mut self, _: Asker) -> Step {
        Step { source: self.0.clone(), from: SourceKind::Origin, owner: Owner::ThisNode }
    }

    fn report(&mut self, _: Outcome<'_>, _: u64) -> Then {
        Then::Retry
    }

    fn blame(&mut self, _: &Fault) -> bool {
        false
    }
}

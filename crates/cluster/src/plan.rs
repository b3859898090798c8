//! The plan of a flight in a cluster.
//!
//! The digest puts the members in an order; the first is the owner. A client's get asks the members before this node in that order, at most two of
//! them, and then the origin. It asks only the origin if this node comes first, or if a peer waits for the flight. If the cluster has changed lately,
//! it asks the next member in order before the origin, with `only-if-cached`.
//!
//! Invariant: a flight that a peer waits for asks no peer that may wait for another node itself. It waits for the origin only. So no two flights can
//! wait for each other, even if the nodes have different rings.

use crate::{
    members::Member,
    peers::{Only, Peers},
};
use castier_blob::Digest;
use castier_cache::{Asker, Fault, Outcome, Owner, Plan, Source, SourceKind, Step, Then};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

/// The most members that are asked before the origin. In most cases the first one answers. The second one keeps the blobs of a first one that has just
/// left. After two failures, a request should not wait for a third.
const MOST_PEERS: usize = 2;

/// The plan of one flight.
pub struct ClusterPlan {
    peers: Arc<Peers>,
    origin: Arc<dyn Source>,
    digest: Digest,
    /// Members that were asked and did not have the blob, or failed.
    tried: Vec<Arc<str>>,
    /// Only the origin is left.
    origin_only: bool,
    /// The current step, and when it began.
    current: Choice,
    since: Instant,
    /// A peer has used up half of a stall timeout, so the next one gets less time.
    late: bool,
    /// The peers that sent bytes since the flight began, or began again.
    gave: Vec<Member>,
    /// The origin sent some too.
    origin_gave: bool,
    /// Peers whose bytes may have been wrong. If the origin alone has the right blob, they were.
    suspects: Vec<Member>,
}

/// The source of a step.
#[derive(Clone, Debug)]
enum Choice {
    /// The member that owns the blob, or the next in order.
    Owner(Member),
    /// The next in order, with `only-if-cached`.
    Kept(Member),
    /// The origin.
    Origin,
}

impl ClusterPlan {
    /// The plan for a blob.
    pub fn new(peers: Arc<Peers>, origin: Arc<dyn Source>, digest: Digest) -> Self {
        let (current, since) = (Choice::Origin, Instant::now());
        Self {
            peers,
            origin,
            digest,
            tried: Vec::new(),
            origin_only: false,
            current,
            since,
            late: false,
            gave: Vec::new(),
            origin_gave: false,
            suspects: Vec::new(),
        }
    }

    /// The source to ask now, in the cluster as it is now.
    fn choose(&mut self, waiting: Asker) -> Choice {
        if self.origin_only {
            return Choice::Origin;
        }
        let view = self.peers.members().view();
        let is_new = |member: &&Member| !member.itself && !self.tried.contains(&member.name) && self.peers.trusts(member);
        let mut own_turn = waiting == Asker::Peer;
        if !own_turn && self.tried.len() < MOST_PEERS {
            for member in view.order(&self.digest) {
                if is_new(&member) {
                    return Choice::Owner(member.clone());
                }
                if member.itself {
                    own_turn = true;
                    break;
                }
            }
        }
        // The origin is the next source even if the next member does not have the blob.
        self.origin_only = true;
        let next = if own_turn && self.peers.changed_lately(&view) { view.order(&self.digest).find(is_new) } else { None };
        next.map_or(Choice::Origin, |member| Choice::Kept(member.clone()))
    }

    /// How long the peer may send nothing: `cluster.stall_timeout` until one peer was late, then a quarter of it. A healthy peer answers much sooner,
    /// and in a network partition all peers may be silent.
    fn stall_timeout(&self) -> Duration {
        let whole = self.peers.stall_timeout();
        if self.late { whole / 4 } else { whole }
    }

    /// A peer failed. The next source is asked.
    fn failed(&mut self, member: &Member, fault: &Fault) {
        self.peers.failed(member, fault);
        self.late |= self.since.elapsed() > self.peers.stall_timeout() / 2;
        self.tried.push(member.name.clone());
    }
}

impl Plan for ClusterPlan {
    fn next(&mut self, waiting: Asker) -> Step {
        self.current = self.choose(waiting);
        self.since = Instant::now();
        let timeout = self.stall_timeout();
        match &self.current {
            Choice::Owner(member) => {
                Step { source: self.peers.source(member, Only::Anything, timeout), from: SourceKind::Peer, owner: Owner::Peer }
            }
            Choice::Kept(member) => {
                Step { source: self.peers.source(member, Only::Kept, timeout), from: SourceKind::Peer, owner: Owner::ThisNode }
            }
            Choice::Origin => Step { source: self.origin.clone(), from: SourceKind::Origin, owner: Owner::ThisNode },
        }
    }

    fn report(&mut self, outcome: Outcome<'_>, bytes: u64) -> Then {
        if matches!(outcome, Outcome::Verified(..)) {
            std::mem::take(&mut self.suspects).iter().for_each(|member| self.peers.distrust(member));
            return Then::AskNext;
        }
        let (Choice::Owner(member) | Choice::Kept(member)) = &self.current else {
            self.origin_gave |= bytes > 0;
            return Then::Retry;
        };
        let member = member.clone();
        if bytes > 0 || matches!(outcome, Outcome::Whole) {
            self.gave.push(member.clone());
        }
        match outcome {
            Outcome::Whole => self.peers.answered(&member),
            Outcome::Unable => self.origin_only = true,
            Outcome::Failed(fault) if fault.is_broken_transfer() => self.failed(&member, fault),
            // Not a failure of the peer: this node had no free permit or no descriptor for it.
            Outcome::Failed(fault) if fault.is_source_limit() => self.tried.push(member.name),
            Outcome::Failed(_) => return Then::Retry,
            Outcome::Absent | Outcome::NotKept | Outcome::Left | Outcome::Verified(..) => {}
        }
        Then::AskNext
    }

    fn blame(&mut self, fault: &Fault) -> bool {
        let (gave, origin_gave) = (std::mem::take(&mut self.gave), std::mem::take(&mut self.origin_gave));
        self.tried.extend(gave.iter().map(|member| member.name.clone()));
        let blamed = !gave.is_empty();
        if let ([member], false, Fault::Corrupt { .. }) = (&*gave, origin_gave, fault) {
            self.peers.distrust(member);
        } else {
            // Nobody knows yet whose bytes were wrong. A peer that broke off may have been right to: it cuts what the origin sent it and does not verify.
            self.suspects.extend(gave);
        }
        blamed
    }
}

#[cfg(test)]
mod tests;

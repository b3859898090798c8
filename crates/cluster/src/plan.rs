//! The plan of a flight in a cluster.
//!
//! A client's get goes to the members that come before this node in the digest's order, at most two of them, and then to the origin. If this node owns
//! the blob, or its own turn has come, or a peer waits for the flight, only the origin is asked; and before it, if the cluster has changed lately, the
//! next member in order for what it keeps.
//!
//! Invariant: a flight that a peer waits for asks no peer that may itself wait for another node. So no two flights ever wait for each other, whatever
//! the nodes believe about the ring: a flight that is waited for waits for the origin.

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

/// So many members are asked before the origin. The first is there as a rule; the second has what the first left behind; and after two failures a
/// request should not wait for a third.
const MOST_PEERS: usize = 2;

/// The sources that one flight has asked, and the next.
pub struct ClusterPlan {
    peers: Arc<Peers>,
    origin: Arc<dyn Source>,
    digest: Digest,
    /// Members that were asked in vain.
    tried: Vec<Arc<str>>,
    /// Only the origin is left.
    origin_only: bool,
    /// The present step, and when it began.
    current: Ask,
    since: Instant,
    /// A peer has cost time, and the next must not cost as much again.
    late: bool,
    /// The peers whose bytes are among those that came since the flight began, or began anew.
    gave: Vec<Member>,
}

/// Whom a step asks.
#[derive(Clone, Debug)]
enum Ask {
    /// The member that owns the blob, or the next in order.
    Owner(Member),
    /// The next in order, for what it keeps.
    Kept(Member),
    /// The origin.
    Origin,
}

impl ClusterPlan {
    /// The plan for a blob.
    pub fn new(peers: Arc<Peers>, origin: Arc<dyn Source>, digest: Digest) -> Self {
        let (current, since) = (Ask::Origin, Instant::now());
        Self { peers, origin, digest, tried: Vec::new(), origin_only: false, current, since, late: false, gave: Vec::new() }
    }

    /// Whom to ask now, in the cluster as it is now.
    fn choose(&mut self, waiting: Asker) -> Ask {
        if self.origin_only {
            return Ask::Origin;
        }
        let view = self.peers.members().view();
        let is_new = |member: &&Member| !member.itself && !self.tried.contains(&member.name) && self.peers.trusts(member);
        let mut own_turn = waiting == Asker::Peer;
        if !own_turn && self.tried.len() < MOST_PEERS {
            for member in view.order(&self.digest) {
                if is_new(&member) {
                    return Ask::Owner(member.clone());
                }
                if member.itself {
                    own_turn = true;
                    break;
                }
            }
        }
        // Whatever the next member keeps or not, the origin follows.
        self.origin_only = true;
        let next = if own_turn && self.peers.changed_lately(&view) { view.order(&self.digest).find(is_new) } else { None };
        next.map_or(Ask::Origin, |member| Ask::Kept(member.clone()))
    }

    /// How long the peer that is asked now may be silent: the whole `cluster.stall_timeout` once, and then a quarter. A peer that works answers much
    /// sooner, and behind a partition all peers may be silent.
    fn stall_timeout(&self) -> Duration {
        let whole = self.peers.stall_timeout();
        if self.late { whole / 4 } else { whole }
    }

    /// A peer could not help; the next is asked.
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
            Ask::Owner(member) => {
                Step { source: self.peers.source(member, Only::Anything, timeout), from: SourceKind::Peer, owner: Owner::Peer }
            }
            Ask::Kept(member) => {
                Step { source: self.peers.source(member, Only::Kept, timeout), from: SourceKind::Peer, owner: Owner::ThisNode }
            }
            Ask::Origin => Step { source: self.origin.clone(), from: SourceKind::Origin, owner: Owner::ThisNode },
        }
    }

    fn report(&mut self, outcome: Outcome<'_>, bytes: u64) -> Then {
        let (Ask::Owner(member) | Ask::Kept(member)) = &self.current else { return Then::Retry };
        let member = member.clone();
        if bytes > 0 || matches!(outcome, Outcome::Whole) {
            self.gave.push(member.clone());
        }
        match outcome {
            Outcome::Whole => self.peers.answered(&member),
            Outcome::Unable => self.origin_only = true,
            Outcome::Failed(fault) if fault.is_broken_transfer() => self.failed(&member, fault),
            // The peer has done nothing wrong: no permit for it was free, or this node has no descriptor for it.
            Outcome::Failed(fault) if fault.is_source_limit() => self.tried.push(member.name),
            Outcome::Failed(_) => return Then::Retry,
            Outcome::Absent | Outcome::NotKept | Outcome::Left => {}
        }
        Then::AskNext
    }

    fn blame(&mut self, fault: &Fault) -> bool {
        let gave = std::mem::take(&mut self.gave);
        for member in &gave {
            self.peers.distrust(member);
            self.failed(member, fault);
        }
        !gave.is_empty()
    }
}

#[cfg(test)]
mod tests;

//! Whom a flight asks, and in which order.
//!
//! A client's get goes to the members that come before this node in the digest's order, at most two of them, and then to the origin. Once
//! this node's own turn has come, or from the start for what it owns, the flight is *home*: only the origin is asked, and before it,
//! when the cluster has changed lately, the next in order for what it keeps.
//!
//! Invariants:
//! - A flight that a peer waits for is home. If it was under way to another peer, it is turned home at once, and goes on where it was.
//!   So no two flights ever wait for each other, whatever the nodes believe about the ring: whoever is waited for waits for the origin.
//! - A home flight takes its place among `fill.max_in_flight`, one under way to a peer among those of that peer. So a flight that the
//!   origin could feed never waits for the place of one that waits for another node.

use super::Flight;
use crate::{fault::Fault, members::Member, upstream::Peers};
use castier_blob::Digest;
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

/// So many members are asked before the origin. The first is there as a rule, the second has what the first left behind, and whoever
/// has met with two failures should not wait for a third.
const MOST_PEERS: usize = 2;

/// Where a flight gets its bytes from.
#[derive(Clone, Debug)]
pub(super) enum Leg {
    /// From the member that owns the blob, or the next in order.
    Peer(Member),
    /// From what the next in order keeps.
    Peek(Member),
    /// From the origin.
    Origin,
}

impl Leg {
    /// As it stands in labels.
    pub(super) const fn source(&self) -> &'static str {
        match self {
            Self::Peer(_) | Self::Peek(_) => "peer",
            Self::Origin => "origin",
        }
    }

    /// What comes this way is another node's to keep.
    pub(super) const fn is_foreign(&self) -> bool {
        matches!(self, Self::Peer(_))
    }
}

/// The way of one flight so far.
pub(super) struct Course {
    peers: Option<Arc<Peers>>,
    digest: Digest,
    /// Asked in vain.
    tried: Vec<Arc<str>>,
    /// Only the origin is left.
    straight: bool,
    /// When the present leg began.
    since: Instant,
    /// A peer has cost time, and the next must not cost as much again.
    late: bool,
    /// Whose bytes are among those that came since the flight began, or began anew.
    gave: Vec<Member>,
}

impl Course {
    pub(super) fn new(peers: Option<Arc<Peers>>, digest: Digest) -> Self {
        Self { peers, digest, tried: Vec::new(), straight: false, since: Instant::now(), late: false, gave: Vec::new() }
    }

    /// Whom to ask now, as the cluster is now.
    pub(super) fn next(&mut self, mut home: bool) -> Leg {
        self.since = Instant::now();
        let Some(peers) = self.peers.as_ref().filter(|_| !self.straight) else { return Leg::Origin };
        let view = peers.members().view();
        let is_new = |member: &&Member| !member.itself && !self.tried.contains(&member.name) && peers.trusts(member);
        if !home && self.tried.len() < MOST_PEERS {
            for member in view.order(&self.digest) {
                if is_new(&member) {
                    return Leg::Peer(member.clone());
                }
                if member.itself {
                    home = true;
                    break;
                }
            }
        }
        // Whatever the peek comes to, the origin is next.
        self.straight = true;
        let next = if home && peers.peeks(&view) { view.order(&self.digest).find(is_new) } else { None };
        next.map_or(Leg::Origin, |member| Leg::Peek(member.clone()))
    }

    /// How long the peer that is asked now may be silent: the whole `cluster.stall_timeout` once, and then a quarter. Who is well gives a
    /// sign much sooner, and of a request behind a partition all peers may be silent.
    pub(super) fn patience(&self) -> Duration {
        let whole = self.peers.as_ref().map_or(Duration::ZERO, |peers| peers.stall_timeout());
        if self.late { whole / 4 } else { whole }
    }

    /// Bytes come this way.
    pub(super) fn gives(&mut self, leg: &Leg) {
        if let Leg::Peer(member) | Leg::Peek(member) = leg {
            self.gave.push(member.clone());
        }
    }

    /// Whether any of the bytes came from a peer.
    pub(super) const fn has_peers_bytes(&self) -> bool {
        !self.gave.is_empty()
    }

    /// A peer came to nothing; the next is asked.
    pub(super) fn failed(&mut self, member: &Member, fault: &Fault) {
        if let Some(peers) = &self.peers {
            peers.failed(member, fault);
            self.late |= self.since.elapsed() > peers.stall_timeout() / 2;
        }
        self.tried.push(member.name.clone());
    }

    /// This node could not ask the peer now, which says nothing of the peer; the next is asked.
    pub(super) fn pass_over(&mut self, member: &Member) {
        self.tried.push(member.name.clone());
    }

    /// A peer's answer has come to its end.
    pub(super) fn answered(&self, leg: &Leg) {
        if let (Some(peers), Leg::Peer(member) | Leg::Peek(member)) = (&self.peers, leg) {
            peers.answered(member);
        }
    }

    /// The peers cannot help, though they are well.
    pub(super) const fn go_straight(&mut self) {
        self.straight = true;
    }

    /// What came is not the blob. Where bytes of peers are among it, those are at fault: the origin is the source of truth. False if
    /// there are none.
    pub(super) fn blame_peers(&mut self, fault: &Fault) -> bool {
        let gave = std::mem::take(&mut self.gave);
        for member in &gave {
            if let Some(peers) = &self.peers {
                peers.distrust(member);
            }
            self.failed(member, fault);
        }
        !gave.is_empty()
    }
}

impl Flight {
    /// Peers are not to be waited for any more: one of them waits for this flight.
    pub(super) fn turn_home(&self) {
        let mut state = self.state.lock();
        if !state.home {
            state.home = true;
            self.nudge.notify_one();
        }
    }

    pub(super) fn is_home(&self) -> bool {
        self.state.lock().home
    }

    /// Whether it has been turned home while under way to a peer.
    pub(super) fn must_turn(&self) -> bool {
        let state = self.state.lock();
        state.home && state.leg.is_foreign()
    }

    pub(super) fn take_leg(&self, leg: &Leg) {
        self.state.lock().leg = leg.clone();
    }

    pub(super) fn can_start_over(&self) -> bool {
        !self.state.lock().released
    }
}

#[cfg(test)]
mod tests;

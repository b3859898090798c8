//! The cluster's state for `/stats` and the status page.

use super::Members;
use serde::Serialize;
use std::time::{Duration, SystemTime};

/// The object `cluster` of `/stats`.
#[derive(Debug, Serialize)]
pub struct Status {
    /// This node's name.
    pub node: String,
    /// All members, sorted by name.
    pub members: Vec<MemberStatus>,
    /// Seconds since a member last joined, left, went down or came up.
    pub changed_seconds_ago: u64,
}

/// A member in [`Status`].
#[derive(Debug, Serialize)]
pub struct MemberStatus {
    /// Its name on the ring.
    pub name: String,
    /// `self`, `up` or `down`.
    pub state: &'static str,
    /// The fraction of all digests that it owns when all members are up.
    pub share: f64,
}

/// A member in the list `members` of `/stats`.
#[derive(Clone, Debug)]
pub struct MemberFigures {
    /// Its name on the ring.
    pub name: String,
    /// Whether it is this node.
    pub itself: bool,
    /// Whether it is up.
    pub up: bool,
    /// When it last went down or came up; `None` if it has not since it joined.
    pub since: Option<SystemTime>,
    /// The fraction of all digests that it owns when all members are up.
    pub share: f64,
    /// How long the last probe took; `None` before the first one, and for this node.
    pub probe: Option<Duration>,
    /// Requests to it that failed.
    pub errors: u64,
}

impl Members {
    /// This node's name on the ring.
    pub fn advertised(&self) -> &str {
        &self.advertise
    }

    /// All members, sorted by name.
    pub fn figures(&self) -> Vec<MemberFigures> {
        let watched = self.watched.lock();
        let view = self.view();
        let figures = view.members().iter().enumerate().map(|(index, member)| {
            let peer = watched.get(&member.name);
            MemberFigures {
                name: member.name.to_string(),
                itself: member.itself,
                up: member.up,
                since: peer.and_then(|peer| peer.since),
                share: rounded(view.ring().share(index)),
                probe: peer.and_then(|peer| peer.probe),
                errors: peer.map_or(0, |peer| peer.series.errors()),
            }
        });
        figures.collect()
    }

    /// The cluster's state now.
    pub fn status(&self) -> Status {
        let view = self.view();
        let members = view.members().iter().enumerate().map(|(index, member)| MemberStatus {
            name: member.name.to_string(),
            state: match (member.itself, member.up) {
                (true, _) => "self",
                (false, true) => "up",
                (false, false) => "down",
            },
            share: rounded(view.ring().share(index)),
        });
        Status { node: self.advertise.clone(), members: members.collect(), changed_seconds_ago: view.changed_at.elapsed().as_secs() }
    }
}

/// Four decimal places are enough to read.
fn rounded(share: f64) -> f64 {
    (share * 1e4).round() / 1e4
}

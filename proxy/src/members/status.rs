//! The cluster as operators read it.

use super::Members;
use serde::Serialize;
use std::time::{Duration, SystemTime};

/// The cluster at one moment, in the words of `/stats`.
#[derive(Debug, Serialize)]
pub struct Status {
    /// This node's name.
    pub node: String,
    /// All members, in the order of their names.
    pub members: Vec<MemberStatus>,
    /// Since a member last came, went, fell or rose.
    pub changed_seconds_ago: u64,
}

/// One of them.
#[derive(Debug, Serialize)]
pub struct MemberStatus {
    /// Its name on the ring.
    pub name: String,
    /// `self`, `up` or `down`.
    pub state: &'static str,
    /// The part of all digests that it owns while everybody is up.
    pub share: f64,
}

/// One of them in figures.
#[derive(Clone, Debug)]
pub struct MemberFigures {
    /// Its name on the ring.
    pub name: String,
    /// It is this node.
    pub itself: bool,
    /// It answers.
    pub up: bool,
    /// When it last fell or rose; none if it has not since it came.
    pub since: Option<SystemTime>,
    /// The part of all digests that it owns while everybody is up.
    pub share: f64,
    /// How long the last probe took; none before the first, and of this node.
    pub probe: Option<Duration>,
    /// Attempts at it that failed.
    pub errors: u64,
}

impl Members {
    /// This node's name on the ring.
    pub fn advertised(&self) -> &str {
        &self.advertise
    }

    /// All members in figures, in the order of their names.
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

    /// How things are.
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

/// Four digits: more would claim more than anybody can see.
fn rounded(share: f64) -> f64 {
    (share * 1e4).round() / 1e4
}

//! The cluster as operators read it.

use super::Members;
use serde::Serialize;

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

impl Members {
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
            // Four digits: more would claim more than anybody can see.
            share: (view.ring().share(index) * 1e4).round() / 1e4,
        });
        Status { node: self.advertise.clone(), members: members.collect(), changed_seconds_ago: view.changed_at.elapsed().as_secs() }
    }
}

//! What a request wants, and where it is looked for.

use crate::plan::Plan;
use castier_blob::Digest;
use std::{fmt, sync::Arc};

/// What is loaded once for all who ask for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Key {
    /// The blob with this SHA-256.
    Blob(Digest),
    /// What a name stands for. Its SHA-256 is not known before all of it has come.
    Name(Digest),
}

impl Key {
    /// The SHA-256 that the bytes must have.
    pub const fn digest(&self) -> Option<Digest> {
        match self {
            Self::Blob(digest) => Some(*digest),
            Self::Name(_) => None,
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Blob(digest) => digest.fmt(f),
            Self::Name(name) => write!(f, "name:{name}"),
        }
    }
}

/// A key, and the location where it is looked for if no tier has it.
#[derive(Clone)]
pub struct Resource {
    /// What is wanted.
    pub key: Key,
    /// Where it is looked for.
    pub at: Arc<dyn Location>,
}

/// Where a resource is looked for: the origin, or a repository of another server.
///
/// A flight is shared by all locations, since the bytes are the same. But what one location does not have, another may: so a request does not take an
/// absence or a fault from a flight of another location, as long as it has given nothing to the client.
pub trait Location: Send + Sync {
    /// Whom a flight asks. Called in the task of the request that starts the flight.
    fn plan(&self, key: &Key) -> Box<dyn Plan>;

    /// Tells locations apart; [`HOME`] is the origin.
    fn id(&self) -> u64;

    /// Whether tiers may keep what comes from here.
    fn is_kept(&self) -> bool {
        true
    }

    /// What comes from here may be seen by this.
    fn visibility(&self) -> Visibility {
        Visibility::Public
    }
}

/// The [`Location::id`] of the origin. Only the origin's absences are remembered in the cache.
pub const HOME: u64 = 0;

/// Who may see a kept blob.
///
/// A private blob has come only from locations that check each client's credentials. Everyone else gets it only after [`Cache::publish`]: when the location
/// that they ask has said that it has the blob too.
///
/// [`Cache::publish`]: crate::Cache::publish
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Visibility {
    /// Every request.
    #[default]
    Public,
    /// Only requests that have proved that they may.
    Private,
}

impl Visibility {
    /// Whether a request that may see blobs of this visibility may see one of the `other`.
    pub const fn sees(self, other: Self) -> bool {
        matches!((self, other), (Self::Private, _) | (_, Self::Public))
    }
}

/// The location whose flights ask what a function says: the origin.
pub(crate) struct Home<F>(pub F);

impl<F: Fn(&Digest) -> Box<dyn Plan> + Send + Sync> Location for Home<F> {
    fn plan(&self, key: &Key) -> Box<dyn Plan> {
        match key {
            Key::Blob(digest) | Key::Name(digest) => (self.0)(digest),
        }
    }

    fn id(&self) -> u64 {
        HOME
    }
}

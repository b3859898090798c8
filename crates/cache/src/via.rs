//! How a blob was found.

/// The tiers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tier {
    /// Memory.
    Memory,
    /// The part of memory for hot blobs that other nodes own.
    Mirror,
    /// Disk.
    Disk,
}

impl Tier {
    /// All of them, in the order of their declaration.
    pub const ALL: [Self; 3] = [Self::Memory, Self::Mirror, Self::Disk];

    /// The label in metrics and records.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Mirror => "mirror",
            Self::Disk => "disk",
        }
    }
}

/// The kinds of sources.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceKind {
    /// The source of truth.
    Origin,
    /// Another node of the cluster.
    Peer,
}

impl SourceKind {
    /// All of them, in the order of their declaration.
    pub const ALL: [Self; 2] = [Self::Origin, Self::Peer];

    /// The label in metrics and records.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Origin => "origin",
            Self::Peer => "peer",
        }
    }
}

/// Which node keeps a blob for the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// This node: its memory and its disk may keep the blob.
    ThisNode,
    /// A peer. Here only the mirror may keep the blob, so that the nodes together are one cache and not as many copies of the same.
    Peer,
}

/// How a blob was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Via {
    /// A tier had it.
    Tier(Tier),
    /// A flight brings it, or a source was asked about it.
    Flight {
        /// Where the bytes come from.
        from: SourceKind,
        /// Another request had started the flight.
        collapsed: bool,
        /// A tier will keep it.
        kept: bool,
    },
}

impl Via {
    /// A source was asked, and no bytes came.
    pub const fn asked(from: SourceKind) -> Self {
        Self::Flight { from, collapsed: false, kept: false }
    }

    /// The tier that had the blob, if one did.
    pub const fn tier(self) -> Option<Tier> {
        match self {
            Self::Tier(tier) => Some(tier),
            Self::Flight { .. } => None,
        }
    }
}

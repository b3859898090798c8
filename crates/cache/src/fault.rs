//! What can go wrong on the data path, and whose fault it is. Knows no HTTP status: one exhaustive match maps each fault to one.
//!
//! Invariant: "absent" is not a fault. It is an answer, and only the origin can give it.

use castier_blob::Mismatch;
use rustix::io::Errno;
use std::error::Error;

/// Why a request did not get its blob. Cheap to clone: every reader of a flight gets the same one.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Fault {
    /// The uploaded bytes are not the blob they were announced as.
    #[error("upload refused: {0}")]
    Mismatch(Mismatch),
    /// The request cannot be understood; the text says what would be right.
    #[error("{0}")]
    BadRequest(String),
    /// The blob is larger than `limits.max_blob`.
    #[error("larger than the limit of {limit} bytes")]
    TooLarge {
        /// The limit that was hit.
        limit: u64,
    },
    /// The blob is larger than the origin takes.
    #[error("larger than the origin takes")]
    OriginRefusesSize,
    /// No connection to the source, or it broke and could not be mended.
    #[error("{source_name} unreachable: {why}")]
    Unreachable {
        /// Which source.
        source_name: &'static str,
        /// How the last attempt failed.
        why: String,
    },
    /// The source sent no byte for `origin.read_timeout`.
    #[error("{source_name} silent for too long: {why}")]
    Silent {
        /// Which source.
        source_name: &'static str,
        /// What was being waited for.
        why: String,
    },
    /// The source has failed too often in a row, so it was not asked: the circuit breaker is open.
    #[error("{source_name} not asked: it failed too often in a row (circuit breaker)")]
    NotAsked {
        /// Which source.
        source_name: &'static str,
    },
    /// The source answered, but not as a CAS answers.
    #[error("{source_name} gave an unusable answer: {why}")]
    Unusable {
        /// Which source.
        source_name: &'static str,
        /// What it said.
        why: String,
    },
    /// The source refuses castier itself: its credentials, a permission, or the bucket that it names. The text names what is wrong.
    #[error("{source_name} refuses castier: {why}")]
    Denied {
        /// Which source.
        source_name: &'static str,
        /// What it said, and what to do.
        why: String,
    },
    /// The source's bytes do not hash to the digest that was asked for.
    #[error("{source_name} sent corrupt bytes: {mismatch}")]
    Corrupt {
        /// Which source.
        source_name: &'static str,
        /// What they hashed to.
        mismatch: Mismatch,
    },
    /// A limit of the tier is reached; worth trying again.
    #[error("over a limit: {0}")]
    Busy(Limit),
    /// The origin has no space for the upload.
    #[error("the origin is full")]
    OriginFull,
    /// The origin does not do this (DELETE, most often).
    #[error("the origin does not allow this method")]
    NotAllowed,
    /// The client went away, or stopped in the middle of its upload.
    #[error("client gone: {0}")]
    ClientGone(String),
    /// The client sent no byte of its upload for `limits.idle_timeout`.
    #[error("client silent for too long")]
    ClientSilent,
    /// All readers of the flight have left, and too much was missing to finish it.
    #[error("abandoned by all its readers")]
    Abandoned,
    /// The blob is kept, and this request may not see it before its own location has said that it has it: see `Cache::publish`.
    #[error("the blob is kept for others only")]
    Hidden,
    /// A fault of this program.
    #[error("internal: {0}")]
    Internal(String),
}

impl Fault {
    /// Whether the transfer from the source broke, so that another source may do better.
    pub const fn is_broken_transfer(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Silent { .. } | Self::NotAsked { .. } | Self::Unusable { .. })
    }

    /// Whether a limit of this node keeps it from asking this source now. Another source may be free.
    pub const fn is_source_limit(&self) -> bool {
        matches!(self, Self::Busy(Limit::Fills | Limit::Requests | Limit::Files | Limit::Origin))
    }

    /// Its kind in one word, for spans.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Mismatch(_) => "mismatch",
            Self::BadRequest(_) => "bad_request",
            Self::TooLarge { .. } | Self::OriginRefusesSize => "too_large",
            Self::Unreachable { .. } => "unreachable",
            Self::Silent { .. } => "silent",
            Self::NotAsked { .. } => "not_asked",
            Self::Unusable { .. } => "unusable",
            Self::Denied { .. } => "denied",
            Self::Corrupt { .. } => "corrupt",
            Self::Busy(_) => "busy",
            Self::OriginFull => "full",
            Self::NotAllowed => "not_allowed",
            Self::ClientGone(_) | Self::ClientSilent => "client_gone",
            Self::Abandoned => "abandoned",
            Self::Hidden => "hidden",
            Self::Internal(_) => "internal",
        }
    }
}

/// The limits that a request can run into. The text is the `reason` label of `castier_shed_requests_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// `limits.max_connections`.
    Connections,
    /// `limits.client_memory`.
    ClientMemory,
    /// `fill.max_in_flight`, for longer than `fill.max_wait`, or beside more than `fill.max_waiting`.
    Fills,
    /// `origin.max_requests`, for longer than `origin.read_timeout`.
    Requests,
    /// `fill.spool`.
    Spool,
    /// The system's limit on open files.
    Files,
    /// The origin itself said that it is over a limit.
    Origin,
    /// `disk.outbox`, or the outbox cannot be written.
    Outbox,
}

impl Limit {
    /// Every reason, for making the series exist from the start.
    pub const ALL: [Self; 8] =
        [Self::Connections, Self::ClientMemory, Self::Fills, Self::Requests, Self::Spool, Self::Files, Self::Origin, Self::Outbox];

    /// As it stands in labels and texts.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Connections => "connections",
            Self::ClientMemory => "client_memory",
            Self::Fills => "fills",
            Self::Requests => "requests",
            Self::Spool => "spool",
            Self::Files => "files",
            Self::Origin => "origin",
            Self::Outbox => "outbox",
        }
    }
}

impl std::fmt::Display for Limit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Whether this error, or what caused it, is that no more files may be open.
pub fn ran_out_of_files(error: &(dyn Error + 'static)) -> bool {
    std::iter::successors(Some(error), |&error| error.source()).any(|error| {
        let number = error.downcast_ref().and_then(Errno::from_io_error);
        matches!(number, Some(Errno::MFILE | Errno::NFILE))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn running_out_is_told_from_anything_else() {
        #[derive(Debug, thiserror::Error)]
        #[error("somewhere")]
        struct Somewhere(#[source] std::io::Error);
        let io = |errno: Errno| std::io::Error::from(errno);
        assert!(ran_out_of_files(&io(Errno::MFILE)) && ran_out_of_files(&Somewhere(io(Errno::NFILE))));
        assert!(!ran_out_of_files(&io(Errno::CONNREFUSED)) && !ran_out_of_files(&Somewhere(std::io::Error::other("24"))));
    }
}

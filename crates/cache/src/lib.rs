//! A cache of content-addressed blobs: it gets each blob once from its sources, verifies every byte, and keeps it in memory and on disk.
//!
//! [`Cache::get`] looks into memory and onto the disk. If neither has the blob, it joins or starts a flight, whose fill asks the [`Source`]s that its
//! [`Plan`] names, spools the bytes as they come, hashes them, and has the tiers keep the blob once it has verified. Meanwhile every request reads from
//! the flight through its [`Reader`].
//!
//! Invariants:
//! - Only a [`castier_blob::Verified`] can be kept.
//! - The last 64 KiB of every response wait for the digest, so no response with wrong bytes can complete.
//! - One load per blob, however many ask.
//! - "Absent" is an answer of the origin's. A fault is never taken for it, and never remembered.
//! - No failure, fullness or slowness of the disk fails a request, or delays it beyond `disk.timeout`.
//! - Everything is bounded in bytes and in time.
//!
//! This crate knows no HTTP, no cluster and no particular source.

mod absences;
mod ages;
mod budget;
mod buffer;
mod cache;
mod disk;
mod eviction;
mod fault;
mod fill;
mod flights;
mod memory;
mod metrics;
mod plan;
mod pool;
mod purges;
mod reader;
mod retries;
mod source;
mod spool;
mod tier;
mod tiers;
mod upload;
mod via;

pub use budget::{Budget, Lease};
pub use buffer::plenty;
pub use cache::{Cache, Planner};
pub use disk::{Disk, DiskState};
pub use fault::{Fault, Limit, ran_out_of_files};
pub use flights::{Asker, HOLD_BACK, InProgress};
pub use memory::Memory;
pub use metrics::{DiskError, DiskOp, LoadResult, Metrics, SECONDS, Skip};
pub use plan::{OneSource, Outcome, Plan, Step, Then};
pub use reader::{Hit, PIECE, Part, Reader};
pub use source::{Answer, Ask, Incoming, Put, Source, Stat, Store};
pub use spool::Spools;
pub use tier::TierStats;
pub use tiers::Tiers;
pub use upload::{Body, CopyTo, Next, SMALL, Upload};
pub use via::{Owner, SourceKind, Tier, Via};

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
//! This crate knows no HTTP, no cluster and no particular source. Over a closure:
//!
//! ```
//! use castier_blob::Digest;
//! use castier_cache::{Answer, Ask, Asker, Cache, Incoming, Part, Source};
//! use futures::{future::{BoxFuture, join_all}, stream};
//! use std::sync::{Arc, atomic::{AtomicU32, Ordering::Relaxed}};
//!
//! # tokio::runtime::Runtime::new().unwrap().block_on(async {
//! let (blob, loads) = (bytes::Bytes::from(vec![7; 3 << 20]), Arc::new(AtomicU32::new(0)));
//! let (digest, stored, loaded) = (Digest::of(&blob), blob.clone(), loads.clone());
//! let source = move |ask: Ask| -> BoxFuture<'static, _> {
//!     loaded.fetch_add(1, Relaxed);
//!     let rest = stored.slice(ask.from as usize..);
//!     Box::pin(async move { Ok(Answer::Bytes(Incoming::new(None, stream::iter([Ok(rest)])))) })
//! };
//! let cache = Cache::over(Arc::new(source) as Arc<dyn Source>)?;
//!
//! // A herd: one load, however many ask.
//! let herd = join_all((0..100).map(|_| cache.get(&digest, Asker::Client, |_| Part::Whole))).await;
//! for hit in herd {
//!     let (mut hit, mut read) = (hit?.expect("the blob is there"), Vec::new());
//!     while let Some(piece) = hit.reader.next().await? { read.extend_from_slice(&piece) }
//!     assert_eq!(read, blob);
//! }
//! assert_eq!(loads.load(Relaxed), 1);
//! // A range.
//! let mut part = cache.get(&digest, Asker::Client, |_| Part::Bytes(10..15)).await?.expect("the blob is kept");
//! assert_eq!(part.reader.next().await?.as_deref(), Some(&[7; 5][..]));
//! # Ok::<_, Box<dyn std::error::Error>>(())
//! # }).unwrap();
//! ```

mod absences;
mod ages;
mod budget;
mod buffer;
mod cache;
pub mod contract;
mod disk;
mod eviction;
mod fault;
mod fill;
mod flights;
mod memory;
mod metrics;
mod parallel;
mod plan;
mod pool;
mod purges;
mod reader;
mod resource;
mod retries;
mod source;
mod spool;
mod tier;
mod tiers;
mod upload;
mod via;

pub use budget::{Budget, Lease};
pub use buffer::plenty;
pub use cache::{Begun, Cache, Planner};
pub use disk::{Disk, DiskState};
pub use fault::{Fault, Limit, ran_out_of_files};
pub use flights::{Asker, HOLD_BACK, InProgress};
pub use memory::Memory;
pub use metrics::{DiskError, DiskOp, LoadResult, Metrics, Skip};
pub use parallel::{RangeSupport, most_ahead};
pub use plan::{OneSource, Outcome, Plan, Step, Then};
pub use pool::{Pool, PoolError, PoolEvent};
pub use reader::{Hit, PIECE, Part, Reader};
pub use resource::{HOME, Key, Location, Resource, Visibility};
pub use retries::RetryBudget;
pub use source::{Answer, Ask, Incoming, NoRange, Put, Ranges, Source, Stat, Store};
pub use spool::Spools;
pub use tier::TierStats;
pub use tiers::Tiers;
pub use upload::{Body, CopyTo, Next, SMALL, Upload};
pub use via::{Owner, SourceKind, Tier, Via};

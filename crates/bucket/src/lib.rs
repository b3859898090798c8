//! A bucket of an object store (S3, Google Cloud Storage, Azure Blob Storage) as a [`Source`] and a [`Store`] of blobs, and as a store of entries.
//!
//! - [`Bucket`]: the blobs, in `blobs`; the entries of `/ac` and `/kv`, in `entries`.
//! - `transport`: the HTTP client, with `limiter`.
//! - `upload`: how an upload gets there, in one request or in parts; `leftovers`: what becomes of uploads that were not ended.
//! - `s3`: how castier logs in there, with `profile`.
//! - `check`: what the bucket lets castier do. `objects`: a list of all of it.
//!
//! Signatures, credentials and the three protocols are those of the crate `object_store`.
//!
//! Invariant: only the store's own word that it has no such key is an absence. A missing bucket, a permission that lacks and every other error is a
//! fault.

mod blobs;
mod check;
mod entries;
mod fault;
mod leftovers;
mod limiter;
mod metrics;
mod objects;
mod profile;
mod s3;
mod transport;
mod upload;

pub use blobs::{Bucket, Options};
pub use entries::{Condition, Delete, Entry, Listed, MOST_LISTED, MOST_MEMBERS, Objects, PutEntry};
#[doc(hidden)]
pub use leftovers::Page;
pub use metrics::Metrics;
pub use objects::Object;
#[doc(hidden)]
pub use transport::element;

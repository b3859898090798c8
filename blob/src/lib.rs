//! What a blob is, seen from anywhere: immutable bytes named by their SHA-256.
//!
//! Pure: nothing here does I/O, reads a clock or knows an async runtime, so that the tier and the origin answer the same
//! request in the same words.
//!
//! - [`Digest`]: the name of a blob.
//! - [`Verifier`] → [`Verified`]: the only proof that bytes are the blob they claim to be.
//! - [`Selection`]: what part of a blob a request asks for, given its headers.
//! - [`entry`]: names of what is stored under a key.
//! - [`wire`]: paths, headers and error bodies as they stand on the wire.
//! - [`forwarded`], [`trace`]: who a request comes from, and which request it is.

mod digest;
pub mod entry;
mod fields;
pub mod forwarded;
mod select;
pub mod trace;
mod verify;
pub mod wire;

pub use digest::{Digest, MalformedDigest};
pub use fields::Fields;
pub use select::{Selection, names_this_blob, select};
pub use verify::{Mismatch, Verified, Verifier};

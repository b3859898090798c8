//! What a blob is, seen from anywhere: immutable bytes named by their SHA-256.
//!
//! Pure: nothing here does I/O, reads a clock or knows an async runtime.
//!
//! - [`Digest`]: the name of a blob.
//! - [`Verifier`] → [`Verified`]: the only proof that bytes are the blob they claim to be.

mod digest;
mod verify;

pub use digest::{Digest, MalformedDigest};
pub use verify::{Mismatch, Verified, Verifier};

//! What a blob is, seen from anywhere: immutable bytes named by their SHA-256.
//!
//! Pure: nothing here does I/O, reads a clock or knows an async runtime.
//!
//! - [`Digest`]: the name of a blob.
//! - [`Verifier`] → [`Verified`]: the only proof that bytes are the blob they claim to be. The verifier owns the [`Sink`] that the bytes go to, and
//!   hands out both together.

mod digest;
mod verify;

pub use digest::{Digest, MalformedDigest};
pub use verify::{Mismatch, Sink, Verified, Verifier};

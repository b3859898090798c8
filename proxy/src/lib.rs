//! castier: a caching tier in front of a content-addressed store.
//!
//! One GET walks through the house like this. [`gate`] reads its head off the connection; [`http`] asks the [`ladder`] for the blob;
//! the ladder looks into [`memory`] and onto the [`disk`], and if neither has it, joins or starts a [`flight`], which opens the origin through
//! [`upstream`], spools the bytes as they come ([`spool`]), hashes them, and keeps the blob once it has verified. Meanwhile everyone
//! who asked reads from the flight. [`serve`] says what the answer's head is, whichever way the blob was found, and
//! [`http`] writes it. What is no blob goes to the origin through [`relay`].

pub mod admin;
pub mod buffer;
mod chunks;
pub mod conn;
pub mod descriptors;
pub mod disk;
pub mod eviction;
pub mod fault;
pub mod flight;
pub mod gate;
pub mod http;
pub mod ladder;
pub mod members;
pub mod memory;
pub mod metrics;
pub mod plan;
pub mod pool;
pub mod purge;
pub mod recent;
pub mod record;
pub mod relay;
pub mod ring;
pub mod secret;
pub mod serve;
pub mod spool;
pub mod tier;
pub mod trace;
pub mod upload;
pub mod upstream;
pub mod via;

//! castier: a caching tier in front of a content-addressed store.
//!
//! A GET takes this way. [`request_head`] reads its head off the connection. [`http`] asks the [`cache`] for the blob. The cache looks into [`memory`] and
//! onto the [`disk`]. If neither has the blob, it joins or starts a flight ([`flights`]), whose [`fill`] asks the [`source`]s that its [`plan`] names, spools
//! the bytes as they come ([`spool`]), hashes them, and has the blob kept once it has verified. Meanwhile every request reads from the flight
//! ([`reader`]). [`reply`] makes the answer's head, however the blob was found, and [`http`] writes it. Everything that is no blob goes to the origin
//! through [`relay`].

mod absences;
pub mod access_log;
pub mod admin;
pub mod budget;
pub mod buffer;
pub mod cache;
mod chunks;
pub mod cluster_plan;
pub mod connection;
pub mod descriptors;
pub mod disk;
pub mod eviction;
pub mod fault;
mod fill;
pub mod flights;
pub mod groupcache;
pub mod http;
pub mod members;
pub mod memory;
pub mod memory_plan;
pub mod metrics;
pub mod node;
pub mod plan;
pub mod pool;
pub mod purge;
mod purges;
pub mod reader;
pub mod recent;
pub mod relay;
pub mod reply;
pub mod request_body;
pub mod request_head;
mod retries;
pub mod ring;
pub mod secret;
pub mod source;
pub mod spool;
pub mod tier;
pub mod tiers;
pub mod trace;
pub mod traced_plan;
pub mod upload;
pub mod upstream;
pub mod via;
pub mod via_header;

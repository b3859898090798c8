//! castier: a caching tier in front of a content-addressed store.
//!
//! A GET takes this way. [`request_head`] reads its head off the connection. [`http`] asks the cache for the blob ([`castier_cache`]). If no tier has it,
//! the cache starts or joins a flight, which asks peers and the origin as [`cluster_plan`] says, through [`upstream`]. [`reply`] makes the answer's head,
//! however the blob was found, and [`http`] writes it. Everything that is no blob goes to the origin through [`relay`].

pub mod access_log;
pub mod admin;
mod chunks;
pub mod cluster_plan;
pub mod connection;
pub mod descriptors;
pub mod groupcache;
pub mod http;
pub mod members;
pub mod memory_plan;
pub mod metrics;
pub mod node;
pub mod purge;
pub mod recent;
pub mod relay;
pub mod reply;
pub mod request_body;
pub mod request_head;
pub mod ring;
pub mod secret;
pub mod trace;
pub mod traced_plan;
pub mod upstream;
pub mod via_header;

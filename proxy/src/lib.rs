//! castier: a caching tier in front of a content-addressed store.
//!
//! A GET takes this way. [`listener`] accepts the connection, and [`request_head`] reads a head off it. A plain hit is answered by `fast_path`. For all
//! else `session` has one of the [`handlers`] make a [`reply`]. A handler asks the cache ([`castier_cache`]). If no tier has the blob, the cache starts or
//! joins a flight, which asks peers ([`castier_cluster`]) and the origin ([`castier_upstream`]). What is no blob goes to the origin through
//! [`handlers::relay`].

pub mod access_log;
pub mod admin;
pub mod connection;
pub mod descriptors;
pub mod entrance;
pub mod events;
mod fast_path;
pub mod groupcache;
pub mod handlers;
pub mod http2;
pub mod listener;
pub mod memory_plan;
pub mod metrics;
pub mod node;
pub mod online_check;
pub mod outboxes;
pub mod peer_access;
#[doc(hidden)]
pub mod proxy_protocol;
pub mod recent;
pub mod reply;
pub mod request_body;
pub mod request_head;
pub mod routes;
mod secured;
mod session;

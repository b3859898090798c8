//! Every key of castier and castier-origin: what it means, its default, and the reason for that default.
//!
//! - [`Castier`] and [`OriginServer`]: one struct for each program, one struct for each TOML section, in the order of the documentation. The
//!   doc comments are the documentation: `scripts/keys` writes the example files and the tables in `docs/operations.md` from them
//!   (`tests/keys.rs` says how to write one).
//! - [`load`]: reads file and environment. Returns a checked configuration, or *all* that is wrong with it. [`load_with`] also takes checks that
//!   this crate cannot make itself, such as those of path templates.
//! - [`print()`], [`keys`], [`changed`]: a configuration as text, its keys, and the difference between two.
//!
//! The crate reads the configuration file, and checks that the files which it names can be read. It does no other I/O, reads no clock and
//! needs no async runtime.

mod access;
mod address;
mod bucket;
mod castier;
mod check;
mod cluster;
mod events;
mod file;
mod keys;
mod load;
mod origin;
mod problems;
mod route;
mod shared;
mod value;

pub use access::{Access, ListenTls, Role, Scopes, TlsClients, TlsFiles, TlsPair};
pub use bucket::{Bucket, KeyTemplate, S3, Service};
pub use castier::{Castier, Disk, Fill, Limits, Listen, Memory, Origin, Verify};
pub use cluster::{Cluster, ClusterTls, Peer, peer_secrets};
pub use events::{BrokerLogin, EventKind, EventSink, Protocol, SinkUrl};
pub use keys::{changed, keys, print};
pub use load::{Config, Loaded, environment, load, load_offline, load_offline_with, load_with};
pub use origin::{OriginLimits, OriginListen, OriginServer, Store};
pub use problems::Problems;
pub use route::{Route, RouteAccess, RouteCredentials, RouteKind, RouteQuery};
pub use shared::{Labels, Log, LogFormat, Loki, Network, Otlp, Proxies, Shutdown};
pub use value::{Malformed, OriginUrl, Policy, Share, Size, Span, Write};

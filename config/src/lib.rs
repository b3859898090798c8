//! Every knob of castier and castier-origin: what it means, its default, and the reason for that default.
//!
//! - [`Castier`] and [`OriginServer`]: one struct per program, one struct per TOML section, in the order of the documentation.
//! - [`load`]: file, then environment → a checked configuration, or *all* that is wrong with it.
//! - [`print`], [`keys`], [`changed`]: the same configuration as text, as a list of names, and as a difference.
//!
//! Reads the configuration file, and looks whether the files that it names can be read; no other I/O, no clock, no async runtime.

mod castier;
mod check;
mod cluster;
mod file;
mod load;
mod origin;
mod problems;
mod shape;
mod shared;
mod value;

pub use castier::{Castier, Disk, Fill, Limits, Listen, Memory, Origin, Verify};
pub use cluster::{Cluster, ClusterTls, Peer, peer_secrets};
pub use load::{Config, Loaded, environment, load, load_offline};
pub use origin::{OriginLimits, OriginListen, OriginServer, Store};
pub use problems::Problems;
pub use shape::{changed, keys, print};
pub use shared::{Labels, Log, LogFormat, Loki, Network, Otlp, Proxies, Shutdown};
pub use value::{Malformed, OriginUrl, Policy, Share, Size, Span};

//! Black-box tests of `castier`: real processes and real sockets, with an origin behind them that lies, stalls and dies as told.
//!
//! They need both programs: `cargo test` of the whole workspace builds them, as does `cargo build --release`.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on should stop where it is")]

mod admin;
mod chance;
mod cluster;
mod cluster_change;
mod cluster_dns;
mod config;
mod curl;
mod disk;
mod disk_crash;
mod disk_faults;
mod flight;
mod herd;
mod http;
mod k8s_identity;
mod lies;
mod lifecycle;
mod limits;
mod malformed;
mod memory;
mod outage;
mod peer;
mod peer_tls;
mod peers;
mod relay;
mod sanity;
mod support;
mod upload;

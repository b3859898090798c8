//! Black-box tests of `castier`: real processes and real sockets, in front of an origin that sends wrong bytes, stalls and ends on request.
//!
//! They need both programs: build them with `cargo test` of the whole workspace, or with `cargo build --release`.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on should stop where it is")]

mod absences;
mod addresses;
mod admin;
mod answers;
mod build_caches;
mod chance;
mod client_left;
mod client_memory;
mod cluster;
mod cluster_change;
mod cluster_dns;
mod config;
mod contract;
mod curl;
mod descriptors;
mod disk;
mod disk_crash;
mod disk_faults;
mod disk_hang;
mod disk_paths;
mod empty;
mod entries;
mod eviction;
mod flight;
mod herd;
mod http;
mod k8s_identity;
mod lies;
mod lifecycle;
mod limits;
mod loops;
mod malformed;
mod memory;
mod nginx_front;
mod operate;
mod otlp;
mod outage;
mod page;
mod peer;
mod peer_proof;
mod peer_tls;
mod peer_tls_end;
mod peers;
mod read_your_writes;
mod relay;
mod sanity;
mod series;
mod slow_clients;
mod stats;
mod support;
mod threads;
mod tracing;
mod upload;

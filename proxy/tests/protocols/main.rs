//! Real clients of real protocols, with castier between them and a real upstream: registries, package indexes and caches.
//!
//! `scripts/setup-tests` installs the programs. A test without its program prints SKIPPED, and passes.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on should stop where it is")]

mod apt;
mod build;
mod cargo;
mod checks;
mod entrance;
mod events;
mod go;
mod hostile;
mod http2;
mod huggingface;
mod keys;
mod lfs;
mod lossy;
mod matrix;
mod nix;
mod npm;
mod object_store;
mod oci;
mod outbox;
mod pack;
mod pypi;
mod races;
mod recipes;
mod stores;
mod support;
mod users;

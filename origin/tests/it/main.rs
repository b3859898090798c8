//! The real binary, on ephemeral ports, seen from outside.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on has failed")]

mod contract;
mod copy;
mod durability;
mod empty;
mod entries;
mod loki;
mod obstacles;
mod process;
mod support;
mod uploads;

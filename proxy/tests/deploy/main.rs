//! What castier is deployed with: `k8s/`, `compose.yaml`, the image, the package and the scripts, checked by the real tools.
//!
//! `scripts/setup-tests` installs the tools. A test without its tool says so and is skipped.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on should stop where it is")]

mod demo;
mod k8s;
mod live;
mod monitoring;
mod packages;
mod scripts;
mod tools;

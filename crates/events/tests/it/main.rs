//! Real brokers that are away, hang, are killed, or have no queue; webhooks that fail in every way; and the example of a consumer.
#![expect(clippy::unwrap_used, reason = "a helper outside a test function fails its test by panicking, as the tests do")]

mod brokers;
mod consumer;
mod support;
mod webhook;

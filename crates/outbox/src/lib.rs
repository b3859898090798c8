//! The outbox: a durable queue of uploads that clients have an acknowledgement for and that the store does not have yet (`origin.write = "behind"`),
//! and the journal of events.
//!
//! - [`Outbox`], in `outbox`: what is pending, in memory. Accepts uploads, and reads them.
//! - `journal`: the file with the records ([redb](https://www.redb.org)), and the thread that writes it. Bodies up to 64 KiB are in it.
//! - `bodies`: larger bodies, a file each.
//! - `uploader`: sends what is pending to the store, in order where order counts.
//! - [`WriteBehind`]: a store of blobs and entries that puts into the outbox, and reads from it first.
//! - [`Announced`]: a store that notes each new blob as an event.
//!
//! Invariants:
//! - An upload is acknowledged after its body and its record are on the disk (fsync), and not before.
//! - A record is removed after the store has acknowledged its body, and a body after its record. So a crash at any moment leaves every acknowledged body
//!   in the outbox or in the store. What has no record is deleted at the start: nobody was told of it.
//! - An entry is uploaded after every blob that was acknowledged before it.
//! - Sequence numbers are never used twice, and grow in the order of the acknowledgements.

mod announced;
mod bodies;
mod journal;
mod metrics;
mod outbox;
mod uploader;
mod write_behind;

#[cfg(test)]
mod tests;

pub use announced::{Announced, of_client};
pub use journal::{Event, Kind};
pub use metrics::Metrics;
pub use outbox::{Options, Outbox, Pending, PendingEntry, most_memory};
pub use write_behind::{Others, WriteBehind};

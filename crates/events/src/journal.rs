//! The journal: what dispatchers read events from.

use tokio::sync::watch;

/// Why the journal could not be read or written.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
pub struct JournalError(pub String);

/// The durable journal of events. Sequence numbers begin at 1 and grow.
///
/// The functions block, for as long as a small read or write of an embedded store takes. Dispatchers call them on threads for that.
pub trait Journal: Send + Sync + 'static {
    /// Up to `most` events behind the sequence number `after`, oldest first. Each is a complete CloudEvent in JSON ([`crate::Event::to_json`]).
    ///
    /// # Errors
    /// The journal cannot be read.
    fn read(&self, after: u64, most: usize) -> Result<Vec<(u64, Vec<u8>)>, JournalError>;

    /// The last sequence number that the receiver of this name has got. For a new name: the last one of the journal at this moment, durably, so
    /// that the receiver misses nothing that comes from now on.
    ///
    /// # Errors
    /// The journal cannot be read or written.
    fn cursor(&self, sink: &str) -> Result<u64, JournalError>;

    /// The receiver of this name has got everything up to `to`. Durable when it returns.
    ///
    /// # Errors
    /// The journal cannot be written.
    fn advance(&self, sink: &str, to: u64) -> Result<(), JournalError>;

    /// The last sequence number of the journal; it changes when events were appended, after they can be read.
    fn appended(&self) -> watch::Receiver<u64>;
}

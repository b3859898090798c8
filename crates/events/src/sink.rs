//! What every receiver has in common.

use crate::event::Envelope;
use async_trait::async_trait;
use bytes::Bytes;

/// An event on its way.
pub(crate) struct Record {
    pub(crate) sequence: u64,
    pub(crate) envelope: Envelope,
    /// The CloudEvent.
    pub(crate) json: Bytes,
}

/// Why events were not acknowledged.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// No connection, no answer, or a broken one.
    #[error("{0}")]
    Unreachable(String),
    /// The receiver answered, and does not take the events.
    #[error("{0}")]
    Refused(String),
    /// The journal cannot be read.
    #[error("{0}")]
    Journal(String),
}

/// What came of an attempt to deliver.
pub(crate) struct Outcome {
    /// So many of the records, the oldest ones, are acknowledged.
    pub(crate) acknowledged: usize,
    /// Why it was not more. `None`: as many as were sent.
    pub(crate) failure: Option<Failure>,
}

impl Outcome {
    pub(crate) const fn all(acknowledged: usize) -> Self {
        Self { acknowledged, failure: None }
    }
}

impl From<Failure> for Outcome {
    fn from(failure: Failure) -> Self {
        Self { acknowledged: 0, failure: Some(failure) }
    }
}

/// A receiver of events.
///
/// A dispatcher drops the future of `deliver` when `events.timeout` is over. So an implementation takes the connection out of itself while it
/// uses it, and puts it back only after success. The next attempt then connects anew, which a connection that hangs needs.
#[async_trait]
pub(crate) trait Sink: Send + Sync {
    /// Sends the oldest of these records, as many as it likes but at least one, and waits for their acknowledgement.
    ///
    /// Order: if a record is not acknowledged, then it must not happen that a later one is, unless an earlier attempt delivered both in order.
    async fn deliver(&mut self, records: &[Record]) -> Outcome;
}

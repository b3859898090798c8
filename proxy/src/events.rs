//! The events of this node: the journal in the outbox, as `castier-events` reads it.

use castier_events::{CorruptSource, Event, Journal, JournalError, Kind};
use castier_outbox::{self as outbox, Outbox};
use std::{
    sync::Arc,
    time::{Duration, UNIX_EPOCH},
};
use tokio::sync::watch;

/// The events in an outbox.
pub struct OutboxJournal {
    outbox: Arc<Outbox>,
    /// This node's name in events.
    node: String,
}

impl OutboxJournal {
    /// The events in `outbox`, of the node of this name.
    pub const fn new(outbox: Arc<Outbox>, node: String) -> Self {
        Self { outbox, node }
    }

    fn event(&self, number: u64, event: &outbox::Event) -> Vec<u8> {
        let outbox::Event { kind, digest, size, at, client, source } = event;
        let kind = match kind {
            outbox::Kind::Stored => Kind::Stored,
            outbox::Kind::Deleted => Kind::Deleted,
            outbox::Kind::Corrupt => Kind::Corrupt(match source.as_deref() {
                Some("client") => CorruptSource::Client,
                Some("peer") => CorruptSource::Peer,
                Some("disk") => CorruptSource::Disk,
                _ => CorruptSource::Origin,
            }),
        };
        let time = UNIX_EPOCH + Duration::from_millis(*at);
        // Numbers alone would be used again after the journal was deleted.
        let id = format!("{:016x}-{number}", self.outbox.journal_id());
        Event::new(kind, digest, *size, &self.node, client.as_deref(), time, &id).to_json()
    }
}

impl Journal for OutboxJournal {
    fn read(&self, after: u64, most: usize) -> Result<Vec<(u64, Vec<u8>)>, JournalError> {
        let events = self.outbox.events(after, most).map_err(JournalError)?;
        Ok(events.into_iter().map(|(number, event)| (number, self.event(number, &event))).collect())
    }

    fn cursor(&self, sink: &str) -> Result<u64, JournalError> {
        self.outbox.cursor(sink).map_err(JournalError)
    }

    fn advance(&self, sink: &str, to: u64) -> Result<(), JournalError> {
        self.outbox.advance(sink, to).map_err(JournalError)
    }

    fn appended(&self) -> watch::Receiver<u64> {
        self.outbox.last_event()
    }
}

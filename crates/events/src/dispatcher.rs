//! The task of one receiver: reads the journal, delivers, and advances the cursor.

use crate::{
    event::Envelope,
    journal::{Journal, JournalError},
    metrics::Series,
    sink::{Failure, Outcome, Record, Sink},
};
use backon::{BackoffBuilder as _, ExponentialBackoff, ExponentialBuilder};
use castier_config::EventKind;
use std::{
    future::pending,
    mem::{Discriminant, discriminant},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    sync::watch,
    task::spawn_blocking,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

/// How many events are read at once: some 100 KiB.
const READ: usize = 256;
/// While events are delivered, the cursor becomes durable this often. After a crash the events since then are delivered again.
const SAVE: Duration = Duration::from_secs(1);
/// The pauses between attempts.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

pub(crate) struct Dispatcher {
    pub(crate) name: String,
    /// For the log, without secrets.
    pub(crate) url: String,
    pub(crate) types: Vec<EventKind>,
    pub(crate) sink: Box<dyn Sink>,
    pub(crate) timeout: Duration,
    pub(crate) journal: Arc<dyn Journal>,
    pub(crate) series: Series,
    /// The last sequence number that was acknowledged.
    pub(crate) cursor: u64,
    /// What the journal has as the cursor.
    pub(crate) saved: u64,
    pub(crate) appended: watch::Receiver<u64>,
    /// Ends when nothing waits, or at the first failure.
    pub(crate) finish: CancellationToken,
    /// Ends at once.
    pub(crate) end: CancellationToken,
    /// The failure of the last attempt. A state is logged once, and not at each attempt.
    pub(crate) trouble: Option<Discriminant<Failure>>,
}

impl Dispatcher {
    pub(crate) async fn run(mut self) {
        let mut pauses = pauses();
        loop {
            let finish = self.finish.clone();
            // Looked at before the journal is read. Otherwise: 1. the round reads, and finds nothing; 2. an event is appended; 3. castier is told
            // to end; 4. the dispatcher would end, and leave the event for the next start.
            let finishing = finish.is_cancelled();
            match self.round().await {
                Ok(true) => pauses = self::pauses(),
                Ok(false) if finishing => break,
                Ok(false) => tokio::select! {
                    () = self.more() => {}
                    () = finish.cancelled() => {}
                },
                Err(failure) => {
                    self.report(&failure);
                    if finish.is_cancelled() {
                        break;
                    }
                    let pause = pauses.next().unwrap_or(LONGEST_PAUSE);
                    tokio::select! {
                        () = sleep(pause) => {}
                        () = finish.cancelled() => break,
                    }
                }
            }
        }
    }

    /// Waits until events were appended.
    async fn more(&mut self) {
        if self.appended.changed().await.is_err() {
            // The journal is gone, and with it every new event.
            pending::<()>().await;
        }
    }

    /// Reads some events, and delivers them. `false`: there were none.
    async fn round(&mut self) -> Result<bool, Failure> {
        self.save().await?;
        // Seen before the journal is read: what is appended after that ends the wait.
        self.appended.borrow_and_update();
        let cursor = self.cursor;
        let read = self.with_journal(move |journal, _| journal.read(cursor, READ)).await?;
        let Some((last, _)) = read.last() else {
            self.series.position.set(self.cursor, None);
            return Ok(false);
        };
        let last = *last;
        let records: Vec<_> = read.into_iter().filter_map(|(sequence, json)| self.wanted(sequence, json)).collect();
        let delivered = self.deliver(&records).await;
        if delivered.is_ok() {
            self.cursor = last;
        }
        // What was acknowledged counts, even if the rest failed.
        self.save().await.and(delivered)?;
        Ok(true)
    }

    fn wanted(&self, sequence: u64, json: Vec<u8>) -> Option<Record> {
        let Some(envelope) = Envelope::of(&json) else {
            self.series.failures.inc();
            tracing::error!(
                sink = self.name,
                sequence,
                "an event in the journal cannot be read, and is left out: this is a bug; please report it"
            );
            return None;
        };
        let wanted = envelope.kind.is_none_or(|kind| self.types.contains(&kind));
        wanted.then(|| Record { sequence, envelope, json: json.into() })
    }

    async fn deliver(&mut self, records: &[Record]) -> Result<(), Failure> {
        let (mut rest, mut saved) = (records, Instant::now());
        while let Some(first) = rest.first() {
            self.series.position.set(self.cursor, Some(first.envelope.time));
            let end = self.end.clone();
            let Outcome { acknowledged, failure } = tokio::select! {
                outcome = timeout(self.timeout, self.sink.deliver(rest)) => {
                    outcome.unwrap_or_else(|_| Failure::Unreachable(format!("no acknowledgement within {:?}", self.timeout)).into())
                }
                () = end.cancelled() => Failure::Unreachable("castier ends".into()).into(),
            };
            let (done, undone) = rest.split_at(acknowledged.min(rest.len()));
            rest = undone;
            if let Some(last) = done.last() {
                self.cursor = last.sequence;
                self.series.delivered.inc_by(acknowledged as u64);
                self.series.position.set(self.cursor, rest.first().map(|record| record.envelope.time));
            }
            if let Some(failure) = failure {
                return Err(failure);
            }
            self.recover();
            if saved.elapsed() >= SAVE {
                self.save().await?;
                saved = Instant::now();
            }
        }
        Ok(())
    }

    async fn save(&mut self) -> Result<(), Failure> {
        let cursor = self.cursor;
        if self.saved != cursor {
            self.with_journal(move |journal, name| journal.advance(name, cursor)).await?;
            self.saved = cursor;
        }
        Ok(())
    }

    async fn with_journal<T: Send + 'static>(
        &self,
        ask: impl FnOnce(&dyn Journal, &str) -> Result<T, JournalError> + Send + 'static,
    ) -> Result<T, Failure> {
        let (journal, name) = (self.journal.clone(), self.name.clone());
        let asked = spawn_blocking(move || ask(&*journal, &name)).await;
        asked.map_err(|error| Failure::Journal(error.to_string()))?.map_err(|error| Failure::Journal(error.to_string()))
    }

    fn report(&mut self, failure: &Failure) {
        self.series.failures.inc();
        self.series.up.set(0);
        let kind = discriminant(failure);
        if self.trouble == Some(kind) || self.end.is_cancelled() {
            return;
        }
        self.trouble = Some(kind);
        let (sink, url, waiting, error) = (&self.name, &self.url, self.series.position.pending(), failure.to_string());
        match failure {
            Failure::Unreachable(_) => {
                tracing::warn!(sink, url, waiting, error, "events wait: their receiver cannot be reached; castier goes on trying")
            }
            Failure::Refused(_) => {
                tracing::warn!(sink, url, waiting, error, "events wait: their receiver does not take them; castier goes on trying")
            }
            Failure::Journal(_) => tracing::error!(sink, error, "events wait: their journal in disk.path cannot be used; look at the disk"),
        }
    }

    fn recover(&mut self) {
        self.series.up.set(1);
        if self.trouble.take().is_some() {
            tracing::info!(sink = self.name, url = self.url, waiting = self.series.position.pending(), "events are delivered again");
        }
    }
}

/// Without end, and not the same for all nodes.
fn pauses() -> ExponentialBackoff {
    ExponentialBuilder::default().with_min_delay(FIRST_PAUSE).with_max_delay(LONGEST_PAUSE).with_jitter().without_max_times().build()
}

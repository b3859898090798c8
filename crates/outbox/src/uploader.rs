//! Sends what is pending to the store, without end: several records at once while it works, one at a time while it fails.

use crate::{
    journal::{Body, Record, What},
    outbox::{Outbox, age},
    write_behind::Others,
};
use backon::{BackoffBuilder as _, ExponentialBuilder};
use castier_blob::Digest;
use castier_bucket::Objects;
use castier_cache::{Fault, Store, Upload};
use castier_wire::entry::Name;
use futures::StreamExt as _;
use std::{
    sync::{Arc, atomic::Ordering::AcqRel},
    time::{Duration, Instant},
};
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{sleep, sleep_until},
};

/// The pauses after a failure.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// The pause before an entry is tried again that has to wait for blobs of other nodes.
const WAIT_FOR_OTHERS: Duration = Duration::from_millis(250);
/// How often the metrics are brought up to date if nothing else does it.
const TICK: Duration = Duration::from_secs(1);

/// How an attempt has ended.
enum Done {
    Uploaded,
    /// It has to wait for blobs that other nodes have accepted before.
    Waits,
    /// Its bytes are damaged or gone.
    Lost(String),
    Failed(Fault),
}

pub(crate) struct Uploader {
    pub outbox: Arc<Outbox>,
    pub blobs: Arc<dyn Store>,
    pub entries: Arc<dyn Objects>,
    pub others: Option<Arc<dyn Others>>,
    /// `disk.outbox_workers`.
    pub workers: usize,
    /// `limits.max_entry`.
    pub most_entry: u64,
}

impl Uploader {
    /// Runs until `stopped`. Uploads that are on their way are given up then, and begin anew with the next start.
    pub(crate) async fn run(self, mut stopped: watch::Receiver<bool>) {
        let this = Arc::new(self);
        let mut running: JoinSet<Option<bool>> = JoinSet::new();
        // Failures since the last success, of all records together: then the store is down, and is asked by one upload at a time.
        let (mut failures, mut pause) = (0, Instant::now());
        let stop = async move {
            // Without the guard that it returns, which may not be held while this waits. An error: nobody can stop it any more.
            drop(stopped.wait_for(|stop| *stop).await);
        };
        tokio::pin!(stop);
        loop {
            let now = Instant::now();
            let allowed = if failures > 0 { 1 } else { this.workers };
            while running.len() < allowed
                && pause <= now
                && let Some(number) = this.outbox.state.lock().next(now)
            {
                let this = this.clone();
                running.spawn(async move {
                    let done = this.upload(number).await;
                    // Here, so that what ends at the same time shares an fsync.
                    this.settle(number, done).await
                });
            }
            let due = [Some(pause).filter(|pause| *pause > now), this.outbox.state.lock().next_due()].into_iter().flatten().min();
            let wake = due.map_or(now + TICK, |due| due.max(now + Duration::from_millis(1)).min(now + TICK));
            tokio::select! {
                Some(done) = running.join_next(), if !running.is_empty() => match done {
                    Ok(Some(false)) => {
                        failures += 1;
                        pause = Instant::now() + delay(failures);
                    }
                    Ok(Some(true)) => (failures, pause) = (0, Instant::now()),
                    Ok(None) => {}
                    Err(error) => tracing::error!(%error, "an upload from the outbox panicked; a restart tries it again"),
                },
                () = this.outbox.changed.notified() => if this.outbox.is_draining() && failures == 0 { pause = Instant::now() },
                () = sleep_until(wake.into()) => this.outbox.note(),
                () = &mut stop => return,
            }
        }
    }

    /// What follows an attempt. True after a success, false after a failure of the store.
    async fn settle(&self, number: u64, done: Done) -> Option<bool> {
        let outbox = &self.outbox;
        match done {
            Done::Uploaded => {
                outbox.metrics.uploaded(true);
                self.remove(number).await;
                Some(true)
            }
            Done::Waits => {
                outbox.state.lock().put_back(number, Instant::now() + WAIT_FOR_OTHERS);
                None
            }
            Done::Lost(why) => {
                outbox.metrics.lost();
                outbox.taken_out.fetch_add(1, AcqRel);
                let what = outbox.state.lock().items.get(&number).map(|item| item.record.what.clone());
                tracing::error!(?what, why, "an acknowledged upload is lost: its bytes in the outbox are damaged or gone; store it again");
                self.remove(number).await;
                None
            }
            Done::Failed(fault) => {
                outbox.metrics.uploaded(false);
                let mut state = outbox.state.lock();
                let Some(item) = state.items.get_mut(&number) else { return Some(false) };
                item.failures += 1;
                let failures = item.failures;
                let what = item.record.what.clone();
                state.put_back(number, Instant::now() + delay(failures));
                drop(state);
                let is_refused = matches!(fault, Fault::BadRequest(_) | Fault::OriginRefusesSize);
                // The first failure, and then as the pauses grow: the log stays readable while the store is down.
                if failures.is_power_of_two() {
                    tracing::warn!(?what, failures, %fault, "an upload from the outbox failed; it is tried again without end");
                }
                // That the store does not take this one says nothing about the others.
                (!is_refused).then_some(false)
            }
        }
    }

    /// Removes a record, however long the disk takes for it.
    async fn remove(&self, number: u64) {
        while let Err(broken) = self.outbox.remove(number).await {
            tracing::debug!(number, %broken, "a record of the outbox cannot be removed yet");
            sleep(TICK).await;
        }
    }

    async fn upload(&self, number: u64) -> Done {
        let (record, is_latest) = {
            let state = self.outbox.state.lock();
            let Some(item) = state.items.get(&number) else { return Done::Uploaded };
            (item.record.clone(), state.is_latest(number))
        };
        if !is_latest {
            // A later version of the entry is pending, and is what counts.
            return Done::Uploaded;
        }
        match self.send(number, &record).await {
            Ok(done) => done,
            Err(Fault::Mismatch(mismatch)) => {
                let aside = match &record.body {
                    Body::File(name) => self.outbox.bodies.set_aside(name).await.ok(),
                    _ => None,
                };
                Done::Lost(format!("{mismatch}{}", aside.map(|path| format!("; they are in {}", path.display())).unwrap_or_default()))
            }
            Err(fault) => Done::Failed(fault),
        }
    }

    async fn send(&self, number: u64, record: &Record) -> Result<Done, Fault> {
        let name =
            |name: &str| Name::from_stored(name).ok_or_else(|| Fault::Internal(format!("the outbox has an entry of a bad name: {name}")));
        if let What::Entry(..) | What::NoEntry(_) = &record.what
            && let Some(others) = &self.others
        {
            // Measured before the question: see `Others::oldest_blob`.
            let waited = age(record.at);
            if others.oldest_blob().await.is_some_and(|oldest| oldest >= waited) {
                return Ok(Done::Waits);
            }
        }
        match &record.what {
            What::Blob(digest) => {
                let digest: Digest =
                    digest.parse().map_err(|_| Fault::Internal(format!("the outbox has a blob of a bad name: {digest}")))?;
                let Some(opened) = self.outbox.open_body(number).await? else { return Ok(gone()) };
                let body = self.outbox.clone().stream(opened, 0).boxed();
                let mut upload = Upload::new(Some(digest), Some(record.size), body).await?;
                self.blobs.put(&mut upload).await?;
            }
            What::Entry(entry, digest) => {
                let Some(opened) = self.outbox.open_body(number).await? else { return Ok(gone()) };
                let bytes = self.outbox.whole(opened).await?;
                let found = Digest::of(&bytes);
                if found.to_string() != *digest {
                    return Ok(Done::Lost(format!("the bytes hash to {found} and not to {digest}")));
                }
                self.entries.put_entry(&name(entry)?, bytes, None, self.most_entry).await?;
            }
            What::NoEntry(entry) => drop(self.entries.remove_entry(&name(entry)?, None, self.most_entry).await?),
        }
        Ok(Done::Uploaded)
    }
}

fn gone() -> Done {
    Done::Lost("its file is gone".into())
}

/// The pause after so many failures.
fn delay(failures: u32) -> Duration {
    let pauses = ExponentialBuilder::new().with_min_delay(FIRST_PAUSE).with_max_delay(LONGEST_PAUSE).without_max_times().with_jitter();
    // With 20 failures it is the longest for sure.
    pauses.build().nth(failures.saturating_sub(1).min(20) as usize).unwrap_or(LONGEST_PAUSE)
}

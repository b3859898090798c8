//! Shipping records to Loki: batches over HTTP, sent again until Loki has them or refuses them, out of a queue bounded in bytes.
//!
//! Who does what:
//! 1. A thread with a record calls [`Queue::send`]: it takes its bytes out of `log.loki.buffer`, or counts the record as dropped.
//! 2. The task collects a batch, until `log.loki.batch` is reached or `log.loki.wait` is over, and encodes it once.
//! 3. It sends the batch. Taken, or refused for good: the bytes go back to the buffer, and the next batch is collected.
//!    429, 5xx, silence or no connection: the same batch again after a pause. Meanwhile records wait in the queue.

use super::{Sink, dropped, line::level_name};
use crate::byte_queue::{Receiver, Sender, Shipping, Waiting};
use castier_config::Loki;
use loki_api::{
    logproto::{EntryAdapter, PushRequest, StreamAdapter},
    prost::Message as _,
    prost_types::Timestamp,
};
use reqwest::{Client, StatusCode, Url, header, redirect};
use std::{
    collections::BTreeMap,
    fmt::Write as _,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::Level;

/// The first pause after a batch that did not arrive; doubled each time.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// The longest.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// The pause once the program is ending.
const LAST_PAUSE: Duration = Duration::from_millis(100);
/// How long the first batch waits for the name of this instance, which is known when the listeners are.
const NAMED_WITHIN: Duration = Duration::from_secs(5);
/// What a record takes in the queue beside its line.
const RECORD: usize = 64;
/// What a record takes in a batch beside its line: timestamp, tags and lengths.
const FRAMING: usize = 24;
/// How much of Loki's explanation is logged.
const EXPLANATION: usize = 300;
/// The client's own libraries. What they say while a batch is sent would be the next batch.
const OWN_CLIENT: [&str; 5] = ["hyper", "reqwest", "rustls", "h2", "tower"];

/// A record.
struct Entry {
    at: SystemTime,
    level: Level,
    line: Box<str>,
}

/// Takes records. Never waits.
pub(super) struct Queue(Sender<Entry>);

impl Queue {
    /// Takes a record, or counts it as dropped.
    pub(super) fn send(&self, at: SystemTime, level: Level, target: &str, line: &str) {
        if OWN_CLIENT.iter().any(|library| target.starts_with(library)) {
            return;
        }
        let line = line.trim_end();
        let size = line.len() + RECORD;
        self.0.send(Entry { at, level, line: line.into() }, size);
    }
}

/// The task that sends, and how to end it.
pub(super) struct Shipper {
    shipping: Shipping,
    instance: watch::Sender<Option<String>>,
}

impl Shipper {
    /// Starts shipping to the Loki at `url`.
    pub(super) fn start(url: &str, settings: &Loki, program: &str) -> Result<(Queue, Self), String> {
        let mut url = Url::parse(url).map_err(|error| error.to_string())?;
        let path = url.path().trim_end_matches('/').trim_end_matches("/loki/api/v1/push");
        let path = format!("{path}/loki/api/v1/push");
        url.set_path(&path);
        let client = Client::builder().redirect(redirect::Policy::none()).timeout(settings.timeout.get()).build();
        let client = client.map_err(|error| error.to_string())?;
        let (instance, named) = watch::channel(None);
        let (settings, job) = (settings.clone(), program.to_owned());
        let (sender, shipping) = Shipping::start(Sink::Loki, settings.buffer.get(), |receiver, waiting, stop| {
            Task { client, url, settings, job, named, stop, waiting, away: false, refused: false }.run(receiver)
        });
        Ok((Queue(sender), Self { shipping, instance }))
    }

    /// Says which instance this is.
    pub(super) fn name_instance(&self, name: String) {
        self.instance.send_replace(Some(name));
    }

    /// Sends what waits, within a moment; with nothing waiting, at once.
    pub(super) async fn close(self) {
        if let Some(lost) = self.shipping.close().await {
            tracing::warn!(lost, "Loki did not take the last records in time; they are on stderr alone");
        }
    }
}

/// Records that leave together.
#[derive(Default)]
struct Batch {
    streams: BTreeMap<Level, Vec<EntryAdapter>>,
    records: u64,
    /// Bytes of the batch, before they are compressed.
    size: usize,
    /// Bytes of the queue.
    weight: usize,
}

impl Batch {
    fn add(&mut self, Entry { at, level, line }: Entry) {
        self.records += 1;
        self.size += line.len() + FRAMING;
        self.weight += line.len() + RECORD;
        let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
        let (seconds, nanos) = (i64::try_from(since.as_secs()).unwrap_or(i64::MAX), i32::try_from(since.subsec_nanos()).unwrap_or(0));
        self.streams.entry(level).or_default().push(EntryAdapter { timestamp: Some(Timestamp { seconds, nanos }), line: line.into() });
    }
}

/// How a batch fared.
enum Sent {
    Taken,
    /// It will never be taken.
    Refused(String),
    /// It may be taken later.
    Later(String),
}

struct Task {
    client: Client,
    url: Url,
    settings: Loki,
    job: String,
    named: watch::Receiver<Option<String>>,
    stop: CancellationToken,
    waiting: Arc<Waiting>,
    /// Loki did not take the last batch.
    away: bool,
    /// It refused the last batch for good.
    refused: bool,
}

impl Task {
    async fn run(mut self, mut receiver: Receiver<Entry>) {
        let most = usize::try_from(self.settings.batch.get()).unwrap_or(usize::MAX);
        // The first record of the next batch, where it did not fit into the last.
        let mut left_over = None;
        loop {
            let first = match left_over.take() {
                Some(entry) => Some(entry),
                None => receiver.next(None).await,
            };
            // Nothing comes, and nothing is left: the program ends.
            let Some(first) = first else { return };
            let mut batch = Batch::default();
            batch.add(first);
            let leave = Instant::now() + self.settings.wait.get();
            while let Some(entry) = receiver.next(Some(leave)).await {
                if batch.size + entry.line.len() + FRAMING > most {
                    left_over = Some(entry);
                    break;
                }
                batch.add(entry);
            }
            self.deliver(batch).await;
        }
    }

    /// Sends a batch until Loki has it or refuses it for good.
    async fn deliver(&mut self, batch: Batch) {
        let Batch { streams, records, weight, .. } = batch;
        let body = self.encode(streams).await;
        let mut pause = FIRST_PAUSE;
        loop {
            match self.send(body.clone()).await {
                Sent::Taken => {
                    self.refused = false;
                    if std::mem::take(&mut self.away) {
                        tracing::info!("Loki takes records again");
                    }
                    break;
                }
                Sent::Refused(why) => {
                    dropped(Sink::Loki, records);
                    // Once until it takes one: this record is in the next batch, which may be refused as well, and so on without end.
                    if !std::mem::replace(&mut self.refused, true) {
                        tracing::warn!(records, why, "Loki refused a batch of records for good; they are on stderr alone");
                    }
                    break;
                }
                Sent::Later(why) => {
                    if !std::mem::replace(&mut self.away, true) {
                        tracing::warn!(why, "Loki takes no records; they wait, up to log.loki.buffer, until it does");
                    }
                }
            }
            if self.stop.is_cancelled() {
                // `close` says when to give up.
                sleep(LAST_PAUSE).await;
                continue;
            }
            tokio::select! {
                () = sleep(spread(pause)) => {}
                () = self.stop.cancelled() => {}
            }
            pause = (2 * pause).min(LONGEST_PAUSE);
        }
        self.waiting.done(weight, records);
    }

    /// A push request, compressed. Waits for this instance to have its name.
    async fn encode(&mut self, streams: BTreeMap<Level, Vec<EntryAdapter>>) -> bytes::Bytes {
        tokio::select! {
            _ = timeout(NAMED_WITHIN, self.named.wait_for(Option::is_some)) => {}
            () = self.stop.cancelled() => {}
        }
        let instance = self.named.borrow().clone().unwrap_or_else(super::host);
        let streams = streams.into_iter().map(|(level, entries)| StreamAdapter { labels: self.labels(&instance, level), entries, hash: 0 });
        let encoded = PushRequest { streams: streams.collect() }.encode_to_vec();
        // Only more than 4 GiB cannot be compressed.
        snap::raw::Encoder::new().compress_vec(&encoded).unwrap_or_default().into()
    }

    /// `{job="castier",instance="…",level="info"}`, and what is configured.
    fn labels(&self, instance: &str, level: Level) -> String {
        let mut labels = BTreeMap::from([("job", &*self.job), ("instance", instance)]);
        labels.extend(self.settings.labels.0.iter().map(|(name, value)| (&**name, &**value)));
        labels.insert("level", level_name(level));
        let mut text = String::from("{");
        for (name, value) in labels {
            let comma = if text.len() > 1 { "," } else { "" };
            // As Go quotes, which for these characters is as Rust does.
            let value: String = value.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
            write!(text, "{comma}{name}=\"{}\"", value.replace('\\', "\\\\").replace('"', "\\\"")).ok();
        }
        text.push('}');
        text
    }

    async fn send(&self, body: bytes::Bytes) -> Sent {
        let mut request = self
            .client
            .post(self.url.clone())
            .header(header::CONTENT_TYPE, "application/x-protobuf")
            .header(header::CONTENT_ENCODING, "snappy")
            .body(body);
        if !self.settings.tenant.is_empty() {
            request = request.header("X-Scope-OrgID", &self.settings.tenant);
        }
        let mut response = match request.send().await {
            Ok(response) => response,
            Err(error) => return Sent::Later(explain(error)),
        };
        let status = response.status();
        if status.is_success() {
            return Sent::Taken;
        }
        let mut explanation = Vec::new();
        while explanation.len() < EXPLANATION
            && let Ok(Some(part)) = response.chunk().await
        {
            explanation.extend_from_slice(&part);
        }
        explanation.truncate(EXPLANATION);
        let why = format!("{status}: {}", String::from_utf8_lossy(&explanation).trim());
        if status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error() { Sent::Later(why) } else { Sent::Refused(why) }
    }
}

/// An error with its causes, without the address, which may hold a password.
fn explain(error: reqwest::Error) -> String {
    let error = error.without_url();
    let causes = std::iter::successors(std::error::Error::source(&error), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// A pause that is not the same on every node.
fn spread(pause: Duration) -> Duration {
    let nanos = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().subsec_nanos();
    pause.mul_f64(0.8 + 0.2 * f64::from(nanos % 1000) / 1000.0)
}

//! Sends the load: threads of clients that take turns until the schedule ends.

use crate::{
    client::{Body, Check, Client, Path, Request},
    corpus::{Blob, Corpus, Popularity, generator},
    mix::Op,
    scenario::Work,
    schedule::{Pacer, Schedule, Turn},
    tally::{Outcome, Tally},
    target::Target,
};
use castier_blob::Digest;
use castier_wire as wire;
use data_encoding::HEXLOWER;
use parking_lot::Mutex;
use rand::RngExt as _;
use rand_xoshiro::Xoshiro256PlusPlus;
use std::{
    collections::VecDeque,
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::{task::JoinSet, time::timeout_at};
use tokio_util::sync::CancellationToken;

/// The most stored blobs that a client remembers to delete later. Beyond that it forgets the oldest.
const MAX_REMEMBERED: usize = 4096;
/// The time that running requests have to end when the run is stopped.
const GRACE: Duration = Duration::from_secs(1);
/// The length of a message, in characters.
const MESSAGE: usize = 20;
/// Separates the parts of a form. A blob of random bytes does not contain it.
const BOUNDARY: &str = "castier-load-7f3c9a51e2d84b06";
/// The media type with that boundary.
const FORM: &str = "multipart/form-data; boundary=castier-load-7f3c9a51e2d84b06";

/// The data of a run that its threads share.
pub(crate) struct Run {
    pub(crate) targets: Vec<Arc<Target>>,
    pub(crate) work: Work,
    pub(crate) schedule: Schedule,
    pub(crate) corpus: Arc<Corpus>,
    pub(crate) popularity: Popularity,
    pub(crate) seed: u64,
    pub(crate) concurrency: usize,
    pub(crate) threads: usize,
    /// The timeout of a request, from its intended start.
    pub(crate) timeout: Duration,
    /// Whether each request uses a new connection.
    pub(crate) close: bool,
    /// Requests that have ended.
    pub(crate) done: AtomicU64,
}

impl Run {
    /// Runs the load to its end, or until `stop`. Requests that are running then and do not end soon, and requests that were due and could not
    /// be sent, count as failed: a target that hangs must not look good because the run was stopped.
    pub(crate) async fn drive(self: &Arc<Self>, stop: &CancellationToken) -> io::Result<Tally> {
        let start = Instant::now();
        let mut threads = JoinSet::new();
        for number in 0..self.threads {
            let (run, stop) = (Arc::clone(self), stop.clone());
            let clients = self.concurrency / self.threads + usize::from(number < self.concurrency % self.threads);
            threads.spawn_blocking(move || run.thread(clients, start, &stop));
        }
        let mut sum = Tally::default();
        while let Some(thread) = threads.join_next().await {
            sum.add(thread.map_err(io::Error::other)??);
        }
        Ok(sum)
    }

    /// One thread with its own runtime. Its clients share only the ticket counter with those of other threads.
    fn thread(self: &Arc<Self>, clients: usize, start: Instant, stop: &CancellationToken) -> io::Result<Tally> {
        let tally = Arc::new(Mutex::new(Tally::default()));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let ended = runtime.block_on(async {
            let pacer = Arc::new(Pacer::default());
            let mut set = JoinSet::new();
            for _ in 0..clients {
                let worker = Worker::new(Arc::clone(self), Arc::clone(&tally));
                set.spawn(worker.work(Arc::clone(&pacer), start, stop.clone()));
            }
            let all = async {
                while let Some(worker) = set.join_next().await {
                    worker.map_err(io::Error::other)?;
                }
                Ok(())
            };
            let stopped = async {
                stop.cancelled().await;
                self.give_up_overdue(start, &tally);
                tokio::time::sleep(GRACE).await;
                Ok(())
            };
            tokio::select! { ended = all => ended, ended = stopped => ended }
        });
        // Running requests are counted when they are dropped. Digests that are being computed are not waited for.
        runtime.shutdown_background();
        let tally = std::mem::take(&mut *tally.lock());
        ended.map(|()| tally)
    }

    /// Counts the requests that were due before now and have no client.
    fn give_up_overdue(&self, start: Instant, tally: &Mutex<Tally>) {
        let now = Instant::now();
        while let Some(turn) = self.schedule.overdue(start, now) {
            let error = Some("not sent: all clients were busy until the run was stopped".to_owned());
            tally.lock().record(&Outcome { end: now, error, ..Outcome::of(self.draw(turn.ticket).0, turn.intended) });
        }
    }

    /// The operation of a turn, and the generator for its other random choices. They depend only on the seed and the ticket, so that runs can
    /// be repeated.
    fn draw(&self, ticket: u64) -> (Op, Xoshiro256PlusPlus) {
        let mut rng = generator(!self.seed, ticket);
        let op = match &self.work {
            Work::Mix(mix) => mix.pick(rng.random_range(0..mix.total())),
            Work::Messages | Work::Forms => Op::Post,
        };
        (op, rng)
    }
}

/// One client.
struct Worker {
    run: Arc<Run>,
    tally: Arc<Mutex<Tally>>,
    /// One client per target.
    clients: Vec<Client>,
    /// Blobs that this client has stored and not deleted, oldest first.
    stored: VecDeque<Digest>,
}

/// The action of a turn, with everything prepared that takes time.
enum TurnAction {
    /// Get or head a blob of the corpus, by its number.
    Read(Op, usize),
    /// Put or post a blob.
    Store(Op, Blob, Digest),
    /// Delete a blob that this client stored.
    Delete(Digest),
    /// POST a message, GET it back, DELETE it.
    Message(String, Digest),
    /// POST a form with this body. Its file is the blob with that digest.
    Form(Vec<u8>, Digest),
}

/// One request, and what is expected of its answer.
struct Step<'a> {
    request: Request<'a>,
    check: Check<'a>,
    /// The blob whose digest a POST must return, or whose length a HEAD must return.
    expects: Expects<'a>,
}

enum Expects<'a> {
    Nothing,
    Length(u64),
    Name(&'a Digest),
}

/// A running request. It is counted when it is dropped, so that a request that is cut off counts as a failure.
struct Pending<'a> {
    run: &'a Run,
    tally: &'a Mutex<Tally>,
    outcome: Outcome,
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        self.outcome.end = Instant::now();
        self.tally.lock().record(&self.outcome);
        self.run.done.fetch_add(1, Ordering::Relaxed);
    }
}

impl Worker {
    fn new(run: Arc<Run>, tally: Arc<Mutex<Tally>>) -> Self {
        let clients = run.targets.iter().map(|target| Client::new(Arc::clone(target), run.close)).collect();
        Self { run, tally, clients, stored: VecDeque::new() }
    }

    async fn work(mut self, pacer: Arc<Pacer>, start: Instant, stop: CancellationToken) {
        let run = Arc::clone(&self.run);
        let mut taken = 0;
        while let Some(slot) = pacer.slot(&run.schedule, start, taken, &stop).await {
            taken += 1;
            let deed = self.prepare(&run, slot.ticket()).await;
            let Some(turn) = slot.begin(&stop).await else { return };
            self.act(&run, turn, deed).await;
        }
    }

    /// Prepares the action of a turn.
    async fn prepare(&mut self, run: &Run, ticket: u64) -> TurnAction {
        let fresh = run.corpus.fresh(ticket);
        let (op, mut rng) = run.draw(ticket);
        match (&run.work, op) {
            (Work::Mix(_), Op::Get | Op::Head) => TurnAction::Read(op, run.popularity.pick(run.corpus.len(), &mut rng)),
            (Work::Mix(_), Op::Put | Op::Post) => TurnAction::Store(op, fresh, fresh.digest_aside().await),
            (Work::Mix(_), Op::Delete) => match self.stored.pop_front() {
                Some(digest) => TurnAction::Delete(digest),
                // There is no blob to delete yet, so store one.
                None => TurnAction::Store(Op::Put, fresh, fresh.digest_aside().await),
            },
            (Work::Messages, _) => {
                let text = HEXLOWER.encode(&fresh.bytes()[..MESSAGE / 2]);
                let digest = Digest::of(text.as_bytes());
                TurnAction::Message(text, digest)
            }
            (Work::Forms, _) => TurnAction::Form(form(ticket, fresh), fresh.digest()),
        }
    }

    /// Does the action of a turn.
    async fn act(&mut self, run: &Run, turn: Turn, deed: TurnAction) {
        match &deed {
            TurnAction::Read(op, number) => {
                let digest = run.corpus.digest(*number);
                let (check, expects) = match run.corpus.held(*number) {
                    _ if *op == Op::Head => (Check::Drop, Expects::Length(run.corpus.size())),
                    Some(bytes) => (Check::Compare(bytes), Expects::Nothing),
                    None => (Check::Hash(digest), Expects::Nothing),
                };
                let request = Request::new(*op, Path::Blob(&digest), Body::None);
                self.step(run, turn, Step { request, check, expects }).await;
            }
            TurnAction::Store(op, blob, digest) => {
                let (path, check, expects) = match op {
                    Op::Post => (Path::Plain(wire::CAS), Check::Keep, Expects::Name(digest)),
                    _ => (Path::Blob(digest), Check::Drop, Expects::Nothing),
                };
                let stored = self.step(run, turn, Step { request: Request::new(*op, path, Body::Blob(*blob)), check, expects }).await;
                if stored && run.work.deletes() {
                    if self.stored.len() == MAX_REMEMBERED {
                        self.stored.pop_front();
                    }
                    self.stored.push_back(*digest);
                }
            }
            TurnAction::Delete(digest) => {
                let request = Request::new(Op::Delete, Path::Blob(digest), Body::None);
                self.step(run, turn, Step { request, check: Check::Drop, expects: Expects::Nothing }).await;
            }
            TurnAction::Message(text, digest) => {
                let request = Request::new(Op::Post, Path::Plain(wire::CAS), Body::Bytes(text.as_bytes()));
                if !self.step(run, turn, Step { request, check: Check::Keep, expects: Expects::Name(digest) }).await {
                    return;
                }
                for (op, check) in [(Op::Get, Check::Hash(*digest)), (Op::Delete, Check::Drop)] {
                    let turn = Turn { intended: Instant::now(), ..turn };
                    let request = Request::new(op, Path::Blob(digest), Body::None);
                    self.step(run, turn, Step { request, check, expects: Expects::Nothing }).await;
                }
            }
            TurnAction::Form(body, digest) => {
                let request = Request { content_type: Some(FORM), ..Request::new(Op::Post, Path::Plain(wire::CAS), Body::Bytes(body)) };
                self.step(run, turn, Step { request, check: Check::Keep, expects: Expects::Name(digest) }).await;
            }
        }
    }

    /// Sends one request and counts it. Returns whether it succeeded.
    async fn step(&mut self, run: &Run, turn: Turn, step: Step<'_>) -> bool {
        let deadline = turn.intended + run.timeout;
        let targets = self.clients.len() as u64;
        let client = &mut self.clients[usize::try_from(turn.ticket % targets).unwrap_or(0)];
        let mut pending = Pending { run, tally: &self.tally, outcome: Outcome::of(step.request.op, turn.intended) };
        let outcome = &mut pending.outcome;
        // A request that has been due for longer than the timeout is not sent: the target did not keep up.
        if run.schedule.rate.is_some() && Instant::now() >= deadline {
            outcome.error = Some(format!("not sent: all clients were busy for {:?} after it was due", run.timeout));
            return false;
        }
        outcome.bytes_out = step.request.body.len();
        outcome.error = Some("no whole answer when the run was stopped".to_owned());
        let answer = timeout_at(deadline.into(), client.exchange(&step.request, &step.check)).await;
        outcome.reconnected = client.reconnected();
        outcome.error = match answer {
            Err(_) => Some(format!("no whole answer within {:?}", run.timeout)),
            Ok(Err(failure)) => Some(failure.to_string()),
            Ok(Ok(answer)) => {
                outcome.status = answer.status;
                outcome.bytes_in = answer.received;
                outcome.first_byte = Some(answer.first_byte);
                if !step.request.op.succeeded(answer.status) {
                    Some(status_text(answer.status))
                } else if answer.sound {
                    let unmet;
                    (unmet, outcome.corrupt) = step.expects.unmet(answer.announced, &answer.kept);
                    unmet
                } else {
                    outcome.corrupt = true;
                    Some("corrupt: the body is not the blob of that digest".to_owned())
                }
            }
        };
        outcome.error.is_none()
    }
}

/// A form with a text field and a file, as a browser sends it.
fn form(ticket: u64, blob: Blob) -> Vec<u8> {
    let mut body = format!(
        "--{BOUNDARY}\r\nContent-Disposition: form-data; name=\"user\"\r\n\r\n{ticket}\r\n--{BOUNDARY}\r\n\
         Content-Disposition: form-data; name=\"file\"; filename=\"form-{ticket}.bin\"\r\n\
         Content-Type: application/octet-stream\r\n\r\n"
    )
    .into_bytes();
    let mut pieces = blob.pieces();
    while pieces.next_into(&mut body) {}
    body.extend_from_slice(format!("\r\n--{BOUNDARY}--\r\n").as_bytes());
    body
}

impl Expects<'_> {
    /// What is wrong with a successful answer, and whether it is corrupt.
    fn unmet(&self, announced: Option<u64>, kept: &[u8]) -> (Option<String>, bool) {
        match self {
            // The answer to a HEAD may have no length (RFC 9110, section 9.3.2).
            Self::Length(length) if announced.is_some_and(|announced| announced != *length) => {
                (Some("corrupt: the Content-Length is not the blob's length".to_owned()), true)
            }
            Self::Name(digest) => match serde_json::from_slice::<wire::Stored>(kept) {
                Ok(stored) if stored.digest == digest.to_string() => (None, false),
                Ok(_) => (Some("corrupt: the blob was stored under another digest".to_owned()), true),
                Err(_) => (Some("the answer to a POST has no digest in it".to_owned()), false),
            },
            Self::Nothing | Self::Length(_) => (None, false),
        }
    }
}

/// The status as in vegeta: `503 Service Unavailable`.
fn status_text(status: u16) -> String {
    http::StatusCode::from_u16(status).map_or_else(|_| status.to_string(), |status| status.to_string())
}

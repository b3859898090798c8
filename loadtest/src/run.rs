//! The load itself: threads of clients that take turns until the schedule ends.

use crate::{
    client::{Body, Check, Client, Failure, Path, Request},
    corpus::{Blob, Corpus, Popularity, generator},
    mix::{Mix, Op},
    pace::{Pacer, Schedule, Turn},
    scenario::Work,
    tally::{Outcome, Tally},
    target::Target,
};
use castier_blob::{Digest, wire};
use data_encoding::HEXLOWER;
use parking_lot::Mutex;
use rand::{Rng as _, RngExt as _};
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

/// A client remembers so many blobs that it stored, to delete them later; beyond that it forgets the oldest.
const MAX_REMEMBERED: usize = 4096;
/// Separates the parts of a form. No blob of random bytes has a real chance to contain it.
const BOUNDARY: &str = "castier-load-7f3c9a51e2d84b06";
/// The media type that says so.
const FORM: &str = "multipart/form-data; boundary=castier-load-7f3c9a51e2d84b06";

/// Everything about a run that its threads share.
pub(crate) struct Run {
    pub(crate) targets: Vec<Arc<Target>>,
    pub(crate) work: Work,
    pub(crate) schedule: Schedule,
    pub(crate) corpus: Arc<Corpus>,
    pub(crate) popularity: Popularity,
    pub(crate) seed: u64,
    pub(crate) concurrency: usize,
    pub(crate) threads: usize,
    /// Longest time of a request, from its intended start.
    pub(crate) timeout: Duration,
    /// A connection for each request.
    pub(crate) close: bool,
    /// Requests that ended so far.
    pub(crate) done: AtomicU64,
}

impl Run {
    /// Drives the load to its end, or until `stop`. What is in flight then is not counted.
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

    /// One thread with its own runtime: its clients never meet those of another but at the ticket counter.
    fn thread(self: &Arc<Self>, clients: usize, start: Instant, stop: &CancellationToken) -> io::Result<Tally> {
        let tally = Arc::new(Mutex::new(Tally::default()));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let ended = runtime.block_on(stop.run_until_cancelled(async {
            let pacer = Arc::new(Pacer::default());
            let mut set = JoinSet::new();
            for _ in 0..clients {
                let worker = Worker::new(Arc::clone(self), Arc::clone(&tally));
                set.spawn(worker.work(Arc::clone(&pacer), start));
            }
            while let Some(worker) = set.join_next().await {
                worker.map_err(io::Error::other)?;
            }
            Ok(())
        }));
        drop(runtime);
        let tally = std::mem::take(&mut *tally.lock());
        ended.unwrap_or(Ok(())).map(|()| tally)
    }
}

/// One client.
struct Worker {
    run: Arc<Run>,
    tally: Arc<Mutex<Tally>>,
    /// One per target.
    clients: Vec<Client>,
    /// Blobs that this client stored and did not delete yet, oldest first.
    stored: VecDeque<Digest>,
    /// Room for a body that is put together.
    body: Vec<u8>,
}

/// What one request does, apart from how it is counted.
struct Step<'a> {
    op: Op,
    request: Request<'a>,
    check: Check<'a>,
    /// The blob that a POST must name, or whose length a HEAD must tell.
    expects: Expects<'a>,
}

enum Expects<'a> {
    Nothing,
    Length(u64),
    Name(&'a Digest),
}

impl Worker {
    fn new(run: Arc<Run>, tally: Arc<Mutex<Tally>>) -> Self {
        let clients = run.targets.iter().map(|target| Client::new(Arc::clone(target), run.close)).collect();
        Self { run, tally, clients, stored: VecDeque::new(), body: Vec::new() }
    }

    async fn work(mut self, pacer: Arc<Pacer>, start: Instant) {
        let run = Arc::clone(&self.run);
        let mut taken = 0;
        while let Some(turn) = pacer.turn(&run.schedule, start, taken).await {
            taken += 1;
            match &run.work {
                Work::Mix(mix) => self.mixed(&run, mix, turn).await,
                Work::Messages => self.message(&run, turn).await,
                Work::Forms => self.form(&run, turn).await,
            }
        }
    }

    /// One operation. Which, and on which blob, follows from the seed and the ticket alone, so that runs can be repeated.
    async fn mixed(&mut self, run: &Run, mix: &Mix, turn: Turn) {
        let mut rng = generator(!run.seed, turn.ticket);
        let op = mix.pick(rng.random_range(0..mix.total()));
        match op {
            Op::Get | Op::Head => {
                let number = run.popularity.pick(run.corpus.len(), &mut rng);
                let digest = run.corpus.digest(number);
                let check = match run.corpus.held(number) {
                    _ if op == Op::Head => Check::Drop,
                    Some(bytes) => Check::Compare(bytes),
                    None => Check::Hash(digest),
                };
                let expects = if op == Op::Head { Expects::Length(run.corpus.size()) } else { Expects::Nothing };
                let request = plain(op, Path::Blob(&digest), Body::None);
                self.step(run, turn, turn.intended, Step { op, request, check, expects }).await;
            }
            Op::Put => self.store(run, turn, run.corpus.fresh(turn.ticket), Op::Put).await,
            Op::Post => self.store(run, turn, run.corpus.fresh(turn.ticket), Op::Post).await,
            Op::Delete => match self.stored.pop_front() {
                Some(digest) => {
                    let request = plain(op, Path::Blob(&digest), Body::None);
                    self.step(run, turn, turn.intended, Step { op, request, check: Check::Drop, expects: Expects::Nothing }).await;
                }
                // Nothing to delete yet: store something.
                None => self.store(run, turn, run.corpus.fresh(turn.ticket), Op::Put).await,
            },
        }
    }

    async fn store(&mut self, run: &Run, turn: Turn, blob: Blob, op: Op) {
        let digest = blob.digest();
        let (path, check, expects) = match op {
            Op::Post => (Path::Plain(wire::CAS), Check::Keep, Expects::Name(&digest)),
            _ => (Path::Blob(&digest), Check::Drop, Expects::Nothing),
        };
        let stored = self.step(run, turn, turn.intended, Step { op, request: plain(op, path, Body::Blob(blob)), check, expects }).await;
        if stored && run.work.deletes() {
            if self.stored.len() == MAX_REMEMBERED {
                self.stored.pop_front();
            }
            self.stored.push_back(digest);
        }
    }

    /// POST a message of 20 characters, GET it back, DELETE it.
    async fn message(&mut self, run: &Run, turn: Turn) {
        let mut raw = [0; 10];
        generator(run.seed, turn.ticket).fill_bytes(&mut raw);
        let text = HEXLOWER.encode(&raw);
        let digest = Digest::of(text.as_bytes());
        let post = plain(Op::Post, Path::Plain(wire::CAS), Body::Bytes(text.as_bytes()));
        let post = Step { op: Op::Post, request: post, check: Check::Keep, expects: Expects::Name(&digest) };
        if !self.step(run, turn, turn.intended, post).await {
            return;
        }
        for (op, check) in [(Op::Get, Check::Hash(digest)), (Op::Delete, Check::Drop)] {
            let request = plain(op, Path::Blob(&digest), Body::None);
            self.step(run, turn, Instant::now(), Step { op, request, check, expects: Expects::Nothing }).await;
        }
    }

    /// POST a form with a text field and a file, as a browser does.
    async fn form(&mut self, run: &Run, turn: Turn) {
        let blob = run.corpus.fresh(turn.ticket);
        let digest = blob.digest();
        let mut body = std::mem::take(&mut self.body);
        body.clear();
        let ticket = turn.ticket;
        body.extend_from_slice(
            format!(
                "--{BOUNDARY}\r\nContent-Disposition: form-data; name=\"user\"\r\n\r\n{ticket}\r\n--{BOUNDARY}\r\n\
                 Content-Disposition: form-data; name=\"file\"; filename=\"form-{ticket}.bin\"\r\n\
                 Content-Type: application/octet-stream\r\n\r\n"
            )
            .as_bytes(),
        );
        let mut pieces = blob.pieces();
        while pieces.next_into(&mut body) {}
        body.extend_from_slice(format!("\r\n--{BOUNDARY}--\r\n").as_bytes());
        let request = Request { content_type: Some(FORM), ..plain(Op::Post, Path::Plain(wire::CAS), Body::Bytes(&body)) };
        let step = Step { op: Op::Post, request, check: Check::Keep, expects: Expects::Name(&digest) };
        self.step(run, turn, turn.intended, step).await;
        self.body = body;
    }

    /// Sends one request and counts it; whether it succeeded.
    async fn step(&mut self, run: &Run, turn: Turn, intended: Instant, step: Step<'_>) -> bool {
        let deadline = intended + run.timeout;
        let targets = self.clients.len() as u64;
        let client = &mut self.clients[usize::try_from(turn.ticket % targets).unwrap_or(0)];
        // A request that is due for so long that it would time out is not sent any more: the target did not keep up.
        let answer = if run.schedule.rate.is_some() && Instant::now() >= deadline {
            None
        } else {
            Some(timeout_at(deadline.into(), client.exchange(&step.request, &step.check)).await)
        };
        let end = Instant::now();
        let mut outcome = Outcome {
            op: step.op,
            intended,
            end,
            first_byte: None,
            status: 0,
            bytes_in: 0,
            bytes_out: step.request.body.len(),
            reconnected: false,
            error: None,
            corrupt: false,
        };
        match answer {
            None => {
                outcome.bytes_out = 0;
                outcome.error = Some(format!("not sent: all clients were busy for {:?} after it was due", run.timeout));
            }
            Some(Err(_)) => outcome.error = Some(format!("no whole answer within {:?}", run.timeout)),
            Some(Ok(Err(failure))) => outcome.error = Some(Failure::to_string(&failure)),
            Some(Ok(Ok(answer))) => {
                outcome.status = answer.status;
                outcome.bytes_in = answer.received;
                outcome.first_byte = Some(answer.first_byte);
                outcome.reconnected = answer.reconnected;
                if !step.op.succeeded(answer.status) {
                    outcome.error = Some(status_text(answer.status));
                } else if !answer.sound {
                    outcome.corrupt = true;
                    outcome.error = Some("corrupt: the body is not the blob of that digest".to_owned());
                } else {
                    (outcome.error, outcome.corrupt) = step.expects.unmet(answer.announced, &answer.kept);
                }
            }
        }
        let success = outcome.error.is_none();
        self.tally.lock().record(outcome);
        run.done.fetch_add(1, Ordering::Relaxed);
        success
    }
}

impl Expects<'_> {
    /// What is wrong with a successful answer, and whether that makes it corrupt.
    fn unmet(&self, announced: Option<u64>, kept: &[u8]) -> (Option<String>, bool) {
        match self {
            Self::Length(length) if announced != Some(*length) => {
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

fn plain<'a>(op: Op, path: Path<'a>, body: Body<'a>) -> Request<'a> {
    Request { method: op.method(), path, body, content_type: None, ask_first: false }
}

/// As vegeta words it: `503 Service Unavailable`.
fn status_text(status: u16) -> String {
    http::StatusCode::from_u16(status).map_or_else(|_| status.to_string(), |status| status.to_string())
}

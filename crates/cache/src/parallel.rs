//! A large blob from one source over several connections at once: a store often gives each connection only so many bytes a second.
//!
//! The answer that is open already is read from its beginning. Ahead of it further segments of [`SEGMENT`] bytes are asked for, each by a task of its own,
//! which collects them in memory. The bytes leave in order. When the open answer has come to the first segment that was asked for, it is dropped.
//!
//! - **Memory.** A segment leases all of its memory before it is asked for, and nobody waits for a lease. So no flight can wait for another. Without
//!   memory the open answer is read on, or the rest is asked for in one request: that needs none, since its bytes go straight to the spool. Segments take at
//!   most half of `fill.memory`, so that small blobs still find some.
//! - **One version.** Every request names the version of the first answer, and its answer must be of that version. Else nothing of it is used.
//! - **A source that gives no ranges.** One segment is asked for first. The others follow when it was answered, or after [`PROOF`]. The open answer is
//!   dropped only when a range has come. So such a source sends its blob in one transfer, and is not asked for ranges for a while.
//! - **Slow segments.** Only the segment at the head can hold up the blob. If it takes more than twice as long as its siblings, it is asked for once more. Both
//!   requests fill the same segment: a byte is taken from the one that has it first.
//!
//! Dropping [`Parallel`] ends all of its requests.

use crate::{
    budget::{Budget, Lease},
    cache::Cache,
    fault::Fault,
    metrics::{Metrics, RangeResult},
    retries::{Retries, RetryBudget},
    source::{Incoming, NoRange, Ranges},
};
use bytes::{Buf as _, Bytes, BytesMut};
use castier_config as config;
use futures::{
    StreamExt as _, TryFutureExt as _, TryStreamExt as _,
    future::{pending, ready},
    stream::{self, BoxStream},
};
use parking_lot::Mutex;
use std::{
    collections::VecDeque,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::{
    sync::Notify,
    task::JoinSet,
    time::{Instant, sleep_until},
};

/// The length of a segment. Long enough that a request costs little beside it, and short enough that a few of them fit into `fill.memory`.
const SEGMENT: u64 = 8 << 20;
/// The part of `fill.memory` that segments may take: one in so many.
const SHARE: u64 = 2;
/// A segment is not slow before this: on a fast network a pause of the source would be taken for it.
const SLOW: Duration = Duration::from_millis(500);
/// How long the first segment may take to be answered before the next ones are asked for all the same.
const PROOF: Duration = Duration::from_millis(100);
/// How long the open answer waits at its end for the first range. A source that answers one request after the other sends none.
const ANSWER: Duration = Duration::from_secs(2);
/// How long a source that gave no range is not asked for ranges.
const FORGET: Duration = Duration::from_secs(600);
/// Pieces shorter than this are merged: a piece costs memory of its own, which no lease counts.
const PIECE: usize = 16 << 10;
/// Pieces are merged up to this length.
const MERGED: usize = 64 << 10;
/// Of so many segments the median time is taken.
const TIMES: usize = 31;
/// Of so many requests one may be a hedge, beside the first.
const HEDGES: usize = 10;

/// Whether a source is known not to give ranges.
#[derive(Debug, Default)]
pub struct RangeSupport(Mutex<Option<Instant>>);

impl RangeSupport {
    /// Whether ranges may be asked for.
    pub fn is_assumed(&self) -> bool {
        self.0.lock().is_none_or(|refused| refused.elapsed() > FORGET)
    }

    /// Asking for ranges was of no use.
    pub fn give_up(&self) {
        *self.0.lock() = Some(Instant::now());
    }
}

/// The most connections that all flights together have open beside the one that each has anyway.
pub fn most_ahead(fill: &config::Fill) -> u64 {
    // A segment that is read has a lease of its whole length. The second request for one is sent only when the flight has no other beside its segments.
    let each = if fill.parallel_over.get() == 0 { 0 } else { (fill.parallel as u64).saturating_sub(1) };
    (fill.max_in_flight as u64 * each).min(fill.memory.get() / SHARE / SEGMENT)
}

/// How large blobs are read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Settings {
    /// `fill.parallel_over`.
    over: u64,
    /// `fill.parallel`.
    most: usize,
    /// [`SEGMENT`], but in tests.
    segment: u64,
    /// `origin.retries`, for each segment.
    retries: usize,
}

impl Settings {
    pub(crate) fn new(config: &config::Castier) -> Self {
        let over = config.fill.parallel_over.get();
        Self {
            over: if over == 0 { u64::MAX } else { over },
            most: config.fill.parallel,
            segment: SEGMENT,
            retries: config.origin.retries as usize,
        }
    }
}

/// Why no more bytes come.
#[derive(Debug)]
pub(crate) enum Broke {
    Fault(Fault),
    /// What is missing is of another version by now.
    Replaced,
}

/// How an answer is read.
pub(crate) enum Reading {
    One(Incoming),
    Parallel(Box<Parallel>),
}

impl Reading {
    /// `incoming` begins at `from`.
    pub(crate) fn new(incoming: Incoming, from: u64, source: &'static str, cache: &Cache) -> Self {
        let settings = cache.parallel;
        match (incoming.size, &incoming.ranges) {
            (Some(size), Some(ranges)) if settings.most > 1 && size.saturating_sub(from) > settings.over.max(settings.segment) => {
                let shared = Shared::new(ranges.clone(), source, cache.metrics.clone(), cache.retry_budget.clone());
                Self::Parallel(Box::new(Parallel::new(settings, shared, cache.spools.memory.clone(), incoming.bytes, from..size)))
            }
            _ => Self::One(incoming),
        }
    }

    /// As [`Incoming::next`].
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, Broke> {
        match self {
            Self::One(incoming) => incoming.next().await.map_err(Broke::Fault),
            Self::Parallel(parallel) => parallel.next().await,
        }
    }
}

type Stream = BoxStream<'static, Result<Bytes, NoRange>>;

/// The answer that is read without a task and without a lease. It goes on to the end of the blob.
struct Open {
    bytes: Stream,
    /// What has come of the first segment ahead. It is needed if the answer is read on.
    behind: Bytes,
    /// Since when it has been at the segment that it reads now.
    begun: Instant,
    /// It has come to the segment ahead, and waits for that to be answered until then.
    waits: Option<Instant>,
}

/// A blob that is being read.
pub(crate) struct Parallel {
    settings: Settings,
    shared: Arc<Shared>,
    memory: Arc<Budget>,
    retries: Retries,
    /// The next byte that leaves.
    at: u64,
    size: u64,
    /// At `at`, and not behind the first segment. If there is none, the first segment is at `at`.
    open: Option<Open>,
    /// Without gaps between them.
    segments: VecDeque<Segment>,
    /// Where the next segment begins: where the last one ends.
    ahead: u64,
    /// How many requests may be open. Falls when the source says that it has too much to do.
    most: usize,
    /// The source has answered with a range.
    gives_ranges: bool,
    hedges: usize,
    lacks_memory: bool,
    /// Nothing more is asked for ahead of time.
    is_alone: bool,
}

/// What the tasks share.
struct Shared {
    ranges: Arc<dyn Ranges>,
    source: &'static str,
    metrics: Arc<Metrics>,
    retry_budget: Arc<RetryBudget>,
    /// Something has happened that [`Parallel::next`] may wait for.
    changed: Notify,
    /// Requests to which the source said that it has too much to do, since they were looked at.
    refused: AtomicUsize,
    requests: AtomicUsize,
    /// How long the last segments took.
    times: Mutex<VecDeque<Duration>>,
}

impl Shared {
    fn new(ranges: Arc<dyn Ranges>, source: &'static str, metrics: Arc<Metrics>, retry_budget: Arc<RetryBudget>) -> Self {
        Self {
            ranges,
            source,
            metrics,
            retry_budget,
            changed: Notify::new(),
            refused: AtomicUsize::new(0),
            requests: AtomicUsize::new(0),
            times: Mutex::default(),
        }
    }

    fn took(&self, time: Duration) {
        let mut times = self.times.lock();
        times.truncate(TIMES - 1);
        times.push_front(time);
    }

    fn median(&self) -> Option<Duration> {
        let mut times: Vec<_> = self.times.lock().iter().copied().collect();
        times.sort_unstable();
        times.get(times.len() / 2).copied()
    }

    /// Asks for a range, after a pause. The request is sent when the stream is polled.
    fn read(self: &Arc<Self>, range: Range<u64>, pause: Duration) -> Stream {
        let shared = self.clone();
        let asked = async move {
            if !pause.is_zero() {
                tokio::time::sleep(pause).await;
            }
            shared.requests.fetch_add(1, Relaxed);
            shared.retry_budget.request();
            shared.ranges.read(range).await
        };
        // The empty piece says that there is an answer.
        let answered = |bytes: BoxStream<'static, _>| stream::once(ready(Ok(Bytes::new()))).chain(bytes.map_err(NoRange::Fault));
        asked.map_ok(answered).try_flatten_stream().boxed()
    }

    fn broke(&self) -> Fault {
        Fault::Unreachable { source_name: self.source, why: "ended before the announced length".into() }
    }
}

impl Parallel {
    fn new(
        settings: Settings,
        shared: Shared,
        memory: Arc<Budget>,
        bytes: BoxStream<'static, Result<Bytes, Fault>>,
        range: Range<u64>,
    ) -> Self {
        let open = Open { bytes: bytes.map_err(NoRange::Fault).boxed(), behind: Bytes::new(), begun: Instant::now(), waits: None };
        Self {
            settings,
            retries: Retries::new(settings.retries, shared.retry_budget.clone()),
            shared: Arc::new(shared),
            memory,
            at: range.start,
            size: range.end,
            open: Some(open),
            segments: VecDeque::new(),
            ahead: range.start,
            most: settings.most,
            gives_ranges: false,
            hedges: 0,
            lacks_memory: false,
            is_alone: false,
        }
    }

    /// The next bytes, at least one; `None` at the end of the blob. Safe to cancel and call again.
    async fn next(&mut self) -> Result<Option<Bytes>, Broke> {
        while self.at < self.size {
            self.look_around();
            self.ask_ahead();
            let (shared, alarm) = (self.shared.clone(), self.alarm());
            let events = async {
                tokio::select! {
                    () = shared.changed.notified() => {}
                    () = at(alarm) => {}
                }
            };
            let until = self.segments.front().map(|segment| segment.range.start);
            match (&mut self.open, self.segments.front()) {
                (Some(open), Some(_)) if until == Some(self.at) => {
                    let waits = *open.waits.get_or_insert_with(|| Instant::now() + ANSWER);
                    tokio::select! {
                        () = events => {}
                        () = at(Some(waits)) => {
                            self.shared.ranges.give_up();
                            self.read_on();
                        }
                    }
                    continue;
                }
                (Some(open), _) if !open.behind.is_empty() => {
                    // There is no segment ahead any more.
                    let bytes = std::mem::take(&mut open.behind);
                    self.at += bytes.len() as u64;
                    return Ok(Some(bytes));
                }
                (Some(open), _) => tokio::select! {
                    biased;
                    bytes = open.bytes.next() => match bytes {
                        Some(Ok(bytes)) if bytes.is_empty() => continue,
                        Some(Ok(mut bytes)) => {
                            if let Some(until) = until {
                                let most = usize::try_from(until - self.at).unwrap_or(usize::MAX);
                                open.behind = bytes.split_off(most.min(bytes.len()));
                            }
                            self.at += bytes.len() as u64;
                            return Ok(Some(bytes));
                        }
                        Some(Err(NoRange::Fault(fault))) => {
                            self.ask_again(fault)?;
                            continue;
                        }
                        Some(Err(why)) => return Err(self.broke(why)),
                        None => {
                            self.ask_again(self.shared.broke())?;
                            continue;
                        }
                    },
                    () = events => {}
                },
                (None, None) => {
                    self.open = Some(self.open_rest(Duration::ZERO));
                    continue;
                }
                (None, Some(head)) => match head.buffer.take() {
                    Taken::Bytes(bytes) => {
                        self.at += bytes.len() as u64;
                        if self.at == head.range.end {
                            self.segments.pop_front();
                        }
                        return Ok(Some(bytes));
                    }
                    Taken::Failed(NoRange::Fault(fault)) if fault.is_source_limit() && !self.is_alone => {
                        // The one request that is sent now is no more than there would be without this module.
                        self.read_on();
                        continue;
                    }
                    Taken::Failed(why) => return Err(self.broke(why)),
                    Taken::Nothing => events.await,
                },
            }
            if self.hedge_at().is_some_and(|at| at <= Instant::now()) {
                self.hedge();
            }
        }
        Ok(None)
    }

    /// When there is something to do, if nothing happens before.
    fn alarm(&self) -> Option<Instant> {
        if self.gives_ranges {
            return self.hedge_at();
        }
        self.segments.front().filter(|_| self.may_ask() && !self.lacks_memory).map(|segment| segment.begun + PROOF)
    }

    /// Whether a request more may be open, and there is something to ask for.
    fn may_ask(&self) -> bool {
        !self.is_alone && self.ahead < self.size && self.segments.len() + usize::from(self.open.is_some()) < self.most
    }

    fn broke(&self, why: NoRange) -> Broke {
        match why {
            NoRange::Fault(fault) => Broke::Fault(fault),
            NoRange::Replaced => Broke::Replaced,
            NoRange::Ignored => {
                self.shared.ranges.give_up();
                Broke::Fault(Fault::Unreachable { source_name: self.shared.source, why: "it gives no ranges any more".into() })
            }
        }
    }

    /// Takes note of what the tasks did.
    fn look_around(&mut self) {
        let refused = self.shared.refused.swap(0, Relaxed);
        self.most = self.most.saturating_sub(refused).max(1);
        self.gives_ranges |= self.segments.iter().any(|segment| segment.buffer.is_answered());
        if self.open.is_none() {
            return;
        }
        // The open answer is of one version, and goes on to the end: with it nothing is lost.
        if let Some(why) = self.segments.iter().find_map(|segment| segment.buffer.failed()) {
            let is_useless = match why {
                NoRange::Ignored => true,
                // At the first question, another version is rather that of another server behind the same name, or a condition that the server gets wrong.
                NoRange::Replaced | NoRange::Fault(Fault::Unusable { .. }) => !self.gives_ranges,
                NoRange::Fault(_) => false,
            };
            if is_useless {
                self.shared.ranges.give_up();
            }
            self.read_on();
            return;
        }
        let is_done = self.gives_ranges && self.segments.front().is_some_and(|head| head.range.start == self.at);
        if let Some(open) = self.open.take_if(|_| is_done) {
            self.shared.took(open.begun.elapsed());
            self.shared.metrics.range(RangeResult::Ok);
        }
    }

    /// Reads the rest of the blob in one transfer.
    fn read_on(&mut self) {
        self.segments.clear();
        self.is_alone = true;
    }

    /// Asks for the next segments, as many as may be.
    fn ask_ahead(&mut self) {
        if self.most == 1 {
            return;
        }
        if self.segments.is_empty() {
            self.ahead = if self.open.is_some() { self.at + self.settings.segment } else { self.at };
        }
        while self.may_ask() {
            if !self.gives_ranges && self.segments.front().is_some_and(|first| first.begun.elapsed() < PROOF) {
                return;
            }
            let Some(lease) = self.lease() else { return };
            if let Some(open) = self.open.as_mut().filter(|_| self.segments.is_empty()) {
                (open.begun, open.waits) = (Instant::now(), None);
            }
            let range = self.ahead..self.size.min(self.ahead + self.settings.segment);
            self.ahead = range.end;
            let mut segment = Segment::new(range, lease);
            segment.feed(&self.shared, None, self.settings.retries);
            self.segments.push_back(segment);
        }
    }

    /// The memory of a segment. Also a short one takes that of a whole one, so that there are never more of them than [`most_ahead`] says.
    fn lease(&mut self) -> Option<Lease> {
        let lease = self.memory.lease_up_to(self.settings.segment, self.memory.limit() / SHARE);
        if lease.is_none() && !self.lacks_memory {
            self.shared.metrics.range(RangeResult::NoMemory);
        }
        self.lacks_memory = lease.is_none();
        lease
    }

    /// One request for all that is missing. What is not needed of it is dropped.
    fn open_rest(&self, pause: Duration) -> Open {
        Open { bytes: self.shared.read(self.at..self.size, pause), behind: Bytes::new(), begun: Instant::now(), waits: None }
    }

    /// The open answer broke off. With segments ahead it is asked for again here. Without, it is a transfer like any other, and the fill decides: unless the
    /// source has too much to do, since this module has dropped an answer that did not need another request.
    fn ask_again(&mut self, fault: Fault) -> Result<(), Broke> {
        self.open = None;
        let is_limit = fault.is_source_limit();
        if self.segments.is_empty() && !is_limit {
            return Err(Broke::Fault(fault));
        }
        if is_limit {
            self.read_on();
        }
        let pause = if is_limit { self.retries.after_limit(self.at) } else { self.retries.after(&fault, self.at) };
        let Some(pause) = pause else { return Err(Broke::Fault(fault)) };
        self.shared.metrics.range(RangeResult::Retried);
        self.open = Some(self.open_rest(pause));
        Ok(())
    }

    /// When what is at the head is slow enough to be asked for a second time.
    fn hedge_at(&self) -> Option<Instant> {
        let running = self.segments.iter().filter(|segment| !segment.buffer.is_whole()).count() + usize::from(self.open.is_some());
        let head = self.segments.front()?;
        let begun = match &self.open {
            Some(open) => open.begun,
            None if head.is_hedged => return None,
            None => head.begun,
        };
        let may = self.gives_ranges
            && self.settings.retries > 0
            && running < self.most
            && self.hedges <= self.shared.requests.load(Relaxed) / HEDGES;
        Some(begun + (2 * self.shared.median()?).max(SLOW)).filter(|_| may)
    }

    /// Asks for the rest of what is at the head once more.
    fn hedge(&mut self) {
        if let Some(open) = self.open.take() {
            let (Some(lease), Some(until)) = (self.lease(), self.segments.front().map(|first| first.range.start)) else {
                // Without memory for a segment it stays as it is.
                self.open = Some(Open { begun: Instant::now(), ..open });
                return;
            };
            let mut segment = Segment::new(self.at..until, lease);
            segment.begun = open.begun;
            segment.feed(&self.shared, Some(open.bytes), self.settings.retries);
            self.segments.push_front(segment);
        }
        if let Some(head) = self.segments.front_mut() {
            head.is_hedged = true;
            head.feed(&self.shared, None, 0);
            self.hedges += 1;
            self.shared.metrics.range(RangeResult::Hedged);
        }
    }
}

async fn at(instant: Option<Instant>) {
    match instant {
        Some(instant) => sleep_until(instant).await,
        None => pending().await,
    }
}

/// A part of the blob that tasks read.
struct Segment {
    range: Range<u64>,
    begun: Instant,
    is_hedged: bool,
    buffer: Arc<Buffer>,
    /// Ends the tasks when it is dropped.
    tasks: JoinSet<()>,
    _lease: Lease,
}

impl Segment {
    fn new(range: Range<u64>, lease: Lease) -> Self {
        let buffer = Arc::new(Buffer::new(range.clone()));
        Self { range, begun: Instant::now(), is_hedged: false, buffer, tasks: JoinSet::new(), _lease: lease }
    }

    /// Starts a task that reads what the segment lacks: from `open`, which has it, and from answers to further requests.
    fn feed(&mut self, shared: &Arc<Shared>, open: Option<Stream>, retries: usize) {
        self.buffer.state.lock().tasks += 1;
        let feeder = Feeder { shared: shared.clone(), buffer: self.buffer.clone(), begun: self.begun, why: None };
        self.tasks.spawn(feeder.run(open, retries));
    }
}

/// The bytes of a segment that have come and were not taken yet.
struct Buffer {
    range: Range<u64>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Up to where the bytes have come.
    seen: u64,
    parts: VecDeque<Bytes>,
    /// Short pieces, merged. They come after `parts`.
    tail: BytesMut,
    /// A request was answered with a range.
    is_answered: bool,
    /// [`Parallel::next`] waits for bytes.
    is_wanted: bool,
    /// How many tasks still try.
    tasks: usize,
    /// Why the last of them gave up.
    failed: Option<NoRange>,
}

/// What came of bytes that were added.
struct Added {
    /// The segment is whole now.
    completes: bool,
    /// [`Parallel::next`] must know.
    wakes: bool,
}

enum Taken {
    Bytes(Bytes),
    Nothing,
    Failed(NoRange),
}

impl Buffer {
    fn new(range: Range<u64>) -> Self {
        let state = State { seen: range.start, ..State::default() };
        Self { range, state: Mutex::new(state) }
    }

    fn seen(&self) -> u64 {
        self.state.lock().seen
    }

    fn is_whole(&self) -> bool {
        self.seen() == self.range.end
    }

    fn is_answered(&self) -> bool {
        self.state.lock().is_answered
    }

    fn failed(&self) -> Option<NoRange> {
        self.state.lock().failed.clone()
    }

    fn take(&self) -> Taken {
        let mut state = self.state.lock();
        if let Some(part) = state.parts.pop_front() {
            return Taken::Bytes(part);
        }
        if !state.tail.is_empty() {
            return Taken::Bytes(state.tail.split().freeze());
        }
        if let Some(why) = &state.failed {
            return Taken::Failed(why.clone());
        }
        state.is_wanted = true;
        Taken::Nothing
    }

    /// Notes that a request was answered, and adds what is new of these bytes. They begin at `at`, which is not behind what has come.
    fn add(&self, at: u64, mut bytes: Bytes) -> Added {
        let mut state = self.state.lock();
        let mut added = Added { completes: false, wakes: !std::mem::replace(&mut state.is_answered, true) };
        let known = usize::try_from(state.seen - at).unwrap_or(usize::MAX);
        if known >= bytes.len() {
            return added;
        }
        bytes.advance(known);
        state.seen += bytes.len() as u64;
        let is_short = bytes.len() < PIECE;
        if is_short {
            state.tail.extend_from_slice(&bytes);
        }
        if !state.tail.is_empty() && (!is_short || state.tail.len() >= MERGED) {
            let merged = state.tail.split().freeze();
            state.parts.push_back(merged);
        }
        if !is_short {
            state.parts.push_back(bytes);
        }
        added.completes = state.seen == self.range.end;
        added.wakes |= std::mem::take(&mut state.is_wanted) || added.completes;
        added
    }
}

/// The task that reads a segment.
struct Feeder {
    shared: Arc<Shared>,
    buffer: Arc<Buffer>,
    begun: Instant,
    /// Why it gave up.
    why: Option<NoRange>,
}

impl Feeder {
    async fn run(mut self, mut open: Option<Stream>, retries: usize) {
        let mut retries = Retries::new(retries, self.shared.retry_budget.clone());
        let mut pause = Duration::ZERO;
        loop {
            let begin = self.buffer.seen();
            let bytes = open.take().unwrap_or_else(|| self.shared.read(begin..self.buffer.range.end, pause));
            let Err(why) = self.read(begin, bytes).await else { return };
            if self.buffer.is_whole() {
                return;
            }
            let again = match &why {
                NoRange::Fault(fault) if fault.is_source_limit() => {
                    self.shared.refused.fetch_add(1, Relaxed);
                    // Not a reason to give up here: one transfer might not have been too much.
                    retries.after_limit(self.progress())
                }
                NoRange::Fault(fault) => retries.after(fault, self.progress()),
                NoRange::Replaced | NoRange::Ignored => None,
            };
            let Some(delay) = again else {
                self.shared.metrics.range(match &why {
                    NoRange::Fault(_) => RangeResult::Failed,
                    NoRange::Replaced => RangeResult::Replaced,
                    NoRange::Ignored => RangeResult::Ignored,
                });
                self.why = Some(why);
                return;
            };
            self.shared.metrics.range(RangeResult::Retried);
            pause = delay;
        }
    }

    fn progress(&self) -> u64 {
        self.buffer.seen() - self.buffer.range.start
    }

    /// Reads an answer to its end, or to that of the segment.
    async fn read(&self, begin: u64, mut bytes: Stream) -> Result<(), NoRange> {
        let (end, mut at) = (self.buffer.range.end, begin);
        while at < end {
            let Some(next) = bytes.next().await else { return Err(NoRange::Fault(self.shared.broke())) };
            let mut next = next?;
            // The answer that was open first goes on behind the segment.
            next.truncate(usize::try_from(end - at).unwrap_or(usize::MAX));
            let length = next.len() as u64;
            let added = self.buffer.add(at, next);
            at += length;
            if added.completes {
                self.shared.took(self.begun.elapsed());
                self.shared.metrics.range(RangeResult::Ok);
            }
            if added.wakes {
                self.shared.changed.notify_one();
            }
        }
        Ok(())
    }
}

impl Drop for Feeder {
    fn drop(&mut self) {
        let mut state = self.buffer.state.lock();
        state.tasks -= 1;
        if state.tasks == 0 && state.seen < self.buffer.range.end {
            let lost = || NoRange::Fault(Fault::Internal("the task that read a range has ended".into()));
            state.failed = Some(self.why.take().unwrap_or_else(lost));
        }
        drop(state);
        self.shared.changed.notify_one();
    }
}

#[cfg(test)]
mod tests;

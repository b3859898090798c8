//! A store whose answers are scripted, read as large blobs are.

use super::*;
use crate::fault::Limit;
use futures::future::BoxFuture;
use proptest::prelude::*;
use std::sync::atomic::AtomicBool;
use tokio::{sync::Semaphore, time::timeout};

/// Small segments, so that a test has many.
const TEST_SEGMENT: u64 = 64 << 10;
/// No test waits longer for anything.
const DEADLINE: Duration = Duration::from_secs(20);

/// How one request is answered.
#[derive(Clone, Debug)]
enum Act {
    Honest,
    /// Ends after so many bytes as if that were all.
    Short(u64),
    /// Breaks after so many bytes.
    Break(u64),
    /// Sends nothing more after so many bytes.
    Stall(u64),
    /// Sends more than it was asked for.
    Long,
    /// No answer until the semaphore has permits.
    Hold(Arc<Semaphore>),
    /// No answer at all.
    Mute,
    No(NoRange),
    Panic,
}

/// The store.
struct Store {
    blob: Bytes,
    /// The answers to the next requests.
    acts: Mutex<VecDeque<Act>>,
    /// The answer to all further ones.
    then: Act,
    asked: Mutex<Vec<Range<u64>>>,
    running: Arc<AtomicUsize>,
    most_running: AtomicUsize,
    /// Bytes that it has sent.
    sent: Arc<AtomicUsize>,
    given_up: AtomicBool,
}

/// Counts a request as running.
struct Running(Arc<AtomicUsize>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

fn broken() -> Fault {
    Fault::Unreachable { source_name: "test", why: "reset".into() }
}

fn busy() -> NoRange {
    NoRange::Fault(Fault::Busy(Limit::Origin))
}

impl Store {
    fn new(size: u64, acts: impl IntoIterator<Item = Act>, then: Act) -> Arc<Self> {
        let blob = (0..size).map(|at| (((at * 31) >> 7) ^ at) as u8).collect();
        Arc::new(Self {
            blob,
            acts: Mutex::new(acts.into_iter().collect()),
            then,
            asked: Mutex::default(),
            running: Arc::default(),
            most_running: AtomicUsize::new(0),
            sent: Arc::default(),
            given_up: AtomicBool::new(false),
        })
    }

    fn honest(size: u64) -> Arc<Self> {
        Self::new(size, [], Act::Honest)
    }

    fn size(&self) -> u64 {
        self.blob.len() as u64
    }

    fn asked(&self) -> Vec<Range<u64>> {
        self.asked.lock().clone()
    }

    /// The bytes of a range, in pieces of odd lengths, as the act says.
    fn bytes(&self, range: Range<u64>, act: &Act) -> BoxStream<'static, Result<Bytes, Fault>> {
        let length = range.end - range.start;
        let (length, end) = match act {
            Act::Short(after) => (length.min(*after), None),
            Act::Break(after) => (length.min(*after), Some(stream::once(ready(Err(broken()))).boxed())),
            Act::Stall(after) => (length.min(*after), Some(stream::pending().boxed())),
            Act::Long => (length + 1000, None),
            _ => (length, None),
        };
        let body = self.blob.slice(range.start as usize..self.blob.len().min((range.start + length) as usize));
        let sent = self.sent.clone();
        let pieces = stream::unfold((body, 1), move |(mut body, step)| {
            let sent = sent.clone();
            async move {
                tokio::task::yield_now().await;
                let piece = body.split_to(body.len().min(step));
                sent.fetch_add(piece.len(), Relaxed);
                (!piece.is_empty()).then_some((Ok(piece), (body, step * 5 % 30_011)))
            }
        });
        match end {
            Some(end) => pieces.chain(end).boxed(),
            None => pieces.boxed(),
        }
    }

    /// The answer that is open first, and the rest as it is read.
    fn read(self: &Arc<Self>, open: &Act, from: u64, most: usize, retries: usize, memory: &Arc<Budget>) -> Parallel {
        let settings = Settings { over: 0, most, segment: TEST_SEGMENT, retries };
        let metrics = Arc::new(Metrics::new(&prometheus::Registry::new()).unwrap());
        let retry_budget = RetryBudget::new(100, prometheus::IntCounter::new("refused", "refused").unwrap());
        let shared = Shared::new(self.clone(), "test", metrics, retry_budget);
        Parallel::new(settings, shared, memory.clone(), self.bytes(from..self.size(), open), from..self.size())
    }

    /// The front of the blob that comes, and how it ends.
    async fn drain(self: &Arc<Self>, mut parallel: Parallel, from: u64) -> (u64, Option<Broke>) {
        let mut at = from as usize;
        let broke = loop {
            match timeout(DEADLINE, parallel.next()).await.expect("something happens") {
                Ok(Some(bytes)) => {
                    assert!(!bytes.is_empty() && self.blob[at..].starts_with(&bytes), "other bytes at {at}");
                    at += bytes.len();
                }
                Ok(None) => break None,
                Err(broke) => break Some(broke),
            }
        };
        assert!(broke.is_some() || at == self.blob.len(), "it ends at {at} of {}", self.blob.len());
        (at as u64, broke)
    }
}

impl Ranges for Store {
    fn read(&self, range: Range<u64>) -> BoxFuture<'static, Result<BoxStream<'static, Result<Bytes, Fault>>, NoRange>> {
        assert!(range.start < range.end && range.end <= self.size(), "{range:?}");
        let act = self.acts.lock().pop_front().unwrap_or_else(|| self.then.clone());
        self.asked.lock().push(range.clone());
        self.most_running.fetch_max(self.running.fetch_add(1, Relaxed) + 1, Relaxed);
        let (running, bytes) = (Running(self.running.clone()), self.bytes(range, &act));
        Box::pin(async move {
            match act {
                Act::No(why) => return Err(why),
                Act::Mute => pending().await,
                Act::Hold(held) => drop(held.acquire().await.unwrap()),
                Act::Panic => panic!("as the test wants it"),
                _ => {}
            }
            Ok(bytes.inspect(move |_| _ = &running).boxed())
        })
    }

    fn give_up(&self) {
        self.given_up.store(true, Relaxed);
    }
}

fn plenty() -> Arc<Budget> {
    Budget::new(1 << 30)
}

fn count(parallel: &Parallel, result: RangeResult) -> u64 {
    parallel.shared.metrics.ranges(result)
}

#[tokio::test]
async fn every_byte_comes_once_and_in_order() {
    for size in [TEST_SEGMENT + 1, 2 * TEST_SEGMENT, 7 * TEST_SEGMENT - 3, 40 * TEST_SEGMENT + 5] {
        // A blob that is no longer than a segment is not read in parts.
        for from in [0, 1, TEST_SEGMENT - 1].into_iter().filter(|from| size - from > TEST_SEGMENT) {
            let (store, memory) = (Store::honest(size), plenty());
            let (at, broke) = store.drain(store.read(&Act::Honest, from, 4, 2, &memory), from).await;
            assert!(at == size && broke.is_none(), "{broke:?}");
            let mut asked = store.asked();
            asked.sort_by_key(|range| range.start);
            assert_eq!((asked[0].start, asked[asked.len() - 1].end), (from + TEST_SEGMENT, size));
            assert!(asked.windows(2).all(|pair| pair[0].end == pair[1].start), "{asked:?}");
            assert!(asked.iter().all(|range| range.end - range.start <= TEST_SEGMENT));
            assert_eq!(memory.used(), 0);
            assert!(store.most_running.load(Relaxed) <= 4);
        }
    }
}

/// None is answered before three are there.
#[tokio::test]
async fn ranges_are_open_at_the_same_time() {
    let held = Arc::new(Semaphore::new(0));
    let store = Store::new(9 * TEST_SEGMENT, vec![Act::Hold(held.clone()); 3], Act::Honest);
    let memory = plenty();
    let reading = tokio::spawn({
        let (store, parallel) = (store.clone(), store.read(&Act::Honest, 0, 4, 2, &memory));
        async move { store.drain(parallel, 0).await }
    });
    timeout(DEADLINE, async {
        while store.running.load(Relaxed) < 3 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await
    .expect("three requests are open");
    assert_eq!(memory.used(), 3 * TEST_SEGMENT, "each has its memory");
    held.add_permits(100);
    let (at, broke) = reading.await.unwrap();
    assert!(at == store.size() && broke.is_none(), "{broke:?}");
}

#[tokio::test]
async fn without_memory_it_is_one_transfer() {
    // A segment would be more than half of it.
    let (store, memory) = (Store::honest(20 * TEST_SEGMENT), Budget::new(2 * TEST_SEGMENT - 1));
    let parallel = store.read(&Act::Honest, 0, 4, 2, &memory);
    let shared = parallel.shared.clone();
    let (at, broke) = store.drain(parallel, 0).await;
    assert!(at == store.size() && broke.is_none(), "{broke:?}");
    assert_eq!(store.asked(), []);
    assert_eq!(shared.metrics.ranges(RangeResult::NoMemory), 1);
}

#[tokio::test]
async fn memory_for_one_segment() {
    let (store, memory) = (Store::honest(20 * TEST_SEGMENT), Budget::new(2 * TEST_SEGMENT));
    let (at, broke) = store.drain(store.read(&Act::Honest, 0, 4, 2, &memory), 0).await;
    assert!(at == store.size() && broke.is_none(), "{broke:?}");
    assert!(store.most_running.load(Relaxed) <= 2, "{}", store.most_running.load(Relaxed));
    assert_eq!(memory.used(), 0);
}

/// Memory that others take away, and give back.
#[tokio::test]
async fn memory_that_comes_and_goes() {
    let (store, memory) = (Store::honest(60 * TEST_SEGMENT), Budget::new(16 * TEST_SEGMENT));
    let mut parallel = store.read(&Act::Honest, 0, 4, 2, &memory);
    let (mut at, mut taken) = (0, None);
    while let Some(bytes) = parallel.next().await.unwrap() {
        assert!(store.blob[at..].starts_with(&bytes));
        at += bytes.len();
        taken = if (at as u64 / (5 * TEST_SEGMENT)).is_multiple_of(2) { None } else { taken.or_else(|| Some(memory.charge(1 << 30))) };
    }
    assert_eq!(at as u64, store.size());
}

#[tokio::test]
async fn a_store_that_ignores_ranges() {
    let store = Store::new(20 * TEST_SEGMENT, [], Act::No(NoRange::Ignored));
    let (at, broke) = store.drain(store.read(&Act::Honest, 0, 4, 2, &plenty()), 0).await;
    assert!(at == store.size() && broke.is_none(), "{broke:?}");
    assert_eq!(store.asked().len(), 1, "one question tells");
    assert!(store.given_up.load(Relaxed));
}

/// The answer that is open is of the old version, and whole.
#[tokio::test]
async fn another_version_at_the_first_question() {
    let store = Store::new(20 * TEST_SEGMENT, [], Act::No(NoRange::Replaced));
    let (at, broke) = store.drain(store.read(&Act::Honest, 0, 4, 2, &plenty()), 0).await;
    assert!(at == store.size() && broke.is_none(), "{broke:?}");
    assert_eq!(store.asked().len(), 1);
    assert!(store.given_up.load(Relaxed));
}

#[tokio::test]
async fn another_version_midway() {
    let store = Store::new(20 * TEST_SEGMENT, vec![Act::Honest; 6], Act::No(NoRange::Replaced));
    let (at, broke) = store.drain(store.read(&Act::Honest, 0, 4, 2, &plenty()), 0).await;
    assert!(matches!(broke, Some(Broke::Replaced)), "{broke:?}");
    assert_eq!(at, 7 * TEST_SEGMENT, "what came of the old version leaves");
    assert!(!store.given_up.load(Relaxed), "it gives ranges");
}

#[tokio::test]
async fn a_segment_that_breaks_is_asked_for_again() {
    for act in [Act::Break(0), Act::Break(1000), Act::Short(70), Act::No(NoRange::Fault(broken()))] {
        let store = Store::new(9 * TEST_SEGMENT, [Act::Honest, act.clone()], Act::Honest);
        let parallel = store.read(&Act::Honest, 0, 4, 2, &plenty());
        let shared = parallel.shared.clone();
        let (at, broke) = store.drain(parallel, 0).await;
        assert!(at == store.size() && broke.is_none(), "{act:?}: {broke:?}");
        assert_eq!(shared.metrics.ranges(RangeResult::Retried), 1, "{act:?}");
        let asked = store.asked();
        let again: Vec<_> = asked.iter().filter(|range| range.end == asked[1].end).collect();
        let had = if let Act::Break(had) | Act::Short(had) = act { had } else { 0 };
        assert_eq!(again, [&asked[1], &(asked[1].start + had..asked[1].end)], "{act:?}: no byte is asked for twice");
    }
}

#[tokio::test]
async fn a_segment_that_always_breaks() {
    let store = Store::new(9 * TEST_SEGMENT, vec![Act::Honest; 4], Act::Break(10));
    let (at, broke) = store.drain(store.read(&Act::Honest, 0, 4, 1, &plenty()), 0).await;
    assert!(matches!(broke, Some(Broke::Fault(Fault::Unreachable { .. }))), "{broke:?}");
    assert_eq!(at, 5 * TEST_SEGMENT + 20, "all that came, so that the fill goes on behind it");
}

#[tokio::test]
async fn the_open_answer_breaks() {
    for act in [Act::Break(0), Act::Break(1000), Act::Short(TEST_SEGMENT - 1)] {
        let store = Store::new(9 * TEST_SEGMENT, [], Act::Honest);
        let parallel = store.read(&act, 0, 4, 2, &plenty());
        let (at, broke) = store.drain(parallel, 0).await;
        assert!(at == store.size() && broke.is_none(), "{act:?}: {at} {broke:?}");
    }
}

#[tokio::test]
async fn a_stalled_segment_is_asked_for_once_more() {
    for had in [0, 1000] {
        let acts = [Act::Honest, Act::Stall(had)];
        let store = Store::new(9 * TEST_SEGMENT, acts, Act::Honest);
        let parallel = store.read(&Act::Honest, 0, 4, 2, &plenty());
        let shared = parallel.shared.clone();
        let (at, broke) = store.drain(parallel, 0).await;
        assert!(at == store.size() && broke.is_none(), "{broke:?}");
        assert_eq!(shared.metrics.ranges(RangeResult::Hedged), 1);
        assert_eq!(shared.metrics.ranges(RangeResult::Ok), 9, "each segment once");
        let asked = store.asked();
        assert!(asked.contains(&(asked[1].start + had..asked[1].end)), "only what is missing: {asked:?}");
        timeout(DEADLINE, async {
            while store.running.load(Relaxed) > 0 {
                tokio::task::yield_now().await;
            }
        })
        .await
        .expect("the stalled request is dropped");
    }
}

#[tokio::test]
async fn a_stalled_open_answer_is_asked_for_once_more() {
    let store = Store::honest(9 * TEST_SEGMENT);
    let parallel = store.read(&Act::Stall(1000), 0, 4, 2, &plenty());
    let shared = parallel.shared.clone();
    let (at, broke) = store.drain(parallel, 0).await;
    assert!(at == store.size() && broke.is_none(), "{broke:?}");
    assert_eq!(shared.metrics.ranges(RangeResult::Hedged), 1);
    assert!(store.asked().contains(&(1000..TEST_SEGMENT)), "{:?}", store.asked());
}

#[tokio::test]
async fn hedges_are_few() {
    // Without retries there is none, and each segment has one at most.
    for (retries, most) in [(0, 0), (2, 1)] {
        let acts = [Act::Honest, Act::Stall(10), Act::Honest, Act::Honest, Act::Honest];
        let store = Store::new(9 * TEST_SEGMENT, acts, Act::Stall(10));
        let mut parallel = store.read(&Act::Honest, 0, 4, retries, &plenty());
        while let Ok(next) = timeout(4 * SLOW, parallel.next()).await {
            next.unwrap();
        }
        assert_eq!(count(&parallel, RangeResult::Hedged), most);
    }
}

#[tokio::test]
async fn a_store_with_too_much_to_do() {
    // A range for once, and then nothing but the rest in one request.
    let acts = [vec![Act::Honest], vec![Act::No(busy()); 7]].concat();
    let store = Store::new(9 * TEST_SEGMENT, acts, Act::Honest);
    let (at, broke) = store.drain(store.read(&Act::Honest, 0, 4, 2, &plenty()), 0).await;
    assert!(at == store.size() && broke.is_none(), "{broke:?}");
    // At the first question the open answer goes on.
    let store = Store::new(9 * TEST_SEGMENT, [], Act::No(busy()));
    let (at, broke) = store.drain(store.read(&Act::Honest, 0, 4, 2, &plenty()), 0).await;
    assert!(at == store.size() && broke.is_none(), "{broke:?}");
    assert!(store.asked().iter().all(|range| range.end - range.start <= TEST_SEGMENT));
}

#[tokio::test]
async fn a_store_that_answers_one_request_at_a_time() {
    let store = Store::new(9 * TEST_SEGMENT, [], Act::Mute);
    let (at, broke) = store.drain(store.read(&Act::Honest, 0, 4, 2, &plenty()), 0).await;
    assert!(at == store.size() && broke.is_none(), "{broke:?}");
    assert!(store.given_up.load(Relaxed));
}

#[tokio::test]
async fn a_task_that_panics_is_a_fault() {
    let store = Store::new(9 * TEST_SEGMENT, [Act::Honest, Act::Honest, Act::Honest], Act::Panic);
    let (at, broke) = store.drain(store.read(&Act::Honest, 0, 4, 2, &plenty()), 0).await;
    assert!(matches!(broke, Some(Broke::Fault(Fault::Internal(_)))), "{broke:?}");
    assert_eq!(at, 4 * TEST_SEGMENT);
}

#[tokio::test]
async fn dropping_it_ends_everything() {
    let (store, memory) = (Store::new(40 * TEST_SEGMENT, [Act::Honest], Act::Stall(5000)), plenty());
    let mut parallel = store.read(&Act::Honest, 0, 4, 2, &memory);
    while count(&parallel, RangeResult::Ok) < 2 {
        parallel.next().await.unwrap();
    }
    assert!(memory.used() > 0);
    drop(parallel);
    assert_eq!(memory.used(), 0);
    timeout(DEADLINE, async {
        while store.running.load(Relaxed) > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("no request is left");
}

#[test]
fn ranges_are_not_asked_for_for_a_while() {
    let support = RangeSupport::default();
    assert!(support.is_assumed());
    support.give_up();
    assert!(!support.is_assumed());
}

#[test]
fn connections_are_bounded() {
    let fill = config::Fill::default();
    assert_eq!(most_ahead(&fill), 16, "half of fill.memory");
    assert_eq!(most_ahead(&config::Fill { max_in_flight: 2, ..fill.clone() }), 6);
    for none in [config::Fill { parallel: 1, ..fill.clone() }, config::Fill { parallel_over: config::Size::new(0), ..fill }] {
        assert_eq!(most_ahead(&none), 0);
    }
}

fn act() -> impl Strategy<Value = Act> {
    let after = 0..2 * TEST_SEGMENT;
    prop_oneof![
        6 => Just(Act::Honest),
        1 => after.clone().prop_map(Act::Short),
        1 => after.clone().prop_map(Act::Break),
        1 => Just(Act::Long),
        1 => after.prop_map(Act::Stall),
        1 => Just(Act::No(NoRange::Replaced)),
        1 => Just(Act::No(NoRange::Ignored)),
        1 => Just(Act::No(busy())),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 20, ..ProptestConfig::default() })]

    /// The store may do anything: the bytes are those of the blob, in order, and no memory stays.
    #[test]
    fn the_bytes_are_right_or_there_is_a_fault(
        segments in 1u64..12,
        odd in 1u64..TEST_SEGMENT,
        from in 0u64..TEST_SEGMENT,
        most in 2usize..7,
        retries in 0usize..3,
        budget in 0u64..20,
        threads in 1usize..3,
        open in act(),
        acts in prop::collection::vec(act(), 0..12),
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build().unwrap();
        runtime.block_on(async {
            let (store, memory) = (Store::new(segments * TEST_SEGMENT + odd, acts, Act::Honest), Budget::new(budget * TEST_SEGMENT));
            let mut parallel = store.read(&open, from, most, retries, &memory);
            let mut at = from as usize;
            // A stall that is not asked for again lasts until the source's own timeout.
            while let Ok(Ok(Some(bytes))) = timeout(3 * SLOW, parallel.next()).await {
                assert!(store.blob[at..].starts_with(&bytes), "other bytes at {at}");
                at += bytes.len();
                assert!(memory.used() <= memory.limit() / SHARE);
            }
            drop(parallel);
            assert_eq!(memory.used(), 0);
        });
    }
}

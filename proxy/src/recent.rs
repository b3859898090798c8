//! Who asks for what, of late: the heaviest clients, the hottest and the most refused digests, and how long first bytes took.
//!
//! A label of a metric never names a client or a digest, since there is no end of them. Here the heaviest are found in memory of fixed size, by
//! space-saving [`sketch`]es over windows of [`WINDOW`]: the present one and [`CLOSED`] that are over, which together are the last five
//! minutes, or up to one window less.
//!
//! A hit must not wait here. Each thread has a shard of its own, and takes its lock only if nobody has it: else the next one's, and if all
//! are taken the request is not counted here ([`Top::skipped`]). A shard is locked by another for as long as it takes to swap it for an empty one or
//! to copy it.
//!
//! Each shard and window has [`COUNTERS`] counters for each kind. What is told of a key is exact while a window has no more keys than that in
//! a shard. Beyond that the figures are never too large, and miss at most two parts in [`COUNTERS`] of all that came in each window; a key
//! with more than that is not missed.

mod latency;
mod sketch;

pub use latency::Latency;

use castier_blob::Digest;
use parking_lot::Mutex;
use serde::Serialize;
use sketch::Sketch;
use std::{
    cell::Cell,
    collections::{HashMap, VecDeque},
    hash::Hash,
    mem,
    net::IpAddr,
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

/// What [`Top`] covers.
const COVERED: Duration = Duration::from_secs(300);
/// How long a window lasts.
const WINDOW: Duration = Duration::from_secs(30);
/// How many windows are remembered beside the present one.
const CLOSED: usize = 9;
/// How many keys of each kind a shard or a window can tell apart. All of it takes 2 MiB at 16 shards.
const COUNTERS: u16 = 256;
/// The most shards: more threads share them.
const SHARDS: usize = 16;
/// How many of each kind are told.
const TOLD: usize = 20;
/// What a request weighs beside its bytes when clients are compared. A small hit costs about as much processor time as copying so much.
const REQUEST: u64 = 32 << 10;

/// One request of a client, answered.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    /// Who asked.
    pub client: Option<IpAddr>,
    /// For which blob.
    pub digest: Option<Digest>,
    /// To read it, and not to store or delete it.
    pub reads: bool,
    /// The status of the answer.
    pub code: u16,
    /// How much of the blob was sent.
    pub bytes: u64,
    /// How long the first byte took.
    pub first_byte: Option<Duration>,
}

/// See the module.
pub struct Recent {
    shards: Box<[Mutex<Shard>]>,
    closed: Mutex<Closed>,
    skipped: AtomicU64,
}

/// What one thread has seen.
struct Shard {
    /// In the present window.
    counts: Counts,
    /// Since the start.
    first_byte: Latency,
}

struct Counts {
    clients: Sketch<IpAddr>,
    digests: Sketch<Digest>,
    refused: Sketch<Digest>,
}

/// The windows that are over.
struct Closed {
    /// When the present one began.
    began: Instant,
    windows: VecDeque<Tallies>,
    /// Empty, to be swapped for a shard's counts.
    spare: Counts,
}

/// What several sketches say together.
#[derive(Default)]
struct Tallies {
    clients: Tally<IpAddr>,
    digests: Tally<Digest>,
    refused: Tally<Digest>,
}

struct Tally<K>(HashMap<K, Sum>);

impl<K> Default for Tally<K> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

/// What is sure about a key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Sum {
    weight: u64,
    requests: u64,
    bytes: u64,
}

/// The heaviest of late.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Top {
    /// How far back it goes at most.
    pub seconds: u64,
    /// By their bytes and, for each request, 32 KiB.
    pub clients: Vec<TopClient>,
    /// By how often clients read them.
    pub digests: Vec<TopDigest>,
    /// By how often clients were answered with 400 or more.
    pub refused: Vec<TopRefused>,
    /// Requests since the start that are in none of these, as all shards were in use at that moment.
    pub skipped: u64,
}

/// One client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TopClient {
    /// Its address.
    pub client: IpAddr,
    /// Its requests.
    pub requests: u64,
    /// What it was sent.
    pub bytes: u64,
}

/// One blob that was read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TopDigest {
    /// Its name.
    pub digest: String,
    /// How often.
    pub requests: u64,
    /// How much of it was sent, by all answers together.
    pub bytes: u64,
}

/// One blob that was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TopRefused {
    /// Its name.
    pub digest: String,
    /// How often.
    pub requests: u64,
}

thread_local! {
    /// Which shard is this thread's.
    static MINE: Cell<usize> = {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        Cell::new(NEXT.fetch_add(1, Ordering::Relaxed))
    };
}

impl Default for Recent {
    fn default() -> Self {
        Self::new(thread::available_parallelism().map_or(SHARDS, usize::from).min(SHARDS), Instant::now())
    }
}

impl Recent {
    fn new(shards: usize, now: Instant) -> Self {
        let shard = || Mutex::new(Shard { counts: Counts::new(), first_byte: Latency::default() });
        let closed = Closed { began: now, windows: VecDeque::with_capacity(CLOSED + 1), spare: Counts::new() };
        Self { shards: (0..shards.max(1)).map(|_| shard()).collect(), closed: Mutex::new(closed), skipped: AtomicU64::new(0) }
    }

    /// Counts one request. Waits for nobody, and allocates nothing.
    pub fn note(&self, asked: &Asked) {
        let mine = MINE.get();
        let mut shards = (0..self.shards.len()).map(|next| &self.shards[(mine + next) % self.shards.len()]);
        match shards.find_map(|shard| shard.try_lock()) {
            Some(mut shard) => shard.note(asked),
            None => drop(self.skipped.fetch_add(1, Ordering::Relaxed)),
        }
    }

    /// Closes the present window if it has lasted long enough. To be called every few seconds.
    pub fn turn(&self, now: Instant) {
        let mut closed = self.closed.lock();
        let Closed { began, windows, spare } = &mut *closed;
        if now.saturating_duration_since(*began) < WINDOW {
            return;
        }
        *began = now;
        let mut window = Tallies::default();
        for shard in &self.shards {
            mem::swap(&mut shard.lock().counts, spare);
            window.add(spare);
            spare.clear();
        }
        window.shrink(usize::from(COUNTERS));
        windows.push_back(window);
        if windows.len() > CLOSED {
            windows.pop_front();
        }
    }

    /// The heaviest of the last five minutes.
    pub fn top(&self) -> Top {
        let mut all = Tallies::default();
        // Held all along, so that no window is closed meanwhile and counted twice.
        let closed = self.closed.lock();
        closed.windows.iter().for_each(|window| all.merge(window));
        self.shards.iter().for_each(|shard| all.add(&shard.lock().counts));
        drop(closed);
        let text = |digest: Digest| digest.to_string();
        Top {
            seconds: COVERED.as_secs(),
            clients: heaviest(all.clients, TOLD)
                .map(|(client, sum)| TopClient { client, requests: sum.requests, bytes: sum.bytes })
                .collect(),
            digests: heaviest(all.digests, TOLD)
                .map(|(digest, sum)| TopDigest { digest: text(digest), requests: sum.requests, bytes: sum.bytes })
                .collect(),
            refused: heaviest(all.refused, TOLD).map(|(digest, sum)| TopRefused { digest: text(digest), requests: sum.requests }).collect(),
            skipped: self.skipped.load(Ordering::Relaxed),
        }
    }

    /// How long the first byte of an answer to a client's read took, since the start.
    pub fn first_byte(&self) -> Latency {
        let mut all = Latency::default();
        self.shards.iter().for_each(|shard| all.merge(&shard.lock().first_byte));
        all
    }
}

impl Shard {
    fn note(&mut self, asked: &Asked) {
        let counts = &mut self.counts;
        if let Some(client) = asked.client {
            counts.clients.add(client.to_canonical(), asked.bytes.saturating_add(REQUEST), asked.bytes);
        }
        match asked.digest {
            Some(digest) if asked.code >= 400 => counts.refused.add(digest, 1, 0),
            Some(digest) if asked.reads => counts.digests.add(digest, 1, asked.bytes),
            _ => {}
        }
        if let Some(first_byte) = asked.first_byte.filter(|_| asked.reads) {
            self.first_byte.add(first_byte);
        }
    }
}

impl Counts {
    fn new() -> Self {
        Self { clients: Sketch::new(COUNTERS), digests: Sketch::new(COUNTERS), refused: Sketch::new(COUNTERS) }
    }

    fn clear(&mut self) {
        self.clients.clear();
        self.digests.clear();
        self.refused.clear();
    }
}

impl Tallies {
    fn add(&mut self, counts: &Counts) {
        self.clients.add(&counts.clients);
        self.digests.add(&counts.digests);
        self.refused.add(&counts.refused);
    }

    fn merge(&mut self, other: &Self) {
        self.clients.merge(&other.clients);
        self.digests.merge(&other.digests);
        self.refused.merge(&other.refused);
    }

    /// Keeps the `most` heaviest of each kind.
    fn shrink(&mut self, most: usize) {
        let Self { clients, digests, refused } = mem::take(self);
        *self = Self { clients: clients.shrunk(most), digests: digests.shrunk(most), refused: refused.shrunk(most) };
    }
}

impl<K: Copy + Eq + Hash + Ord> Tally<K> {
    fn plus(&mut self, key: K, sum: Sum) {
        let known = self.0.entry(key).or_default();
        *known = Sum {
            weight: known.weight.saturating_add(sum.weight),
            requests: known.requests + sum.requests,
            bytes: known.bytes.saturating_add(sum.bytes),
        };
    }

    /// Takes over what a sketch is sure of.
    fn add(&mut self, sketch: &Sketch<K>) {
        for (counter, weight) in sketch.counters() {
            self.plus(counter.key, Sum { weight: weight - counter.error, requests: counter.requests, bytes: counter.bytes });
        }
    }

    fn merge(&mut self, other: &Self) {
        other.0.iter().for_each(|(key, sum)| self.plus(*key, *sum));
    }

    fn shrunk(self, most: usize) -> Self {
        let mut kept = HashMap::with_capacity(self.0.len().min(most));
        kept.extend(heaviest(self, most));
        Self(kept)
    }
}

/// The heaviest keys, the heaviest first.
fn heaviest<K: Copy + Ord>(tally: Tally<K>, most: usize) -> impl Iterator<Item = (K, Sum)> {
    let mut all: Vec<_> = tally.0.into_iter().collect();
    all.sort_unstable_by(|(a, left), (b, right)| right.weight.cmp(&left.weight).then(a.cmp(b)));
    all.into_iter().take(most)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::{collections::BTreeMap, net::Ipv4Addr};

    fn client(number: u8) -> IpAddr {
        Ipv4Addr::new(10, 0, 0, number).into()
    }

    fn asked(number: u8, code: u16, bytes: u64) -> Asked {
        let first_byte = Some(Duration::from_micros(100));
        Asked { client: Some(client(number)), digest: Some(Digest::of(&[number])), reads: true, code, bytes, first_byte }
    }

    proptest! {
        /// With fewer keys than counters all is exact, whatever thread and window it came in.
        #[test]
        fn few_keys_are_counted_exactly(requests in prop::collection::vec((0_u8..60, any::<bool>(), 0_u64..1_000_000, 0_usize..4, 0_u64..3), 0..400)) {
            let start = Instant::now();
            let recent = Recent::new(4, start);
            let (mut clients, mut digests, mut refused) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
            let mut now = start;
            for (number, fails, bytes, shard, seconds) in requests {
                now += Duration::from_secs(seconds);
                if now - start > WINDOW * (CLOSED as u32) {
                    break;
                }
                recent.turn(now);
                MINE.set(shard);
                recent.note(&asked(number, if fails { 404 } else { 200 }, bytes));
                let plus = |map: &mut BTreeMap<u8, (u64, u64)>| {
                    let entry = map.entry(number).or_default();
                    *entry = (entry.0 + 1, entry.1 + bytes);
                };
                plus(&mut clients);
                plus(if fails { &mut refused } else { &mut digests });
            }
            let heaviest = |map: &BTreeMap<u8, (u64, u64)>, weight: fn((u64, u64)) -> u64| {
                let mut weights: Vec<_> = map.values().map(|sum| weight(*sum)).collect();
                weights.sort_unstable_by(|a, b| b.cmp(a));
                weights.truncate(TOLD);
                weights
            };
            let top = recent.top();
            let client_weight = |sum: (u64, u64)| sum.1 + sum.0 * REQUEST;
            prop_assert_eq!(top.clients.iter().map(|top| client_weight((top.requests, top.bytes))).collect::<Vec<_>>(), heaviest(&clients, client_weight));
            prop_assert_eq!(top.digests.iter().map(|top| top.requests).collect::<Vec<_>>(), heaviest(&digests, |sum| sum.0));
            prop_assert_eq!(top.refused.iter().map(|top| top.requests).collect::<Vec<_>>(), heaviest(&refused, |sum| sum.0));
            for top in &top.clients {
                let number = match top.client { IpAddr::V4(address) => address.octets()[3], IpAddr::V6(_) => 255 };
                prop_assert_eq!(clients[&number], (top.requests, top.bytes));
            }
            prop_assert_eq!(top.skipped, 0);
        }
    }

    #[test]
    fn what_is_old_is_forgotten() {
        let start = Instant::now();
        let recent = Recent::new(2, start);
        recent.note(&asked(1, 200, 5));
        for window in 1..=CLOSED as u32 {
            recent.turn(start + WINDOW * window);
            recent.turn(start + WINDOW * window + WINDOW / 2);
            assert_eq!(recent.top().clients.len(), 1, "after {window}");
        }
        assert_eq!((recent.top().digests[0].requests, recent.top().digests[0].bytes), (1, 5));
        recent.turn(start + WINDOW * (CLOSED as u32 + 1));
        let forgotten = Top { seconds: 300, ..Top::default() };
        assert_eq!(recent.top(), forgotten);
        assert_eq!(recent.first_byte().quantile(0.5).map(|ms| (ms * 100.0).round()), Some(10.0), "first bytes are counted since the start");
    }

    #[test]
    fn who_floods_shows_among_many() {
        let recent = Recent::new(1, Instant::now());
        for number in 0..100_000_u32 {
            let once = Ipv4Addr::from(number);
            recent.note(&Asked { client: Some(once.into()), digest: Some(Digest::of(&number.to_le_bytes())), ..asked(0, 200, 10) });
            if number % 100 == 0 {
                recent.note(&asked(7, 200, 10));
            }
        }
        let top = recent.top();
        assert_eq!((top.clients[0].client, &top.digests[0].digest), (client(7), &Digest::of(&[7]).to_string()));
        assert!((500..=1000).contains(&top.clients[0].requests), "{top:?}");
    }

    #[test]
    fn what_is_counted_where() {
        let recent = Recent::new(1, Instant::now());
        recent.note(&Asked { reads: false, ..asked(1, 201, 0) });
        recent.note(&asked(2, 404, 0));
        recent.note(&Asked { client: Some("::ffff:10.0.0.2".parse().unwrap()), digest: None, ..asked(2, 200, 0) });
        let top = recent.top();
        assert_eq!(top.clients.iter().map(|top| (top.client, top.requests)).collect::<Vec<_>>(), [(client(2), 2), (client(1), 1)]);
        assert!(top.digests.is_empty() && top.refused.len() == 1, "{top:?}");
    }

    #[test]
    fn a_busy_shard_is_passed_over_and_all_busy_are_told() {
        let recent = Recent::new(2, Instant::now());
        MINE.set(0);
        let first = recent.shards[0].lock();
        recent.note(&asked(1, 200, 0));
        let second = recent.shards[1].lock();
        recent.note(&asked(1, 200, 0));
        drop((first, second));
        let top = recent.top();
        assert_eq!((top.clients[0].requests, top.skipped), (1, 1));
    }
}

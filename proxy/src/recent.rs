//! The heaviest clients, the most requested and the most refused digests of the last five minutes, and the latencies of first bytes.
//!
//! Metrics must not have clients or digests as labels, since their number is unbounded. So this module finds the heaviest in fixed memory,
//! with [`heavy_hitters`] over windows of [`WINDOW`]: the current one and the last [`CLOSED`]. Together they cover the last five minutes, or
//! up to one window less.
//!
//! A hit must not wait here. Each thread has its own shard, and tries its lock. If that is taken, it tries the next shard. If all are taken,
//! the request is not counted ([`Top::skipped`]). Another thread holds a shard's lock only to swap it for an empty one, or to copy it.
//!
//! Each shard and window has [`COUNTERS`] counters for each kind. While a window has no more keys than that in a shard, the figures are
//! exact. Beyond that the figures of a key are never too large, and too small by at most 2/[`COUNTERS`] of the window's total. A key with
//! more than that is always found.

mod heavy_hitters;
mod latency;

pub use latency::Latency;

use castier_blob::Digest;
use heavy_hitters::HeavyHitters;
use parking_lot::Mutex;
use serde::Serialize;
use std::{
    cell::Cell,
    collections::{BTreeSet, HashMap, VecDeque},
    hash::Hash,
    mem,
    net::IpAddr,
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

/// The time that [`Top`] covers.
const COVERED: Duration = Duration::from_secs(300);
/// The length of a window.
const WINDOW: Duration = Duration::from_secs(30);
/// The number of past windows beside the current one.
const CLOSED: usize = 9;
/// The counters of each kind in a shard or a window. With 16 shards, all of them take 2 MiB.
const COUNTERS: u16 = 256;
/// The most shards. More threads share them.
const SHARDS: usize = 16;
/// The length of each list in [`Top`].
const LISTED: usize = 20;
/// The weight of a request, in bytes, beside its body. A small hit costs about as much CPU time as copying this many bytes.
const REQUEST: u64 = 32 << 10;

/// An answered request of a client.
#[derive(Clone, Copy, Debug)]
pub struct ClientRequest {
    /// The client's address.
    pub client: Option<IpAddr>,
    /// The requested blob.
    pub digest: Option<Digest>,
    /// Whether the request reads the blob; false for uploads and deletions.
    pub reads: bool,
    /// The status of the answer.
    pub code: u16,
    /// The bytes of the blob that were sent.
    pub bytes: u64,
    /// The time to the first byte of the answer.
    pub first_byte: Option<Duration>,
}

/// See the module.
pub struct Recent {
    shards: Box<[Mutex<ThreadShard>]>,
    closed: Mutex<Closed>,
    skipped: AtomicU64,
}

/// The counts of one thread.
struct ThreadShard {
    /// Of the current window.
    counts: Counts,
    /// Since the start.
    first_byte: Latency,
}

struct Counts {
    clients: HeavyHitters<IpAddr>,
    digests: HeavyHitters<Digest>,
    refused: HeavyHitters<Digest>,
}

/// The past windows.
struct Closed {
    /// When the current window began.
    began: Instant,
    windows: VecDeque<WindowSums>,
    /// Empty counts, to swap for those of a shard.
    spare: Counts,
}

/// The sums over several shards or windows.
#[derive(Default)]
struct WindowSums {
    clients: KeySums<IpAddr>,
    digests: KeySums<Digest>,
    refused: KeySums<Digest>,
}

struct KeySums<K>(HashMap<K, Sum>);

impl<K> Default for KeySums<K> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

/// The figures of a key that are certain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Sum {
    weight: u64,
    requests: u64,
    bytes: u64,
}

/// The object `top` of `/stats`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Top {
    /// The time that it covers at most.
    pub seconds: u64,
    /// The ten with the most requests, the ten with the most bytes, and more up to 20 in all; the heaviest first. Each request counts its bytes and 32 KiB.
    pub clients: Vec<TopClient>,
    /// The digests that clients have read most often.
    pub digests: Vec<TopDigest>,
    /// The digests that were most often answered with status 400 or more.
    pub refused: Vec<TopRefused>,
    /// Requests since the start that were not counted, since all shards were in use.
    pub skipped: u64,
}

/// One client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TopClient {
    /// The client's address, or its network of 64 bits.
    pub client: IpAddr,
    /// The number of its requests.
    pub requests: u64,
    /// The bytes of blobs that were sent to it.
    pub bytes: u64,
}

/// One blob that clients read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TopDigest {
    /// Its digest.
    pub digest: String,
    /// The number of requests.
    pub requests: u64,
    /// The bytes that were sent in all answers together.
    pub bytes: u64,
}

/// One blob whose requests failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TopRefused {
    /// Its digest.
    pub digest: String,
    /// The number of requests.
    pub requests: u64,
}

thread_local! {
    /// The index of this thread's shard.
    static SHARD_OF_THREAD: Cell<usize> = {
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
        let shard = || Mutex::new(ThreadShard { counts: Counts::new(), first_byte: Latency::default() });
        let closed = Closed { began: now, windows: VecDeque::with_capacity(CLOSED + 1), spare: Counts::new() };
        Self { shards: (0..shards.max(1)).map(|_| shard()).collect(), closed: Mutex::new(closed), skipped: AtomicU64::new(0) }
    }

    /// Counts one request. Does not wait and does not allocate.
    pub fn note(&self, asked: &ClientRequest) {
        let mine = SHARD_OF_THREAD.get();
        let mut shards = (0..self.shards.len()).map(|next| &self.shards[(mine + next) % self.shards.len()]);
        match shards.find_map(|shard| shard.try_lock()) {
            Some(mut shard) => shard.note(asked),
            None => drop(self.skipped.fetch_add(1, Ordering::Relaxed)),
        }
    }

    /// Starts a new window if the current one has lasted [`WINDOW`]. Call it every few seconds.
    pub fn rotate(&self, now: Instant) {
        let mut closed = self.closed.lock();
        let Closed { began, windows, spare } = &mut *closed;
        if now.saturating_duration_since(*began) < WINDOW {
            return;
        }
        *began = now;
        let mut window = WindowSums::default();
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
        let mut all = WindowSums::default();
        // Held until the end, so that `rotate` cannot move a shard's counts into a window that was merged already.
        let closed = self.closed.lock();
        closed.windows.iter().for_each(|window| all.merge(window));
        self.shards.iter().for_each(|shard| all.add(&shard.lock().counts));
        drop(closed);
        let text = |digest: Digest| digest.to_string();
        Top {
            seconds: COVERED.as_secs(),
            clients: top_clients(all.clients),
            digests: heaviest(all.digests, LISTED)
                .map(|(digest, sum)| TopDigest { digest: text(digest), requests: sum.requests, bytes: sum.bytes })
                .collect(),
            refused: heaviest(all.refused, LISTED)
                .map(|(digest, sum)| TopRefused { digest: text(digest), requests: sum.requests })
                .collect(),
            skipped: self.skipped.load(Ordering::Relaxed),
        }
    }

    /// The latencies of the first bytes of answers to clients' reads, since the start.
    pub fn first_byte(&self) -> Latency {
        let mut all = Latency::default();
        self.shards.iter().for_each(|shard| all.merge(&shard.lock().first_byte));
        all
    }
}

/// Those with the most requests and those with the most bytes, half of the list each, and then the heaviest of the others.
fn top_clients(sums: KeySums<IpAddr>) -> Vec<TopClient> {
    let all: Vec<_> =
        heaviest(sums, usize::MAX).map(|(client, sum)| TopClient { client, requests: sum.requests, bytes: sum.bytes }).collect();
    let first = |of: fn(&TopClient) -> u64| {
        let mut order: Vec<usize> = (0..all.len()).collect();
        order.sort_by_key(|index| std::cmp::Reverse(of(&all[*index])));
        order.into_iter().take(LISTED / 2)
    };
    let mut listed: BTreeSet<usize> = first(|client| client.requests).chain(first(|client| client.bytes)).collect();
    let others: Vec<usize> = (0..all.len()).filter(|index| !listed.contains(index)).take(LISTED - listed.len()).collect();
    listed.extend(others);
    listed.into_iter().map(|index| all[index].clone()).collect()
}

impl ThreadShard {
    fn note(&mut self, asked: &ClientRequest) {
        let counts = &mut self.counts;
        if let Some(client) = asked.client {
            counts.clients.add(castier_access::client(client), asked.bytes.saturating_add(REQUEST), asked.bytes);
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
        Self { clients: HeavyHitters::new(COUNTERS), digests: HeavyHitters::new(COUNTERS), refused: HeavyHitters::new(COUNTERS) }
    }

    fn clear(&mut self) {
        self.clients.clear();
        self.digests.clear();
        self.refused.clear();
    }
}

impl WindowSums {
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

impl<K: Copy + Eq + Hash + Ord> KeySums<K> {
    fn plus(&mut self, key: K, sum: Sum) {
        let known = self.0.entry(key).or_default();
        *known = Sum {
            weight: known.weight.saturating_add(sum.weight),
            requests: known.requests + sum.requests,
            bytes: known.bytes.saturating_add(sum.bytes),
        };
    }

    /// Adds the certain part of the figures.
    fn add(&mut self, found: &HeavyHitters<K>) {
        for (counter, weight) in found.counters() {
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
fn heaviest<K: Copy + Ord>(sums: KeySums<K>, most: usize) -> impl Iterator<Item = (K, Sum)> {
    let mut all: Vec<_> = sums.0.into_iter().collect();
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

    fn asked(number: u8, code: u16, bytes: u64) -> ClientRequest {
        let first_byte = Some(Duration::from_micros(100));
        ClientRequest { client: Some(client(number)), digest: Some(Digest::of(&[number])), reads: true, code, bytes, first_byte }
    }

    proptest! {
        /// With fewer keys than counters, the figures are exact, for any threads and windows.
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
                recent.rotate(now);
                SHARD_OF_THREAD.set(shard);
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
                weights.truncate(LISTED);
                weights
            };
            let top = recent.top();
            let client_weight = |sum: (u64, u64)| sum.1 + sum.0 * REQUEST;
            prop_assert!(top.clients.is_sorted_by_key(|top| std::cmp::Reverse(client_weight((top.requests, top.bytes)))));
            prop_assert_eq!(top.clients.len(), clients.len().min(LISTED));
            let ten = |weight: fn((u64, u64)) -> u64| heaviest(&clients, weight).into_iter().take(10).collect::<Vec<_>>();
            let ten_listed = |weight: fn((u64, u64)) -> u64| {
                let mut weights: Vec<_> = top.clients.iter().map(|top| weight((top.requests, top.bytes))).collect();
                weights.sort_unstable_by(|a, b| b.cmp(a));
                weights.truncate(10);
                weights
            };
            prop_assert_eq!(ten_listed(|sum| sum.0), ten(|sum| sum.0));
            prop_assert_eq!(ten_listed(|sum| sum.1), ten(|sum| sum.1));
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
    fn old_windows_are_dropped() {
        let start = Instant::now();
        let recent = Recent::new(2, start);
        recent.note(&asked(1, 200, 5));
        for window in 1..=CLOSED as u32 {
            recent.rotate(start + WINDOW * window);
            recent.rotate(start + WINDOW * window + WINDOW / 2);
            assert_eq!(recent.top().clients.len(), 1, "after {window}");
        }
        assert_eq!((recent.top().digests[0].requests, recent.top().digests[0].bytes), (1, 5));
        recent.rotate(start + WINDOW * (CLOSED as u32 + 1));
        let forgotten = Top { seconds: 300, ..Top::default() };
        assert_eq!(recent.top(), forgotten);
        assert_eq!(recent.first_byte().quantile(0.5).map(|ms| (ms * 100.0).round()), Some(10.0), "first bytes are counted since the start");
    }

    #[test]
    fn a_heavy_client_is_found_among_many() {
        let recent = Recent::new(1, Instant::now());
        for number in 0..100_000_u32 {
            let once = Ipv4Addr::from(number);
            recent.note(&ClientRequest { client: Some(once.into()), digest: Some(Digest::of(&number.to_le_bytes())), ..asked(0, 200, 10) });
            if number % 100 == 0 {
                recent.note(&asked(7, 200, 10));
            }
        }
        let top = recent.top();
        assert_eq!((top.clients[0].client, &top.digests[0].digest), (client(7), &Digest::of(&[7]).to_string()));
        assert!((500..=1000).contains(&top.clients[0].requests), "{top:?}");
    }

    #[test]
    fn reads_writes_and_errors_are_counted_apart() {
        let recent = Recent::new(1, Instant::now());
        recent.note(&ClientRequest { reads: false, ..asked(1, 201, 0) });
        recent.note(&asked(2, 404, 0));
        recent.note(&ClientRequest { client: Some("::ffff:10.0.0.2".parse().unwrap()), digest: None, ..asked(2, 200, 0) });
        let top = recent.top();
        assert_eq!(top.clients.iter().map(|top| (top.client, top.requests)).collect::<Vec<_>>(), [(client(2), 2), (client(1), 1)]);
        assert!(top.digests.is_empty() && top.refused.len() == 1, "{top:?}");
    }

    #[test]
    fn a_locked_shard_is_skipped_and_lost_requests_are_counted() {
        let recent = Recent::new(2, Instant::now());
        SHARD_OF_THREAD.set(0);
        let first = recent.shards[0].lock();
        recent.note(&asked(1, 200, 0));
        let second = recent.shards[1].lock();
        recent.note(&asked(1, 200, 0));
        drop((first, second));
        let top = recent.top();
        assert_eq!((top.clients[0].requests, top.skipped), (1, 1));
    }
}

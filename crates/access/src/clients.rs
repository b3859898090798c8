//! How much each client address may ask: requests, connections, bandwidth.

use arc_swap::ArcSwap;
use governor::{
    Quota, RateLimiter,
    clock::Clock,
    middleware::NoOpMiddleware,
    state::{InMemoryState, NotKeyed},
};
use moka::{policy::EvictionPolicy, sync::Cache};
use parking_lot::Mutex;
use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    num::NonZeroU32,
    sync::Arc,
    time::Duration,
};
use tokio::{
    sync::{Mutex as Turn, Notify},
    time::{Instant, sleep},
};

/// As many addresses have a bucket for each limit. Each costs some 300 bytes. An address that is forgotten begins anew, with a full bucket.
const MOST_ADDRESSES: u64 = 65_536;
/// The least burst of a bandwidth, and what a connection gets in one turn.
const PIECE: u64 = 64 << 10;
/// The longest wait that [`Clients::take_now`] asks for: well below what clients and load balancers take for a stall.
const LONGEST_WAIT: Duration = Duration::from_secs(5);
/// Bandwidth is counted in units, as many a second at most: `governor` counts whole nanoseconds for each, and this is exact to a thousandth.
const MOST_UNITS: u64 = 1_000_000;

/// The limits of each client address. 0: no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Requests a second. As many may come at once.
    pub requests_per_second: u32,
    /// Open connections.
    pub connections_per_client: u32,
    /// Bytes a second, of all connections together. The bytes of one second may go at once, and 64 KiB in any case.
    pub bandwidth_per_client: u64,
}

/// Counts by client address. An IPv6 network of 64 bits is one client, and an IPv4-mapped IPv6 address is the IPv4 one.
pub struct Clients {
    buckets: ArcSwap<Buckets>,
    /// The open connections of each address. Not in a table of limited size, which could forget those that are open: they are bounded in number anyway.
    open: Arc<Open>,
    /// Wakes those who wait by a limit that has changed.
    changed: Notify,
    most_addresses: u64,
}

struct Buckets {
    limits: Limits,
    requests: Option<Table>,
    bandwidth: Option<Table>,
}

/// A bucket for each address; the least recently seen one leaves.
#[derive(Clone)]
struct Table {
    quota: Quota,
    /// Bytes that one unit of the quota is.
    unit: u64,
    buckets: Cache<IpAddr, Arc<Bucket>>,
}

struct Bucket {
    limiter: RateLimiter<NotKeyed, InMemoryState, Ticks, NoOpMiddleware<Duration>>,
    /// Those who wait for the bucket take turns. Without turns small pieces would overtake large ones for ever. Guards the bytes of the last unit that are
    /// paid for and not yet sent.
    turn: Turn<u64>,
}

/// tokio's clock, which tests can stop.
#[derive(Debug)]
struct Ticks(Instant);

/// An open connection. It counts until it is dropped.
#[derive(Debug)]
pub struct Connection(Option<(Arc<Open>, IpAddr)>);

/// Open connections by address.
type Open = Mutex<HashMap<IpAddr, u32>>;

/// The address that limits count by.
pub fn client(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & (u128::MAX << 64)).into(),
        address => address,
    }
}

impl Clients {
    /// Nobody has asked for anything yet.
    pub fn new(limits: Limits) -> Self {
        Self::with_capacity(limits, MOST_ADDRESSES)
    }

    fn with_capacity(limits: Limits, most_addresses: u64) -> Self {
        let nothing = Buckets { limits: Limits::default(), requests: None, bandwidth: None };
        let clients = Self { buckets: ArcSwap::from_pointee(nothing), open: Arc::default(), changed: Notify::new(), most_addresses };
        clients.set(limits);
        clients
    }

    /// Changes the limits. An unchanged limit keeps what it has counted; a changed one begins anew. Connections that were opened without a limit are not
    /// counted later.
    pub fn set(&self, limits: Limits) {
        self.buckets.rcu(|old| {
            let requests = if limits.requests_per_second == old.limits.requests_per_second {
                old.requests.clone()
            } else {
                NonZeroU32::new(limits.requests_per_second).map(|rate| Table::new(Quota::per_second(rate), 1, self.most_addresses))
            };
            let bandwidth = if limits.bandwidth_per_client == old.limits.bandwidth_per_client {
                old.bandwidth.clone()
            } else {
                Table::bandwidth(limits.bandwidth_per_client, self.most_addresses)
            };
            Buckets { limits, requests, bandwidth }
        });
        self.changed.notify_waiters();
    }

    /// Counts a request from this address.
    ///
    /// # Errors
    /// It is one too many. The error says after which time the next one is admitted.
    pub fn admit(&self, address: IpAddr) -> Result<(), Duration> {
        match &self.buckets.load().requests {
            Some(requests) => requests.bucket(client(address)).take(NonZeroU32::MIN),
            None => Ok(()),
        }
    }

    /// Counts a connection from this address until the result is dropped; `None` if it is one too many.
    pub fn connect(&self, address: IpAddr) -> Option<Connection> {
        let most = self.buckets.load().limits.connections_per_client;
        if most == 0 {
            return Some(Connection(None));
        }
        let client = client(address);
        let mut open = self.open.lock();
        let count = open.entry(client).or_insert(0);
        if *count >= most {
            return None;
        }
        *count += 1;
        Some(Connection(Some((self.open.clone(), client))))
    }

    /// Waits until as many bytes may be sent to this address. The connections of an address take turns of 64 KiB, in the order in which they came. The
    /// future has to be polled to its end or dropped: those behind it wait for it.
    pub async fn take(&self, address: IpAddr, bytes: usize) {
        let client = client(address);
        let mut left = bytes as u64;
        while left > 0 {
            // Before the limit is read: a change after that must wake us.
            let changed = self.changed.notified();
            let Some(bandwidth) = self.buckets.load().bandwidth.clone() else { return };
            let piece = left.min(PIECE);
            tokio::select! {
                () = bandwidth.wait(client, piece) => left -= piece,
                () = changed => {}
            }
        }
    }

    /// As [`Self::take`], without waiting: takes what may be sent now. Returns how many bytes are left, and how long it is until some of them may be
    /// sent. Who sends them nevertheless asks for them again with the next ones; then the rate is right in the long run.
    pub fn take_now(&self, address: IpAddr, bytes: u64) -> (u64, Duration) {
        let buckets = self.buckets.load();
        let Some(bandwidth) = &buckets.bandwidth else { return (0, Duration::ZERO) };
        let bucket = bandwidth.bucket(client(address));
        let mut left = bytes;
        while left > 0 {
            let piece = left.min(PIECE);
            let units = u32::try_from(piece.div_ceil(bandwidth.unit)).ok().and_then(NonZeroU32::new);
            if let Some(Err(wait)) = units.map(|units| bucket.take(units)) {
                // As long as all that is owed takes: several that send for one client wait for each other in this way.
                let rest = Duration::from_secs_f64((left - piece) as f64 / buckets.limits.bandwidth_per_client as f64);
                return (left, (wait + rest).min(LONGEST_WAIT));
            }
            left -= piece;
        }
        (0, Duration::ZERO)
    }
}

impl Table {
    fn new(quota: Quota, unit: u64, most_addresses: u64) -> Self {
        let buckets = Cache::builder().max_capacity(most_addresses).eviction_policy(EvictionPolicy::lru()).build();
        Self { quota, unit, buckets }
    }

    /// `None` without a limit.
    fn bandwidth(rate: u64, most_addresses: u64) -> Option<Self> {
        let unit = rate.div_ceil(MOST_UNITS);
        let units = |bytes: u64| bytes.checked_div(unit).and_then(|units| NonZeroU32::new(u32::try_from(units).ok()?));
        let quota = Quota::per_second(units(rate)?).allow_burst(units(rate.max(PIECE))?);
        Some(Self::new(quota, unit, most_addresses))
    }

    fn bucket(&self, client: IpAddr) -> Arc<Bucket> {
        self.buckets.get_with(client, || {
            let limiter = RateLimiter::direct_with_clock(self.quota, Ticks(Instant::now()));
            Arc::new(Bucket { limiter, turn: Turn::default() })
        })
    }

    async fn wait(&self, client: IpAddr, bytes: u64) {
        let bucket = self.bucket(client);
        let mut paid = bucket.turn.lock().await;
        let units = bytes.saturating_sub(*paid).div_ceil(self.unit);
        if let Some(units) = u32::try_from(units).ok().and_then(NonZeroU32::new) {
            while let Err(wait) = bucket.take(units) {
                sleep(wait).await;
            }
        }
        *paid = (*paid + units * self.unit).saturating_sub(bytes);
    }
}

impl Bucket {
    /// Takes all of this; else says how long it is until there is as much.
    fn take(&self, units: NonZeroU32) -> Result<(), Duration> {
        match self.limiter.check_n(units) {
            Ok(Err(until)) => Err(until.wait_time_from(self.limiter.clock().now())),
            // Nobody asks for more than the burst.
            Ok(Ok(())) | Err(_) => Ok(()),
        }
    }
}

impl Clock for Ticks {
    type Instant = Duration;

    fn now(&self) -> Duration {
        self.0.elapsed()
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let Some((open, client)) = self.0.take() else { return };
        let mut open = open.lock();
        if let Some(count) = open.get_mut(&client) {
            *count -= 1;
            if *count == 0 {
                open.remove(&client);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn other(number: u32) -> IpAddr {
        IpAddr::from(number.to_be_bytes())
    }

    fn requests(requests_per_second: u32) -> Limits {
        Limits { requests_per_second, ..Limits::default() }
    }

    fn connections(connections_per_client: u32) -> Limits {
        Limits { connections_per_client, ..Limits::default() }
    }

    fn bandwidth(bandwidth_per_client: u64) -> Limits {
        Limits { bandwidth_per_client, ..Limits::default() }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_sent_without_waiting_is_paid_later() {
        let clients = Clients::new(bandwidth(100_000));
        let (client, began) = (address("10.0.0.1"), Instant::now());
        let mut owed = 0;
        for _ in 0..100 {
            let (left, wait) = clients.take_now(client, owed + 10_000);
            owed = left;
            sleep(wait).await;
        }
        // 1 MB; the first second's worth at once.
        let took = began.elapsed().as_secs_f64();
        assert!((8.0..=10.5).contains(&took), "{took}");
        // Ten at once share it.
        let (clients, began) = (Arc::new(Clients::new(bandwidth(100_000))), Instant::now());
        let mut all = tokio::task::JoinSet::new();
        for _ in 0..10 {
            let clients = clients.clone();
            all.spawn(async move {
                let mut owed = 0;
                for _ in 0..20 {
                    let (left, wait) = clients.take_now(client, owed + 10_000);
                    owed = left;
                    sleep(wait).await;
                }
            });
        }
        while all.join_next().await.is_some() {}
        let took = began.elapsed().as_secs_f64();
        assert!(took > 10.0, "2 MB in {took} s");
        assert_eq!(Clients::new(Limits::default()).take_now(client, u64::MAX), (0, Duration::ZERO));
    }

    /// How many requests of an address are admitted now.
    fn admitted(clients: &Clients, address: IpAddr) -> usize {
        (0..1000).take_while(|_| clients.admit(address).is_ok()).count()
    }

    #[test]
    fn what_counts_as_one_client() {
        for (one, two, is_same) in [
            ("192.0.2.1", "192.0.2.1", true),
            ("192.0.2.1", "192.0.2.2", false),
            ("192.0.2.1", "::ffff:192.0.2.1", true),
            ("::ffff:192.0.2.2", "::ffff:192.0.2.1", false),
            ("2001:db8::1", "2001:db8::ffff:ffff:ffff:ffff", true),
            ("2001:db8::1", "2001:db8:0:1::1", false),
            ("::1", "0.0.0.1", false),
        ] {
            assert_eq!(client(address(one)) == client(address(two)), is_same, "{one} {two}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn requests_are_limited_by_address() {
        let (clients, ann) = (Clients::new(requests(10)), address("192.0.2.1"));
        assert_eq!(admitted(&clients, ann), 10);
        assert_eq!(clients.admit(ann), Err(Duration::from_millis(100)));
        assert_eq!(admitted(&clients, address("192.0.2.2")), 10);
        tokio::time::advance(Duration::from_millis(60)).await;
        assert_eq!(clients.admit(address("::ffff:192.0.2.1")), Err(Duration::from_millis(40)));
        tokio::time::advance(Duration::from_millis(40)).await;
        assert_eq!(admitted(&clients, ann), 1);
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(admitted(&clients, ann), 10);
        tokio::time::advance(Duration::from_secs(100)).await;
        assert_eq!(admitted(&clients, ann), 10, "the burst is bounded");
        clients.set(requests(1));
        assert_eq!(admitted(&clients, ann), 1);
    }

    #[test]
    fn connections_are_limited_by_address() {
        let (clients, ann) = (Clients::new(connections(2)), address("2001:db8::1"));
        let first = clients.connect(ann).unwrap();
        let second = clients.connect(address("2001:db8::2")).unwrap();
        assert!(clients.connect(ann).is_none());
        assert!(clients.connect(ann).is_none(), "a refused one does not count");
        assert!(clients.connect(address("2001:db8:1::1")).is_some());
        drop(first);
        let third = clients.connect(ann).unwrap();
        assert!(clients.connect(ann).is_none());
        clients.set(connections(3));
        let fourth = clients.connect(ann).unwrap();
        assert!(clients.connect(ann).is_none(), "open ones count after a change");
        clients.set(connections(1));
        drop((second, third));
        assert!(clients.connect(ann).is_none());
        drop(fourth);
        assert!(clients.connect(ann).is_some());
        assert!(clients.open.lock().is_empty());
    }

    #[test]
    fn open_connections_count_although_other_addresses_come() {
        let clients = Clients::with_capacity(Limits { connections_per_client: 1, ..requests(1) }, 4);
        let ann = address("192.0.2.1");
        let open = clients.connect(ann).unwrap();
        assert_eq!(admitted(&clients, ann), 1);
        for number in 0..10_000 {
            assert!(clients.connect(other(number)).is_some() && clients.admit(other(number)).is_ok());
        }
        clients.buckets.load().requests.as_ref().unwrap().buckets.run_pending_tasks();
        assert_eq!(admitted(&clients, ann), 1, "its bucket was forgotten");
        assert!(clients.connect(ann).is_none(), "its connection was not");
        drop(open);
        assert!(clients.connect(ann).is_some());
    }

    #[test]
    fn the_address_that_was_seen_least_recently_leaves() {
        let clients = Clients::with_capacity(requests(1), 4);
        let (ann, bob) = (address("192.0.2.1"), address("192.0.2.2"));
        assert!(clients.admit(ann).is_ok() && clients.admit(bob).is_ok());
        let table = clients.buckets.load().requests.clone().unwrap();
        for number in 0..100 {
            assert!(clients.admit(other(number)).is_ok());
            assert!(clients.admit(ann).is_err());
            table.buckets.run_pending_tasks();
        }
        assert!(table.buckets.entry_count() <= 4);
        assert!(clients.admit(bob).is_ok());
        // A newcomer is counted, although all others were seen more often.
        for number in 0..100 {
            let _ = clients.admit(other(1000 + number % 4));
            table.buckets.run_pending_tasks();
        }
        assert!(clients.admit(bob).is_ok());
        table.buckets.run_pending_tasks();
        assert!(clients.admit(bob).is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn bandwidth_is_shared_by_the_connections_of_an_address() {
        const RATE: usize = 256 << 10;
        let clients = Arc::new(Clients::new(bandwidth(RATE as u64)));
        let begun = Instant::now();
        let transfer = |address: &'static str, pieces: usize, piece: usize| {
            let clients = clients.clone();
            tokio::spawn(async move {
                for _ in 0..pieces {
                    clients.take(self::address(address), piece).await;
                }
                begun.elapsed().as_secs_f64()
            })
        };
        // 10 seconds' worth each, in pieces of very different size.
        let one = transfer("192.0.2.1", 10, RATE);
        let two = transfer("::ffff:192.0.2.1", 40, RATE / 4);
        let alone = transfer("192.0.2.2", 10, RATE);
        let (one, two, alone) = (one.await.unwrap(), two.await.unwrap(), alone.await.unwrap());
        // One second's worth is the burst, and the one that comes first gets it.
        assert!((17.5..=19.1).contains(&one.min(two)) && (18.9..=19.1).contains(&one.max(two)), "{one} {two}");
        assert!((8.9..=9.1).contains(&alone), "{alone}");
    }

    #[tokio::test(start_paused = true)]
    async fn small_pieces_do_not_overtake_large_ones() {
        let clients = Arc::new(Clients::new(bandwidth(64 << 10)));
        let ann = address("192.0.2.1");
        clients.take(ann, 64 << 10).await;
        let small = tokio::spawn({
            let clients = clients.clone();
            async move {
                loop {
                    clients.take(ann, 1).await;
                }
            }
        });
        tokio::task::yield_now().await;
        let begun = Instant::now();
        clients.take(ann, 128 << 10).await;
        assert!((1.9..2.1).contains(&begun.elapsed().as_secs_f64()), "{:?}", begun.elapsed());
        small.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn the_burst_is_a_second_and_at_least_64_kib() {
        let ann = address("192.0.2.1");
        for (rate, burst) in [(1_u64, 64 << 10), (1000, 64 << 10), (1 << 20, 1 << 20), (1 << 30, 1 << 30), (1 << 35, 1 << 35)] {
            let clients = Clients::new(bandwidth(rate));
            let begun = Instant::now();
            clients.take(ann, 0).await;
            // Exact, although the pieces are no multiples of the unit.
            let unit = usize::try_from(rate.div_ceil(MOST_UNITS)).unwrap();
            for piece in [1000, 1, 33_333, burst - 34_334 - unit] {
                clients.take(ann, piece).await;
            }
            assert_eq!(begun.elapsed(), Duration::ZERO, "{rate}");
            clients.take(ann, 2 * unit).await;
            assert!(begun.elapsed() > Duration::ZERO, "{rate}");
        }
        let clients = Clients::new(bandwidth(1000));
        clients.take(ann, 64 << 10).await;
        let begun = Instant::now();
        clients.take(ann, 100).await;
        assert!((99..=101).contains(&begun.elapsed().as_millis()), "{:?}", begun.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_gives_up_does_not_stop_the_others() {
        let clients = Clients::new(bandwidth(64 << 10));
        let ann = address("192.0.2.1");
        clients.take(ann, 64 << 10).await;
        let first = tokio::time::timeout(Duration::from_millis(500), clients.take(ann, 64 << 10));
        let second = async {
            clients.take(ann, 64 << 10).await;
            Instant::now()
        };
        let begun = Instant::now();
        let (first, second) = tokio::join!(first, second);
        assert!(first.is_err());
        assert!((second - begun).as_secs_f64() < 1.1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_changed_limit_holds_for_those_who_wait() {
        let clients = Arc::new(Clients::new(bandwidth(1)));
        let ann = address("192.0.2.1");
        let waiting: Vec<_> = (0..3)
            .map(|_| {
                let clients = clients.clone();
                tokio::spawn(async move { clients.take(ann, 10 << 20).await })
            })
            .collect();
        let begun = Instant::now();
        sleep(Duration::from_secs(10)).await;
        clients.set(bandwidth(1 << 20));
        sleep(Duration::from_secs(10)).await;
        assert!(!waiting.iter().any(tokio::task::JoinHandle::is_finished));
        clients.set(Limits::default());
        for waiting in waiting {
            waiting.await.unwrap();
        }
        assert!(begun.elapsed() < Duration::from_millis(20_100), "{:?}", begun.elapsed());

        clients.set(bandwidth(1));
        let begun = Instant::now();
        let slow = clients.take(ann, 1 << 20);
        let change = async {
            sleep(Duration::from_secs(1)).await;
            clients.set(bandwidth(1 << 20));
        };
        tokio::join!(slow, change);
        assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn an_unchanged_limit_keeps_what_it_has_counted() {
        let (clients, ann) = (Clients::new(requests(2)), address("192.0.2.1"));
        assert_eq!(admitted(&clients, ann), 2);
        clients.set(Limits { bandwidth_per_client: 1000, ..requests(2) });
        assert_eq!(admitted(&clients, ann), 0);
        clients.take(ann, 64 << 10).await;
        clients.set(Limits { bandwidth_per_client: 1000, ..requests(3) });
        assert_eq!(admitted(&clients, ann), 3);
        let begun = Instant::now();
        clients.take(ann, 1000).await;
        assert!(begun.elapsed() >= Duration::from_millis(999));
    }

    #[tokio::test]
    async fn without_limits_nothing_is_counted() {
        let (clients, ann) = (Clients::new(Limits::default()), address("192.0.2.1"));
        let open: Vec<_> = (0..1000).map(|_| clients.connect(ann).unwrap()).collect();
        assert_eq!(admitted(&clients, ann), 1000);
        clients.take(ann, usize::MAX).await;
        let buckets = clients.buckets.load();
        assert!(buckets.requests.is_none() && buckets.bandwidth.is_none() && clients.open.lock().is_empty());
        clients.set(connections(1));
        let counted = clients.connect(ann).unwrap();
        clients.set(Limits::default());
        drop((open, counted));
        assert!(clients.open.lock().is_empty());
    }

    proptest! {
        #[test]
        fn every_bandwidth_is_exact_to_a_thousandth(rate in 1..u64::from(u32::MAX) * 100) {
            let table = Table::bandwidth(rate, 1).unwrap();
            let per_second = table.unit as f64 / table.quota.replenish_interval().as_secs_f64();
            prop_assert!((per_second / rate as f64 - 1.0).abs() <= 0.0021, "{rate} {per_second}");
            let burst = u64::from(table.quota.burst_size().get());
            prop_assert!(burst * table.unit + table.unit > rate.max(PIECE) && burst >= PIECE.div_ceil(table.unit));
        }
    }
}

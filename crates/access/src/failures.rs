//! What wrong credentials cost: time of the guesser, and not of the server.
//!
//! Each failure in a row from an address delays its refusal twice as long as the one before. An attempt is counted until its refusal is given, so that few
//! can be under way at once.

use crate::{access::Refused, clients};
use moka::{policy::EvictionPolicy, sync::Cache};
use parking_lot::Mutex;
use std::{net::IpAddr, sync::Arc, time::Duration};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, sleep},
};

/// As many addresses have their failures counted. Each costs some 300 bytes.
const MOST_ADDRESSES: u64 = 10_000;
/// As long after its last failure an address is as good as any other.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(600);
const FIRST_DELAY: Duration = Duration::from_millis(100);
const LONGEST_DELAY: Duration = Duration::from_secs(5);
/// As many refusals wait at once. Each holds a task and a request.
const MOST_WAITING: usize = 256;
/// As many attempts of an address with failures may be under way.
const MOST_ATTEMPTS: usize = 4;

/// After this time some of what fills a limit here has ended.
const TOO_MANY: Refused = Refused::TooMany { retry_after: LONGEST_DELAY };

/// Counts failures by address. Clients without an address, such as those of a UNIX socket, count as one.
pub(crate) struct Failures {
    addresses: Cache<Option<IpAddr>, Arc<Address>>,
    waiting: Semaphore,
}

struct Address {
    failures: Mutex<InARow>,
    attempts: Arc<Semaphore>,
}

struct InARow {
    count: u32,
    last: Instant,
}

/// An attempt that is under way. Counts as one until it is dropped.
pub(crate) struct Attempt {
    client: Option<IpAddr>,
    _held: Option<OwnedSemaphorePermit>,
}

impl Failures {
    pub(crate) fn new() -> Self {
        Self::with_capacity(MOST_ADDRESSES)
    }

    fn with_capacity(addresses: u64) -> Self {
        let addresses = Cache::builder().max_capacity(addresses).eviction_policy(EvictionPolicy::lru()).build();
        Self { addresses, waiting: Semaphore::new(MOST_WAITING) }
    }

    /// Begins an attempt from this address.
    ///
    /// # Errors
    /// [`Refused::TooMany`]: too many are under way.
    pub(crate) fn begin(&self, address: Option<IpAddr>) -> Result<Attempt, Refused> {
        if self.waiting.available_permits() == 0 {
            return Err(TOO_MANY);
        }
        let client = address.map(clients::client);
        let failed = self.addresses.get(&client).filter(|address| address.failures.lock().last.elapsed() < FORGOTTEN_AFTER);
        let held = failed.map(|address| address.attempts.clone().try_acquire_owned()).transpose().map_err(|_| TOO_MANY)?;
        Ok(Attempt { client, _held: held })
    }

    /// The attempt has ended, and the credentials were right.
    pub(crate) fn succeeded(&self, attempt: Attempt) {
        self.addresses.invalidate(&attempt.client);
    }

    /// The credentials of this attempt were wrong. Returns when the client may be told; until then the attempt is under way.
    pub(crate) async fn failed(&self, attempt: Attempt) -> Refused {
        let delay = self.count(attempt.client);
        let Ok(_waiting) = self.waiting.try_acquire() else { return TOO_MANY };
        sleep(delay).await;
        Refused::Wrong
    }

    /// Counts a failure; returns how long its refusal is delayed.
    fn count(&self, client: Option<IpAddr>) -> Duration {
        let address = self.addresses.get_with(client, || {
            let failures = Mutex::new(InARow { count: 0, last: Instant::now() });
            Arc::new(Address { failures, attempts: Arc::new(Semaphore::new(MOST_ATTEMPTS)) })
        });
        let mut failures = address.failures.lock();
        let before = if failures.last.elapsed() < FORGOTTEN_AFTER { failures.count } else { 0 };
        *failures = InARow { count: before.saturating_add(1), last: Instant::now() };
        FIRST_DELAY.saturating_mul(2_u32.saturating_pow(before)).min(LONGEST_DELAY)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::tests::until;

    fn address(text: &str) -> Option<IpAddr> {
        Some(text.parse().unwrap())
    }

    /// How long a failure from this address is delayed, in milliseconds.
    async fn fail(failures: &Failures, client: Option<IpAddr>) -> u128 {
        let begun = Instant::now();
        let attempt = failures.begin(client).unwrap();
        assert_eq!(failures.failed(attempt).await, Refused::Wrong);
        begun.elapsed().as_millis()
    }

    #[tokio::test(start_paused = true)]
    async fn delays_grow_and_are_forgotten() {
        let (failures, ann) = (Failures::new(), address("192.0.2.1"));
        for delay in [100, 200, 400, 800, 1600, 3200, 5000, 5000] {
            assert_eq!(fail(&failures, ann).await, delay);
        }
        assert_eq!(fail(&failures, address("192.0.2.2")).await, 100, "each address has its own");
        assert_eq!(fail(&failures, None).await, 100);
        assert_eq!(fail(&failures, None).await, 200, "those without an address count as one");
        failures.succeeded(failures.begin(ann).unwrap());
        assert_eq!(fail(&failures, ann).await, 100, "a success forgets");
        assert_eq!(fail(&failures, ann).await, 200);
        assert_eq!(fail(&failures, address("192.0.2.2")).await, 200, "but only those of its address");
        tokio::time::advance(Duration::from_millis(599_500)).await;
        assert_eq!(fail(&failures, ann).await, 400, "not yet");
        // Counted before its delay.
        tokio::time::advance(Duration::from_millis(599_600)).await;
        assert_eq!(fail(&failures, ann).await, 100);
        for _ in 0..100 {
            failures.count(ann);
        }
        assert_eq!(failures.count(ann), LONGEST_DELAY);
    }

    #[tokio::test(start_paused = true)]
    async fn a_network_of_ipv6_counts_as_one_and_so_does_a_mapped_address() {
        let failures = Failures::new();
        assert_eq!(fail(&failures, address("2001:db8::1")).await, 100);
        assert_eq!(fail(&failures, address("2001:db8::ffff:0:0:1")).await, 200);
        assert_eq!(fail(&failures, address("2001:db8:0:1::1")).await, 100);
        assert_eq!(fail(&failures, address("192.0.2.1")).await, 100);
        assert_eq!(fail(&failures, address("::ffff:192.0.2.1")).await, 200);
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_with_failures_has_four_attempts_at_once() {
        let (failures, ann) = (Failures::new(), address("192.0.2.1"));
        let before: Vec<_> = (0..100).map(|_| failures.begin(ann).unwrap()).collect();
        fail(&failures, ann).await;
        let mut held: Vec<_> = (0..4).map(|_| failures.begin(ann).unwrap()).collect();
        assert_eq!(failures.begin(ann).err(), Some(TOO_MANY));
        assert!(failures.begin(address("192.0.2.2")).is_ok() && failures.begin(None).is_ok());
        held.pop();
        let waits = failures.failed(failures.begin(ann).unwrap());
        tokio::pin!(waits);
        assert!(is_pending(waits.as_mut()).await);
        assert!(failures.begin(ann).is_err(), "one whose refusal waits is under way");
        waits.await;
        held.push(failures.begin(ann).unwrap());
        drop(before);
        assert!(failures.begin(ann).is_err());
        tokio::time::advance(Duration::from_secs(600)).await;
        assert!(failures.begin(ann).is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn few_refusals_wait_at_once() {
        let failures = Arc::new(Failures::new());
        let last = failures.begin(address("198.51.100.1")).unwrap();
        let waiting: Vec<_> = (0..256_u32)
            .map(|number| {
                let failures = failures.clone();
                let client = Some(IpAddr::from(number.to_be_bytes()));
                tokio::spawn(async move { failures.failed(failures.begin(client).unwrap()).await })
            })
            .collect();
        until(|| failures.waiting.available_permits() == 0).await;
        assert_eq!(failures.begin(address("198.51.100.2")).err(), Some(TOO_MANY));
        let begun = Instant::now();
        assert_eq!(failures.failed(last).await, TOO_MANY, "one that began before is not delayed");
        assert_eq!(begun.elapsed(), Duration::ZERO);
        for waiting in waiting {
            assert_eq!(waiting.await.unwrap(), Refused::Wrong);
        }
        assert!(failures.begin(address("198.51.100.2")).is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn the_address_that_was_seen_least_recently_leaves() {
        let failures = Failures::with_capacity(10);
        let ann = address("192.0.2.1");
        failures.count(ann);
        failures.count(address("192.0.2.2"));
        for number in 0..100_u8 {
            failures.count(Some(IpAddr::from([10, 0, 0, number])));
            assert!(failures.begin(ann).is_ok());
            failures.addresses.run_pending_tasks();
        }
        assert!(failures.addresses.entry_count() <= 10);
        assert_eq!(failures.count(ann), 2 * FIRST_DELAY);
        assert_eq!(failures.count(address("192.0.2.2")), FIRST_DELAY);
        // A newcomer has a count, although all others were seen more often.
        for number in 0..100_u8 {
            failures.count(Some(IpAddr::from([10, 0, 1, number % 10])));
            failures.addresses.run_pending_tasks();
        }
        assert_eq!(failures.count(ann), FIRST_DELAY);
        failures.addresses.run_pending_tasks();
        assert_eq!(failures.count(ann), 2 * FIRST_DELAY);
    }

    /// Whether a future has not ended after it was polled once.
    async fn is_pending<T>(mut future: std::pin::Pin<&mut impl Future<Output = T>>) -> bool {
        std::future::poll_fn(|context| std::task::Poll::Ready(future.as_mut().poll(context).is_pending())).await
    }
}

//! What wrong credentials cost: time of the guesser, and not of the server.
//!
//! Each failure in a row from an address delays its refusal twice as long as the one before. An attempt is counted until its refusal is given, so that few
//! can be under way at once.

use crate::{access::Refused, clients};
use moka::{policy::EvictionPolicy, sync::Cache};
use parking_lot::Mutex;
use std::{net::IpAddr, sync::Arc, time::Duration};
use tokio::{
    sync::Semaphore,
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
/// As many of an address without failures: a part of the passwords that may wait for a check, so that one address cannot take all of it.
const MOST_FIRST_ATTEMPTS: usize = 32;

/// After this time some of what fills a limit here has ended.
const TOO_MANY: Refused = Refused::TooMany { retry_after: LONGEST_DELAY };

/// Counts failures by address. Clients without an address, such as those of a UNIX socket, count as one.
pub(crate) struct Failures {
    addresses: Cache<Option<IpAddr>, Arc<Mutex<Address>>>,
    waiting: Semaphore,
}

#[derive(Default)]
struct Address {
    /// Failures in a row, and when the last one was.
    failures: u32,
    last: Option<Instant>,
    /// Attempts that are under way.
    attempts: usize,
}

/// An attempt that is under way. Counts as one until it is dropped.
pub(crate) struct Attempt(Arc<Mutex<Address>>);

impl Drop for Attempt {
    fn drop(&mut self) {
        self.0.lock().attempts -= 1;
    }
}

impl Address {
    fn has_failed(&self) -> bool {
        self.last.is_some_and(|last| last.elapsed() < FORGOTTEN_AFTER)
    }

    /// Counts a failure; returns how long its refusal is delayed.
    fn count(&mut self) -> Duration {
        let before = if self.has_failed() { self.failures } else { 0 };
        self.failures = before.saturating_add(1);
        self.last = Some(Instant::now());
        FIRST_DELAY.saturating_mul(2_u32.saturating_pow(before)).min(LONGEST_DELAY)
    }
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
        let address = self.addresses.get_with(address.map(clients::client), Arc::default);
        let mut state = address.lock();
        let (most, can_be_delayed) = if state.has_failed() {
            (MOST_ATTEMPTS, self.waiting.available_permits() > 0)
        } else {
            // It is let in even if its refusal could not be delayed: many guessing addresses lock out nobody else.
            (MOST_FIRST_ATTEMPTS, true)
        };
        if state.attempts >= most || !can_be_delayed {
            return Err(TOO_MANY);
        }
        state.attempts += 1;
        drop(state);
        Ok(Attempt(address))
    }

    /// The attempt has ended, and the credentials were right.
    pub(crate) fn succeeded(attempt: &Attempt) {
        attempt.0.lock().last = None;
    }

    /// The credentials of this attempt were wrong. Returns when the client may be told; until then the attempt is under way.
    pub(crate) async fn failed(&self, attempt: Attempt) -> Refused {
        let delay = attempt.0.lock().count();
        let Ok(_waiting) = self.waiting.try_acquire() else { return TOO_MANY };
        sleep(delay).await;
        Refused::Wrong
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::tests::until;

    fn address(text: &str) -> Option<IpAddr> {
        Some(text.parse().unwrap())
    }

    /// Counts a failure of this address.
    fn count(failures: &Failures, client: Option<IpAddr>) -> Duration {
        failures.addresses.get_with(client, Arc::default).lock().count()
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
        Failures::succeeded(&failures.begin(ann).unwrap());
        assert_eq!(fail(&failures, ann).await, 100, "a success forgets");
        assert_eq!(fail(&failures, ann).await, 200);
        assert_eq!(fail(&failures, address("192.0.2.2")).await, 200, "but only those of its address");
        tokio::time::advance(Duration::from_millis(599_500)).await;
        assert_eq!(fail(&failures, ann).await, 400, "not yet");
        // Counted before its delay.
        tokio::time::advance(Duration::from_millis(599_600)).await;
        assert_eq!(fail(&failures, ann).await, 100);
        for _ in 0..100 {
            count(&failures, ann);
        }
        assert_eq!(count(&failures, ann), LONGEST_DELAY);
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
        let mut before: Vec<_> = (0..32).map(|_| failures.begin(ann).unwrap()).collect();
        assert_eq!(failures.begin(ann).err(), Some(TOO_MANY), "nor does one without failures have more than 32");
        before.truncate(4);
        count(&failures, ann);
        assert_eq!(failures.begin(ann).err(), Some(TOO_MANY), "those that began before count");
        drop(before);
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
        assert_eq!(failures.begin(Some(IpAddr::from(7_u32.to_be_bytes()))).err(), Some(TOO_MANY), "its refusal could not be delayed");
        assert!(failures.begin(address("198.51.100.2")).is_ok(), "who has not failed has nothing to do with it");
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
        count(&failures, ann);
        count(&failures, address("192.0.2.2"));
        for number in 0..100_u8 {
            count(&failures, Some(IpAddr::from([10, 0, 0, number])));
            assert!(failures.begin(ann).is_ok());
            failures.addresses.run_pending_tasks();
        }
        assert!(failures.addresses.entry_count() <= 10);
        assert_eq!(count(&failures, ann), 2 * FIRST_DELAY);
        assert_eq!(count(&failures, address("192.0.2.2")), FIRST_DELAY);
        // A newcomer has a count, although all others were seen more often.
        for number in 0..100_u8 {
            count(&failures, Some(IpAddr::from([10, 0, 1, number % 10])));
            failures.addresses.run_pending_tasks();
        }
        assert_eq!(count(&failures, ann), FIRST_DELAY);
        failures.addresses.run_pending_tasks();
        assert_eq!(count(&failures, ann), 2 * FIRST_DELAY);
    }

    /// Whether a future has not ended after it was polled once.
    async fn is_pending<T>(mut future: std::pin::Pin<&mut impl Future<Output = T>>) -> bool {
        std::future::poll_fn(|context| std::task::Poll::Ready(future.as_mut().poll(context).is_pending())).await
    }
}

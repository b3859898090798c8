//! How many requests may be at a store at once: more while it answers, fewer when it says that it is too much.
//!
//! Additive increase, multiplicative decrease, as TCP does it (Chiu and Jain, 1989): each success adds the inverse of the limit, so that a whole
//! window of them adds one; a throttled request takes three tenths away, at most once for the requests that were under way together.

use crate::metrics::Metrics;
use parking_lot::Mutex;
use std::{sync::Arc, time::Instant};
use tokio::sync::Notify;

/// As few requests may always be at the store.
const LEAST: f64 = 4.0;
/// What is left of the limit when the store says that it is too much.
const DECREASE: f64 = 0.7;

#[derive(Debug)]
pub(crate) struct Limiter {
    state: Mutex<State>,
    freed: Notify,
    most: f64,
    metrics: Arc<Metrics>,
}

#[derive(Debug)]
struct State {
    limit: f64,
    in_flight: u32,
    /// When the limit was last decreased.
    decreased: Option<Instant>,
}

/// One request at the store.
#[derive(Debug)]
pub(crate) struct Permit {
    limiter: Arc<Limiter>,
    begun: Instant,
}

impl Limiter {
    pub(crate) fn new(most: usize, metrics: Arc<Metrics>) -> Self {
        let most = u32::try_from(most).unwrap_or(u32::MAX).into();
        metrics.set_limit(most);
        Self { state: Mutex::new(State { limit: most, in_flight: 0, decreased: None }), freed: Notify::new(), most, metrics }
    }

    /// Waits for a permit; `None` if none is free until the deadline.
    pub(crate) async fn permit(self: &Arc<Self>, deadline: Instant) -> Option<Permit> {
        let taken = async {
            loop {
                let freed = self.freed.notified();
                if self.take() {
                    // More than one may be free.
                    self.freed.notify_one();
                    return Permit { limiter: self.clone(), begun: Instant::now() };
                }
                freed.await;
            }
        };
        tokio::time::timeout_at(deadline.into(), taken).await.ok()
    }

    fn take(&self) -> bool {
        let mut state = self.state.lock();
        let is_free = f64::from(state.in_flight) < state.limit.floor();
        state.in_flight += u32::from(is_free);
        is_free
    }
}

impl Permit {
    pub(crate) fn succeeded(&self) {
        let mut state = self.limiter.state.lock();
        state.limit = (state.limit + state.limit.recip()).min(self.limiter.most);
        self.limiter.metrics.set_limit(state.limit);
    }

    pub(crate) fn throttled(&self) {
        let mut state = self.limiter.state.lock();
        if state.decreased.is_none_or(|at| at < self.begun) {
            state.limit = (state.limit.min(f64::from(state.in_flight)) * DECREASE).max(LEAST);
            state.decreased = Some(Instant::now());
            self.limiter.metrics.set_limit(state.limit);
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.limiter.state.lock().in_flight -= 1;
        self.limiter.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn limiter(most: usize) -> Arc<Limiter> {
        Arc::new(Limiter::new(most, Arc::new(Metrics::new(&prometheus::Registry::new()).unwrap())))
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    #[tokio::test]
    async fn it_follows_the_store() {
        let limiter = limiter(10);
        let mut permits = Vec::new();
        for _ in 0..10 {
            permits.push(limiter.permit(soon()).await.unwrap());
        }
        assert!(limiter.permit(Instant::now()).await.is_none(), "the eleventh waits");
        // All of them are told at once: that counts once.
        for permit in &permits {
            permit.throttled();
        }
        assert_eq!(limiter.state.lock().limit, 7.0);
        permits.truncate(7);
        assert!(limiter.permit(Instant::now()).await.is_none());
        for _ in 0..1000 {
            permits[0].succeeded();
        }
        assert_eq!(limiter.state.lock().limit, 10.0);
        permits.clear();
        for _ in 0..20 {
            limiter.permit(soon()).await.unwrap().throttled();
        }
        assert_eq!(limiter.state.lock().limit, LEAST);
        assert!(limiter.permit(soon()).await.is_some(), "some are always possible");
    }

    #[tokio::test]
    async fn those_who_wait_get_a_place_each() {
        let limiter = limiter(2);
        let held = [limiter.permit(soon()).await.unwrap(), limiter.permit(soon()).await.unwrap()];
        let waiting: Vec<_> = (0..50)
            .map(|_| {
                let limiter = limiter.clone();
                tokio::spawn(async move { limiter.permit(soon()).await.is_some() })
            })
            .collect();
        tokio::task::yield_now().await;
        drop(held);
        for waiting in waiting {
            assert!(waiting.await.unwrap());
        }
        assert_eq!(limiter.state.lock().in_flight, 0);
    }
}

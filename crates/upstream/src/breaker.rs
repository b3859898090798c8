//! A circuit breaker: while a server does not answer, requests to it fail at once, and do not wait and load it (M. Nygard, *Release It!*, "Circuit
//! Breaker").
//!
//! - *Closed*: requests pass. After so many failures in a row it opens.
//! - *Open*: nothing passes for a pause, which doubles each time up to `origin.breaker_pause`. Failures that come at once, such as a refused connection,
//!   cost nobody anything: after them the pause stays short.
//! - *Half-open*: after the pause one request passes. If it is answered, the breaker closes; if it fails, the next pause begins.
//!
//! A request that comes shortly before the end of a pause, or of the request that tries, waits for it. So one client alone never meets an open breaker
//! whose server answers again.
//!
//! Only what began after the breaker opened can lengthen the pause: earlier requests that fail late tell nothing new. An answer closes it in any case.

use castier_cache::Fault;
use http::StatusCode;
use parking_lot::Mutex;
use prometheus::{IntCounter, IntGauge};
use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{sync::Notify, time::timeout_at};

/// The first pause after a failure that took longer than [`AT_ONCE`].
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// A failure that comes as fast as this costs nobody anything. The pause after it.
const AT_ONCE: Duration = Duration::from_millis(100);
/// The longest wait of a request for the end of a pause.
const LONGEST_WAIT: Duration = Duration::from_millis(150);

/// The state of a breaker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BreakerState {
    /// Requests pass.
    #[default]
    Closed,
    /// Nothing passes.
    Open,
    /// One request is on its way, to see whether the server answers.
    HalfOpen,
}

impl BreakerState {
    /// In words.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Open => "open",
            Self::HalfOpen => "half-open",
        }
    }
}

/// The series of the breakers of one kind of server.
#[derive(Clone)]
pub(crate) struct BreakerMetrics {
    pub(crate) open: IntGauge,
    pub(crate) half_open: IntGauge,
    pub(crate) refusals: IntCounter,
}

/// The breaker of one server.
pub(crate) struct Breaker {
    /// `origin` or `upstream`.
    source_name: &'static str,
    /// How many failures in a row open it.
    failures: u32,
    /// The longest pause.
    most: Duration,
    known: Mutex<Known>,
    /// A request that tried has ended.
    tried: Notify,
    metrics: BreakerMetrics,
}

/// A request that has passed.
pub struct Admission(Option<(Arc<Breaker>, Instant)>);

impl Admission {
    /// Where there is no breaker.
    pub(crate) const FREE: Self = Self(None);
}

impl Drop for Admission {
    fn drop(&mut self) {
        if let Some((breaker, began)) = self.0.take() {
            breaker.give_up(began);
        }
    }
}

#[derive(Default)]
struct Known {
    /// Failures in a row.
    failures: u32,
    /// When it was answered last.
    answered: Option<Instant>,
    /// `None`: closed.
    open: Option<Open>,
}

struct Open {
    /// When it opened.
    first: Instant,
    /// When the last pause began.
    since: Instant,
    pause: Duration,
    until: Instant,
    /// When the request began that tries.
    trying: Option<Instant>,
}

impl Open {
    fn new(now: Instant, pause: Duration) -> Self {
        Self { first: now, since: now, pause, until: now + pause, trying: None }
    }
}

impl Breaker {
    /// `None` if it would never open.
    pub(crate) fn new(source_name: &'static str, failures: u32, most: Duration, metrics: BreakerMetrics) -> Option<Arc<Self>> {
        (failures > 0).then(|| Arc::new(Self { source_name, failures, most, known: Mutex::default(), tried: Notify::new(), metrics }))
    }

    /// Lets a request pass, which lasts as long as what is returned. If that is dropped before [`Self::record`], the request told nothing, and the next
    /// one may try.
    ///
    /// # Errors
    /// [`Fault::NotAsked`] while the breaker is open.
    pub(crate) async fn admit(self: &Arc<Self>) -> Result<Admission, Fault> {
        let deadline = Instant::now() + LONGEST_WAIT;
        loop {
            let tried = self.tried.notified();
            tokio::pin!(tried);
            // Before the look: what is told after it is not missed.
            tried.as_mut().enable();
            let now = Instant::now();
            let next = match self.admit_at(now) {
                Ok(tries) => return Ok(Admission(tries.then(|| (self.clone(), now)))),
                Err(next) => next,
            };
            if Instant::now() >= deadline || next.is_some_and(|next| next > deadline) {
                self.metrics.refusals.inc();
                return Err(Fault::NotAsked { source_name: self.source_name });
            }
            let _ = timeout_at(next.unwrap_or(deadline).into(), tried).await;
        }
    }

    /// Whether the request is the one that tries. Or when one may try; `None` if one does.
    fn admit_at(&self, now: Instant) -> Result<bool, Option<Instant>> {
        let mut known = self.known.lock();
        let Some(open) = &mut known.open else { return Ok(false) };
        if now < open.until {
            return Err(Some(open.until));
        }
        // A request that takes long must not keep all others out.
        if open.trying.is_some_and(|since| now < since + open.pause.max(FIRST_PAUSE)) {
            return Err(None);
        }
        if open.trying.replace(now).is_none() {
            self.metrics.open.dec();
            self.metrics.half_open.inc();
        }
        Ok(true)
    }

    /// The request that tried since `began` was given up, by its client for example.
    fn give_up(&self, began: Instant) {
        let mut known = self.known.lock();
        if let Some(open) = known.open.as_mut().filter(|open| open.trying == Some(began)) {
            open.trying = None;
            self.metrics.half_open.dec();
            self.metrics.open.inc();
            self.tried.notify_waiters();
        }
    }

    /// How a request ended that began at `asked`. `server` is its name in the log.
    pub(crate) fn record(&self, server: &str, asked: Instant, answer: Result<StatusCode, &Fault>) {
        let why: &dyn fmt::Display = match &answer {
            // Of a gateway. One that comes at once costs nobody anything, and may be about one path only.
            Ok(status) if matches!(*status, StatusCode::BAD_GATEWAY | StatusCode::GATEWAY_TIMEOUT) => {
                if asked.elapsed() < AT_ONCE {
                    return;
                }
                status
            }
            Err(fault @ (Fault::Unreachable { .. } | Fault::Silent { .. })) => fault,
            Ok(_) | Err(Fault::Unusable { .. } | Fault::Denied { .. } | Fault::Corrupt { .. }) => return self.answered(server),
            // The server was not asked.
            Err(_) => return,
        };
        self.failed(server, asked, Instant::now(), why);
    }

    fn answered(&self, server: &str) {
        let mut known = self.known.lock();
        (known.failures, known.answered) = (0, Some(Instant::now()));
        if let Some(open) = known.open.take() {
            if open.trying.is_some() { &self.metrics.half_open } else { &self.metrics.open }.dec();
            self.tried.notify_waiters();
            tracing::info!(server, seconds = open.first.elapsed().as_secs_f64(), "the circuit breaker is closed: the server answers");
        }
    }

    fn failed(&self, server: &str, asked: Instant, now: Instant, why: &dyn fmt::Display) {
        let mut known = self.known.lock();
        let is_late = known.answered.is_some_and(|answered| answered >= asked);
        match &mut known.open {
            Some(open) if asked < open.since => {}
            Some(open) => {
                if open.trying.is_some() {
                    self.metrics.half_open.dec();
                    self.metrics.open.inc();
                }
                *open = Open { first: open.first, ..Open::new(now, self.pause(now.saturating_duration_since(asked), open.pause * 2)) };
                self.tried.notify_waiters();
            }
            None if is_late => {}
            None => {
                known.failures += 1;
                if known.failures >= self.failures {
                    known.open = Some(Open::new(now, self.pause(now.saturating_duration_since(asked), FIRST_PAUSE)));
                    self.metrics.open.inc();
                    let failures = known.failures;
                    tracing::warn!(server, failures, %why, "the circuit breaker is open: requests to the server fail at once until it answers");
                }
            }
        }
    }

    /// The pause after a failure that took so long.
    fn pause(&self, took: Duration, next: Duration) -> Duration {
        if took < AT_ONCE { AT_ONCE } else { next.max(FIRST_PAUSE) }.min(self.most)
    }

    pub(crate) fn state(&self) -> BreakerState {
        match &self.known.lock().open {
            None => BreakerState::Closed,
            Some(open) if open.trying.is_none() => BreakerState::Open,
            Some(_) => BreakerState::HalfOpen,
        }
    }
}

impl Drop for Breaker {
    fn drop(&mut self) {
        match self.state() {
            BreakerState::Closed => {}
            BreakerState::Open => self.metrics.open.dec(),
            BreakerState::HalfOpen => self.metrics.half_open.dec(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn breaker(failures: u32) -> Arc<Breaker> {
        let counter = IntCounter::new("c", "c").unwrap();
        let gauge = |name| IntGauge::new(name, "g").unwrap();
        let metrics = BreakerMetrics { open: gauge("a"), half_open: gauge("b"), refusals: counter };
        Breaker::new("origin", failures, Duration::from_secs(5), metrics).unwrap()
    }

    fn figures(breaker: &Breaker) -> (BreakerState, i64, i64, u64) {
        let metrics = &breaker.metrics;
        (breaker.state(), metrics.open.get(), metrics.half_open.get(), metrics.refusals.get())
    }

    #[test]
    fn it_opens_lets_one_try_and_closes() {
        let breaker = breaker(3);
        let silent = Fault::Silent { source_name: "origin", why: String::new() };
        let start = Instant::now();
        let ms = |ms| start + Duration::from_millis(ms);
        for _ in 0..2 {
            breaker.failed("o", start, ms(1000), &silent);
        }
        assert!(breaker.admit_at(ms(1000)).is_ok());
        breaker.failed("o", start, ms(1000), &silent);
        assert_eq!(figures(&breaker), (BreakerState::Open, 1, 0, 0));
        assert_eq!(breaker.admit_at(ms(1499)), Err(Some(ms(1500))));
        // One tries, and the others wait for what it finds.
        assert_eq!((breaker.admit_at(ms(1500)), breaker.admit_at(ms(1501))), (Ok(true), Err(None)));
        assert_eq!(figures(&breaker), (BreakerState::HalfOpen, 0, 1, 0));
        // What began before tells nothing new.
        breaker.failed("o", ms(999), ms(1502), &silent);
        assert_eq!(breaker.state(), BreakerState::HalfOpen);
        breaker.failed("o", ms(1500), ms(2000), &silent);
        assert_eq!(figures(&breaker), (BreakerState::Open, 1, 0, 0));
        assert_eq!((breaker.admit_at(ms(2999)), breaker.admit_at(ms(3000))), (Err(Some(ms(3000))), Ok(true)), "the pause has doubled");
        // It takes long: another one may try after as long again.
        assert_eq!((breaker.admit_at(ms(3999)), breaker.admit_at(ms(4000))), (Err(None), Ok(true)));
        // Its client left: another one may try at once.
        breaker.give_up(ms(3000));
        assert_eq!(breaker.state(), BreakerState::HalfOpen, "not the one that tries");
        breaker.give_up(ms(4000));
        assert_eq!((figures(&breaker), breaker.admit_at(ms(4001))), ((BreakerState::Open, 1, 0, 0), Ok(true)));
        breaker.record("o", ms(4000), Ok(StatusCode::NOT_FOUND));
        assert_eq!(figures(&breaker), (BreakerState::Closed, 0, 0, 0));
        assert!(breaker.admit_at(ms(4001)).is_ok());
    }

    #[test]
    fn pauses_have_a_limit_and_are_short_after_what_fails_at_once() {
        let breaker = breaker(1);
        let mut now = Instant::now();
        let mut pauses = Vec::new();
        for took in [1000, 1000, 1000, 1000, 1000, 1000, 1, 1, 1000] {
            let asked = now;
            now += Duration::from_millis(took);
            breaker.failed("o", asked, now, &"down");
            pauses.push(breaker.known.lock().open.as_ref().unwrap().pause.as_millis());
            now += Duration::from_secs(60);
        }
        assert_eq!(pauses, [500, 1000, 2000, 4000, 5000, 5000, 100, 100, 500]);
    }

    #[tokio::test]
    async fn one_client_alone_waits_for_the_end_of_a_short_pause() {
        let breaker = breaker(2);
        let unreachable = Fault::Unreachable { source_name: "origin", why: String::new() };
        for _ in 0..5 {
            let admission = breaker.admit().await;
            assert!(admission.is_ok());
            breaker.record("o", Instant::now(), Err(&unreachable));
        }
        assert_eq!(breaker.state(), BreakerState::Open);
        let tries = breaker.admit().await;
        assert!(tries.is_ok());
        // Others wait for what it finds.
        let (other, ()) = tokio::join!(breaker.admit(), async {
            tokio::task::yield_now().await;
            breaker.record("o", Instant::now(), Ok(StatusCode::OK));
        });
        assert!(other.is_ok());
        assert_eq!(figures(&breaker), (BreakerState::Closed, 0, 0, 0));
        // A pause that is long is not waited for.
        for _ in 0..2 {
            breaker.failed("o", Instant::now(), Instant::now() + Duration::from_secs(1), &unreachable);
        }
        assert!(matches!(breaker.admit().await, Err(Fault::NotAsked { source_name: "origin" })));
        assert_eq!(breaker.metrics.refusals.get(), 1);
    }

    #[test]
    fn only_what_shows_that_the_server_does_not_answer_counts() {
        let breaker = breaker(2);
        let now = Instant::now;
        let unreachable = Fault::Unreachable { source_name: "origin", why: String::new() };
        for _ in 0..5 {
            breaker.record("o", now(), Err(&unreachable));
            breaker.record("o", now(), Ok(StatusCode::INTERNAL_SERVER_ERROR));
            breaker.record("o", now(), Ok(StatusCode::SERVICE_UNAVAILABLE));
            breaker.record("o", now(), Err(&Fault::Abandoned));
        }
        let before = Instant::now();
        breaker.record("o", now(), Ok(StatusCode::OK));
        breaker.record("o", before, Err(&unreachable));
        breaker.record("o", now(), Err(&unreachable));
        assert_eq!(breaker.state(), BreakerState::Closed, "another request was answered meanwhile");
        breaker.record("o", now(), Ok(StatusCode::BAD_GATEWAY));
        assert_eq!(breaker.state(), BreakerState::Closed, "it came at once");
        let asked = now();
        std::thread::sleep(AT_ONCE);
        breaker.record("o", asked, Ok(StatusCode::BAD_GATEWAY));
        assert_eq!(breaker.state(), BreakerState::Open);
    }
}

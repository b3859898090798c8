//! Health checks: whether a peer is up.
//!
//! - Two failures in a row take a peer down. A connection that cannot be opened takes it down at once.
//! - One answered probe brings it up.
//! - A request that breaks off makes the peer *suspect*, and triggers a probe at once. Any number of such requests count as one failure:
//!   if a hundred requests wait for a slow origin behind a healthy peer, that must not take the peer down.

use super::Member;
use async_trait::async_trait;
use backon::{BackoffBuilder, ExponentialBuilder};
use std::{sync::Arc, time::Duration};
use tokio::{sync::Notify, time::Instant};

/// Sends health checks.
#[async_trait]
pub trait Probe: Send + Sync + 'static {
    /// Asks the member once. Returns the value of its header [`super::NODE`]. The caller drops the future on a timeout.
    ///
    /// # Errors
    /// A text that says why there was no valid answer.
    async fn probe(&self, member: &Member) -> Result<Option<String>, String>;
}

/// The outcome of a request to a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Report {
    /// The answer was complete.
    Answered,
    /// The answer broke off, stalled, did not come, or was not HTTP.
    Broken,
    /// No connection could be opened.
    Unreachable,
}

/// An observation of a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Evidence {
    ProbeAnswered,
    ProbeFailed,
    Reported(Report),
}

impl From<Report> for Evidence {
    fn from(report: Report) -> Self {
        Self::Reported(report)
    }
}

/// Failures in a row that take a peer down.
const FAILURES: u32 = 2;

/// The health of a peer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct PeerHealth {
    /// Failures in a row. The peer is up if they are fewer than [`FAILURES`].
    failures: u32,
}

impl PeerHealth {
    pub(super) const fn is_up(self) -> bool {
        self.failures < FAILURES
    }

    /// Up, but the last observation was a failure.
    pub(super) const fn is_suspect(self) -> bool {
        self.failures > 0 && self.is_up()
    }

    pub(super) fn learn(&mut self, evidence: Evidence) {
        self.failures = match evidence {
            Evidence::ProbeAnswered => 0,
            Evidence::ProbeFailed => FAILURES.min(self.failures + 1),
            Evidence::Reported(Report::Unreachable) => FAILURES,
            Evidence::Reported(Report::Broken) => self.failures.max(1),
            // A long answer may end well on an old connection while no new one can be opened. So it does not bring a peer up.
            Evidence::Reported(Report::Answered) if self.is_up() => 0,
            Evidence::Reported(Report::Answered) => self.failures,
        };
    }
}

/// When to probe.
#[derive(Clone, Copy, Debug)]
pub(super) struct ProbeTiming {
    /// The pause between two probes.
    pub(super) interval: Duration,
    /// The time that an answer may take.
    pub(super) timeout: Duration,
}

impl ProbeTiming {
    /// The pauses while a peer is down. They grow up to two intervals, and are random, so that not all nodes probe a restarted peer at the
    /// same moment.
    fn while_down(self) -> impl Iterator<Item = Duration> {
        ExponentialBuilder::new()
            .with_min_delay(self.interval / 2)
            .with_max_delay(self.interval * 2)
            .with_factor(1.5)
            .without_max_times()
            .with_jitter()
            .build()
    }
}

/// Probes a peer again and again. Calls `learn` with the result and the duration of each probe. `learn` returns whether the peer is up, or
/// `None` to end the probes. `probe_now` triggers a probe at once.
pub(super) async fn keep_probing(
    member: Member,
    probe: Arc<dyn Probe>,
    timing: ProbeTiming,
    probe_now: Arc<Notify>,
    learn: impl Fn(Result<Option<String>, String>, Duration) -> Option<bool>,
) {
    let mut pauses = timing.while_down();
    // The least pause between two probes, even if `probe_now` triggers many.
    let min_pause = (timing.interval / 10).min(Duration::from_millis(100));
    loop {
        let asked = Instant::now();
        let answer = tokio::time::timeout(timing.timeout, probe.probe(&member)).await;
        let answer = answer.unwrap_or_else(|_| Err(format!("no answer within {:?}", timing.timeout)));
        let failed = answer.is_err();
        let Some(up) = learn(answer, asked.elapsed()) else { return };
        let pause = if up {
            pauses = timing.while_down();
            // After a first failure probe again at once, so that a dead peer is down within one interval and two timeouts.
            if failed { min_pause } else { timing.interval }
        } else {
            pauses.next().unwrap_or(timing.interval)
        };
        tokio::time::sleep(min_pause).await;
        tokio::select! {
            () = tokio::time::sleep(pause.saturating_sub(min_pause)) => {}
            () = probe_now.notified() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Evidence::*, Report::*, *};

    #[test]
    fn a_peer_goes_down_after_two_failures_and_comes_up_after_one_answer() {
        let table: &[(&[Evidence], bool)] = &[
            (&[], true),
            (&[ProbeFailed], true),
            (&[ProbeFailed, ProbeFailed], false),
            (&[ProbeFailed, ProbeAnswered, ProbeFailed], true),
            (&[ProbeFailed, Reported(Answered), ProbeFailed], true),
            (&[ProbeFailed, ProbeFailed, ProbeFailed, ProbeAnswered], true),
            (&[ProbeFailed, ProbeFailed, ProbeAnswered, ProbeFailed], true),
            (&[Reported(Unreachable)], false),
            (&[Reported(Unreachable), ProbeAnswered], true),
            (&[Reported(Unreachable), Reported(Answered)], false),
            (&[Reported(Unreachable), Reported(Broken)], false),
            (&[Reported(Broken), Reported(Broken), Reported(Broken)], true),
            (&[Reported(Broken), ProbeFailed], false),
            (&[ProbeFailed, Reported(Broken)], true),
            (&[Reported(Broken), ProbeAnswered, ProbeFailed], true),
            (&[Reported(Broken), Reported(Answered), ProbeFailed], true),
        ];
        for (evidence, up) in table {
            let mut health = PeerHealth::default();
            for piece in *evidence {
                health.learn(*piece);
            }
            assert_eq!(health.is_up(), *up, "{evidence:?}");
        }
        let suspect = |evidence| {
            let mut health = PeerHealth::default();
            health.learn(evidence);
            health.is_suspect()
        };
        assert!(suspect(Reported(Broken)) && suspect(ProbeFailed) && !suspect(Reported(Unreachable)) && !suspect(ProbeAnswered));
    }

    #[test]
    fn pauses_grow_to_a_bound_and_differ() {
        let timing = ProbeTiming { interval: Duration::from_secs(1), timeout: Duration::from_secs(1) };
        let pauses: Vec<_> = timing.while_down().take(100).collect();
        assert_eq!(pauses.len(), 100, "it never gives up");
        assert!(pauses.iter().all(|pause| (Duration::from_millis(500)..=Duration::from_secs(4)).contains(pause)), "{pauses:?}");
        assert!(pauses[10..].iter().all(|pause| *pause >= Duration::from_secs(2)), "{pauses:?}");
        assert_ne!(pauses, timing.while_down().take(100).collect::<Vec<_>>());
    }
}

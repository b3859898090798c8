//! Whether a peer is up: what counts as evidence, and how it is gathered.
//!
//! A peer goes down after two failures in a row, or at once when a connection to it cannot be opened; one answered probe brings it
//! back. What breaks in the middle of an answer casts a doubt, which counts as one failure however many requests meet with it, and is
//! settled by a probe right away: a hundred requests that wait for a slow origin behind a sound peer must not take that peer down.

use super::Member;
use async_trait::async_trait;
use backon::{BackoffBuilder, ExponentialBuilder};
use std::{sync::Arc, time::Duration};
use tokio::{sync::Notify, time::Instant};

/// Asks a peer whether it lives.
#[async_trait]
pub trait Probe: Send + Sync + 'static {
    /// What the peer says of itself in the header [`super::NODE`], or why it could not be asked. Given up from outside when it takes
    /// too long.
    async fn probe(&self, member: &Member) -> Result<Option<String>, String>;
}

/// What a request met with at a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Report {
    /// An answer that came to its proper end.
    Answered,
    /// An answer, or the wait for one, that broke off, fell silent, or was no HTTP.
    Broken,
    /// No connection.
    Unreachable,
}

/// Anything that tells how a peer is.
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

/// What is known of a peer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Health {
    /// In a row. The peer is up while there are fewer than [`FAILURES`].
    failures: u32,
}

impl Health {
    pub(super) const fn is_up(self) -> bool {
        self.failures < FAILURES
    }

    /// Up, and not above suspicion.
    pub(super) const fn is_doubtful(self) -> bool {
        self.failures > 0 && self.is_up()
    }

    pub(super) fn learn(&mut self, evidence: Evidence) {
        self.failures = match evidence {
            Evidence::ProbeAnswered => 0,
            Evidence::ProbeFailed => FAILURES.min(self.failures + 1),
            Evidence::Reported(Report::Unreachable) => FAILURES,
            Evidence::Reported(Report::Broken) => self.failures.max(1),
            // A long answer may end well on a connection of old while no new one can be opened: that does not bring a peer back.
            Evidence::Reported(Report::Answered) if self.is_up() => 0,
            Evidence::Reported(Report::Answered) => self.failures,
        };
    }
}

/// When peers are probed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    /// From one probe to the next.
    pub(super) interval: Duration,
    /// How long an answer may take.
    pub(super) timeout: Duration,
}

impl Pace {
    /// The pauses while a peer is down: growing, since it may be gone for long, up to a few intervals, since it is missed; and random,
    /// so that a node that comes back is not met by all others at once.
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

/// Probes a peer until `learn`, which is told of every probe's end and how long it took, and says whether the peer is up, wants no more. A doubt calls for a
/// probe at once.
pub(super) async fn keep_probing(
    member: Member,
    probe: Arc<dyn Probe>,
    pace: Pace,
    doubt: Arc<Notify>,
    learn: impl Fn(Result<Option<String>, String>, Duration) -> Option<bool>,
) {
    let mut pauses = pace.while_down();
    // However many doubts there are, a peer has some peace between two probes.
    let peace = (pace.interval / 10).min(Duration::from_millis(100));
    loop {
        let asked = Instant::now();
        let answer = tokio::time::timeout(pace.timeout, probe.probe(&member)).await;
        let answer = answer.unwrap_or_else(|_| Err(format!("no answer within {:?}", pace.timeout)));
        let failed = answer.is_err();
        let Some(up) = learn(answer, asked.elapsed()) else { return };
        let pause = if up {
            pauses = pace.while_down();
            // The first failure is settled at once, so that a dead peer is known to be within an interval and two time-outs.
            if failed { peace } else { pace.interval }
        } else {
            pauses.next().unwrap_or(pace.interval)
        };
        tokio::time::sleep(peace).await;
        tokio::select! {
            () = tokio::time::sleep(pause.saturating_sub(peace)) => {}
            () = doubt.notified() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Evidence::*, Report::*, *};

    #[test]
    fn a_peer_falls_after_two_failures_and_rises_after_one_answer() {
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
            let mut health = Health::default();
            for piece in *evidence {
                health.learn(*piece);
            }
            assert_eq!(health.is_up(), *up, "{evidence:?}");
        }
        let doubtful = |evidence| {
            let mut health = Health::default();
            health.learn(evidence);
            health.is_doubtful()
        };
        assert!(doubtful(Reported(Broken)) && doubtful(ProbeFailed) && !doubtful(Reported(Unreachable)) && !doubtful(ProbeAnswered));
    }

    #[test]
    fn pauses_grow_to_a_bound_and_differ() {
        let pace = Pace { interval: Duration::from_secs(1), timeout: Duration::from_secs(1) };
        let pauses: Vec<_> = pace.while_down().take(100).collect();
        assert_eq!(pauses.len(), 100, "it never gives up");
        assert!(pauses.iter().all(|pause| (Duration::from_millis(500)..=Duration::from_secs(4)).contains(pause)), "{pauses:?}");
        assert!(pauses[10..].iter().all(|pause| *pause >= Duration::from_secs(2)), "{pauses:?}");
        assert_ne!(pauses, pace.while_down().take(100).collect::<Vec<_>>());
    }
}

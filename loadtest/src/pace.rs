//! When requests start: at once after the one before (closed loop), or on a schedule that the answers cannot delay (open loop).

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};
use tokio::sync::{Mutex, MutexGuard};
use tokio_util::sync::CancellationToken;

/// What ends a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Limit {
    /// So many turns in all.
    Turns(u64),
    /// So many turns of each client.
    TurnsOfEach(u64),
    /// Turns that start within this time.
    Time(Duration),
}

/// The schedule of a run, shared by all its threads.
pub(crate) struct Schedule {
    /// What ends it.
    pub(crate) limit: Limit,
    /// Turns per second; none in a closed loop.
    pub(crate) rate: Option<f64>,
    /// The next turn's number.
    next: AtomicU64,
}

/// The right to send one request (or one scripted sequence of them).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Turn {
    /// Its number: what it does depends on this and the seed alone.
    pub(crate) ticket: u64,
    /// When it should start. Latency is measured from here, however late the request gets a connection: otherwise a server
    /// that stalls would be asked less, and the stall would hardly show (coordinated omission).
    pub(crate) intended: Instant,
}

impl Schedule {
    /// A schedule with no turn taken yet.
    pub(crate) const fn new(limit: Limit, rate: Option<f64>) -> Self {
        Self { limit, rate, next: AtomicU64::new(0) }
    }

    /// Takes the next turn of a run that began at `start`; none when there is no more. `taken` is how many this client had.
    fn take(&self, start: Instant, now: Instant, taken: u64) -> Option<Turn> {
        if matches!(self.limit, Limit::TurnsOfEach(turns) if taken >= turns) {
            return None;
        }
        let ticket = self.next.fetch_add(1, Ordering::Relaxed);
        let intended = self.rate.map_or(now, |rate| start + offset(ticket, rate));
        let more = match self.limit {
            Limit::Turns(turns) => ticket < turns,
            Limit::TurnsOfEach(_) => true,
            Limit::Time(time) => intended.saturating_duration_since(start) < time,
        };
        more.then_some(Turn { ticket, intended })
    }

    /// The next turn of an open loop that was due before `end` and that nobody took: the clients were all busy.
    pub(crate) fn overdue(&self, start: Instant, end: Instant) -> Option<Turn> {
        self.rate?;
        self.take(start, end, 0).filter(|turn| turn.intended < end)
    }
}

/// How long after the start a turn is due.
fn offset(ticket: u64, rate: f64) -> Duration {
    Duration::from_secs_f64(ticket as f64 / rate)
}

/// Hands out the turns to the clients of one thread. In an open loop one client at a time waits for the next due time, and the
/// others queue behind it: one timer per thread, whatever the concurrency.
#[derive(Default)]
pub(crate) struct Pacer {
    waiting: Mutex<()>,
}

/// A turn that has not begun, so that there is time to make ready what it sends: that is not the target's time.
pub(crate) struct Slot<'a> {
    turn: Turn,
    /// In an open loop, so that there is one timer.
    first_in_line: Option<MutexGuard<'a, ()>>,
}

impl Pacer {
    /// Takes the next turn; none when the run is over.
    pub(crate) async fn slot(&self, schedule: &Schedule, start: Instant, taken: u64, stop: &CancellationToken) -> Option<Slot<'_>> {
        let first_in_line = if schedule.rate.is_some() { Some(self.waiting.lock().await) } else { None };
        if stop.is_cancelled() {
            return None;
        }
        let turn = schedule.take(start, Instant::now(), taken)?;
        Some(Slot { turn, first_in_line })
    }
}

impl Slot<'_> {
    /// The turn's number.
    pub(crate) const fn ticket(&self) -> u64 {
        self.turn.ticket
    }

    /// Begins the turn: now, or when it is due; none if the run is stopped before.
    pub(crate) async fn begin(self, stop: &CancellationToken) -> Option<Turn> {
        if self.first_in_line.is_none() {
            return Some(Turn { intended: Instant::now(), ..self.turn });
        }
        if Instant::now() < self.turn.intended {
            stop.run_until_cancelled(wait_until(self.turn.intended)).await?;
        }
        Some(self.turn)
    }
}

/// The runtime's timers tick in milliseconds and ring up to two of them late, which is an age at 10,000 requests per second. So
/// they bring us near, and the rest is spent in asking the clock; other clients run in between.
const COARSE: Duration = Duration::from_millis(2);

async fn wait_until(due: Instant) {
    if let Some(near) = due.checked_sub(COARSE)
        && Instant::now() < near
    {
        tokio::time::sleep_until(near.into()).await;
    }
    while Instant::now() < due {
        tokio::task::yield_now().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_open_loop_keeps_to_its_schedule_however_late_it_is() {
        let start = Instant::now();
        let schedule = Schedule::new(Limit::Turns(3), Some(4.0));
        let late = start + Duration::from_secs(60);
        let turns: Vec<_> = std::iter::from_fn(|| schedule.take(start, late, 0)).collect();
        let due: Vec<_> = turns.iter().map(|turn| turn.intended - start).collect();
        assert_eq!(due, [0, 250, 500].map(Duration::from_millis));
        assert_eq!(turns.iter().map(|turn| turn.ticket).collect::<Vec<_>>(), [0, 1, 2]);
    }

    #[test]
    fn an_open_loop_of_a_duration_has_rate_times_duration_turns() {
        let start = Instant::now();
        let schedule = Schedule::new(Limit::Time(Duration::from_secs(10)), Some(3.0));
        assert_eq!(std::iter::from_fn(|| schedule.take(start, start, 0)).count(), 30);
    }

    #[test]
    fn a_closed_loop_starts_now_and_ends_by_count_client_or_clock() {
        let start = Instant::now();
        let later = start + Duration::from_secs(5);
        let turns = Schedule::new(Limit::Turns(1), None);
        assert_eq!(turns.take(start, later, 0), Some(Turn { ticket: 0, intended: later }));
        assert_eq!(turns.take(start, later, 1), None);
        let each = Schedule::new(Limit::TurnsOfEach(2), None);
        assert!(each.take(start, later, 1).is_some());
        assert!(each.take(start, later, 2).is_none());
        assert!(each.take(start, later, 0).is_some());
        let time = Schedule::new(Limit::Time(Duration::from_secs(5)), None);
        assert!(time.take(start, later - Duration::from_nanos(1), 0).is_some());
        assert!(time.take(start, later, 0).is_none());
    }

    #[test]
    fn what_was_due_before_the_end_is_overdue() {
        let start = Instant::now();
        let end = start + Duration::from_secs(2);
        let schedule = Schedule::new(Limit::Time(Duration::from_secs(10)), Some(3.0));
        assert!(schedule.take(start, start, 0).is_some());
        assert_eq!(std::iter::from_fn(|| schedule.overdue(start, end)).count(), 5);
        assert_eq!(Schedule::new(Limit::Turns(10), None).overdue(start, end), None, "a closed loop waits for its clients");
    }

    #[tokio::test]
    async fn a_stop_is_not_waited_for_until_a_turn_is_due() {
        let (start, stop) = (Instant::now(), CancellationToken::new());
        let (schedule, pacer) = (Schedule::new(Limit::Turns(9), Some(0.001)), Pacer::default());
        assert!(pacer.slot(&schedule, start, 0, &stop).await.unwrap().begin(&stop).await.is_some(), "the first is due at once");
        let slot = pacer.slot(&schedule, start, 0, &stop).await.unwrap();
        stop.cancel();
        assert!(slot.begin(&stop).await.is_none() && pacer.slot(&schedule, start, 0, &stop).await.is_none());
    }

    #[tokio::test]
    async fn no_turn_starts_before_it_is_due() {
        for wait in [0, 100, 5000] {
            let due = Instant::now() + Duration::from_micros(wait);
            wait_until(due).await;
            assert!(Instant::now() >= due);
        }
    }
}

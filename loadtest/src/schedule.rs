//! The schedule of requests. In a closed loop, a client starts a request when its previous one has ended. In an open loop, requests start at
//! fixed times, which slow answers cannot delay.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};
use tokio::sync::{Mutex, MutexGuard};
use tokio_util::sync::CancellationToken;

/// The condition that ends a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum RunLimit {
    /// After this number of turns of all clients together.
    Turns(u64),
    /// After this number of turns of each client.
    TurnsOfEach(u64),
    /// After this time.
    Time(Duration),
}

/// The schedule of a run, shared by all its threads.
pub(crate) struct Schedule {
    /// When the run ends.
    pub(crate) limit: RunLimit,
    /// Turns per second; `None` in a closed loop.
    pub(crate) rate: Option<f64>,
    /// The next turn's number.
    next: AtomicU64,
}

/// The right to send one request (or one scripted sequence of them).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Turn {
    /// Its number. The request depends only on this and on the seed.
    pub(crate) ticket: u64,
    /// When it should start. Latency is measured from here, even if no client is free at this time. Otherwise a server that stalls would get
    /// fewer requests, and the report would hide the stall (coordinated omission).
    pub(crate) intended: Instant,
}

impl Schedule {
    /// A schedule with no turns taken.
    pub(crate) const fn new(limit: RunLimit, rate: Option<f64>) -> Self {
        Self { limit, rate, next: AtomicU64::new(0) }
    }

    /// Takes the next turn of a run that started at `start`. Returns `None` if there are no more. `taken` is the number of turns that this client
    /// has had.
    fn take(&self, start: Instant, now: Instant, taken: u64) -> Option<Turn> {
        if matches!(self.limit, RunLimit::TurnsOfEach(turns) if taken >= turns) {
            return None;
        }
        let ticket = self.next.fetch_add(1, Ordering::Relaxed);
        let intended = self.rate.map_or(now, |rate| start + offset(ticket, rate));
        let more = match self.limit {
            RunLimit::Turns(turns) => ticket < turns,
            RunLimit::TurnsOfEach(_) => true,
            RunLimit::Time(time) => intended.saturating_duration_since(start) < time,
        };
        more.then_some(Turn { ticket, intended })
    }

    /// The next turn of an open loop that was due before `end` and was not taken, since all clients were busy.
    pub(crate) fn overdue(&self, start: Instant, end: Instant) -> Option<Turn> {
        self.rate?;
        self.take(start, end, 0).filter(|turn| turn.intended < end)
    }
}

/// The time from the start to a turn.
fn offset(ticket: u64, rate: f64) -> Duration {
    Duration::from_secs_f64(ticket as f64 / rate)
}

/// Gives turns to the clients of one thread. In an open loop, one client at a time waits for the next due time, and the others queue behind
/// it. So each thread has one timer, for any number of clients.
#[derive(Default)]
pub(crate) struct Pacer {
    waiting: Mutex<()>,
}

/// A turn before its start. The client prepares its request now, so that the preparation does not count as latency.
pub(crate) struct Slot<'a> {
    turn: Turn,
    /// Held in an open loop, so that there is one timer.
    first_in_line: Option<MutexGuard<'a, ()>>,
}

impl Pacer {
    /// Takes the next turn. Returns `None` when the run is over.
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

    /// Starts the turn: at once in a closed loop, or when it is due. Returns `None` if the run is stopped before that.
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

/// Sleeps until a time, precisely. The runtime's timers have a resolution of a millisecond, and fire up to two late, which is too coarse for
/// 10,000 requests per second. So this sleeps until shortly before, and then polls the clock; other clients run in between.
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
        let schedule = Schedule::new(RunLimit::Turns(3), Some(4.0));
        let late = start + Duration::from_secs(60);
        let turns: Vec<_> = std::iter::from_fn(|| schedule.take(start, late, 0)).collect();
        let due: Vec<_> = turns.iter().map(|turn| turn.intended - start).collect();
        assert_eq!(due, [0, 250, 500].map(Duration::from_millis));
        assert_eq!(turns.iter().map(|turn| turn.ticket).collect::<Vec<_>>(), [0, 1, 2]);
    }

    #[test]
    fn an_open_loop_of_a_duration_has_rate_times_duration_turns() {
        let start = Instant::now();
        let schedule = Schedule::new(RunLimit::Time(Duration::from_secs(10)), Some(3.0));
        assert_eq!(std::iter::from_fn(|| schedule.take(start, start, 0)).count(), 30);
    }

    #[test]
    fn a_closed_loop_starts_now_and_ends_by_count_client_or_clock() {
        let start = Instant::now();
        let later = start + Duration::from_secs(5);
        let turns = Schedule::new(RunLimit::Turns(1), None);
        assert_eq!(turns.take(start, later, 0), Some(Turn { ticket: 0, intended: later }));
        assert_eq!(turns.take(start, later, 1), None);
        let each = Schedule::new(RunLimit::TurnsOfEach(2), None);
        assert!(each.take(start, later, 1).is_some());
        assert!(each.take(start, later, 2).is_none());
        assert!(each.take(start, later, 0).is_some());
        let time = Schedule::new(RunLimit::Time(Duration::from_secs(5)), None);
        assert!(time.take(start, later - Duration::from_nanos(1), 0).is_some());
        assert!(time.take(start, later, 0).is_none());
    }

    #[test]
    fn what_was_due_before_the_end_is_overdue() {
        let start = Instant::now();
        let end = start + Duration::from_secs(2);
        let schedule = Schedule::new(RunLimit::Time(Duration::from_secs(10)), Some(3.0));
        assert!(schedule.take(start, start, 0).is_some());
        assert_eq!(std::iter::from_fn(|| schedule.overdue(start, end)).count(), 5);
        assert_eq!(Schedule::new(RunLimit::Turns(10), None).overdue(start, end), None, "a closed loop waits for its clients");
    }

    #[tokio::test]
    async fn a_stop_is_not_waited_for_until_a_turn_is_due() {
        let (start, stop) = (Instant::now(), CancellationToken::new());
        let (schedule, pacer) = (Schedule::new(RunLimit::Turns(9), Some(0.001)), Pacer::default());
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

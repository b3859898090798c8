//! What is wrong, in words, and since when: what an operator reads first.

use super::utc::Utc;
use serde::Serialize;
use std::time::{Duration, SystemTime};

/// How long something that happens again and again counts as going on after the last time.
const LATELY: Duration = Duration::from_secs(60);
/// How long wrong bytes are worth a look.
const CORRUPT: Duration = Duration::from_secs(900);
/// From this part of the limit on, memory is a problem.
const MEMORY: f64 = 0.9;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Severity {
    /// Clients notice it, or data is at risk.
    Critical,
    /// Clients do not notice it yet.
    Warning,
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Problem {
    what: &'static str,
    text: String,
    since: Utc,
    severity: Severity,
}

/// The node as far as it can be wrong.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen {
    /// The origin does not answer since then.
    pub(super) origin_down: Option<SystemTime>,
    /// The disk tier takes no blobs since then.
    pub(super) disk_read_only: Option<SystemTime>,
    /// Its file system does not answer since then.
    pub(super) disk_silent: Option<SystemTime>,
    /// The other nodes that are down, each since then.
    pub(super) peers_down: Vec<(String, SystemTime)>,
    /// Requests that were turned away since the start, by the limit.
    pub(super) sheds: Vec<(&'static str, u64)>,
    /// Blobs that came with wrong bytes since the start, by the source.
    pub(super) corrupt: Vec<(&'static str, u64)>,
    /// Log records that were dropped since the start, by the sink.
    pub(super) log_dropped: Vec<(&'static str, u64)>,
    /// Memory that the process holds, and the limit.
    pub(super) memory: Option<(u64, u64)>,
}

/// Remembers what happened when.
#[derive(Default)]
pub(super) struct Problems {
    counters: Vec<Counter>,
    memory_since: Option<SystemTime>,
}

/// Something that is counted, and ought not to happen.
struct Counter {
    kind: &'static str,
    label: &'static str,
    count: u64,
    /// When it began to happen, and when it happened last.
    episode: Option<(SystemTime, SystemTime)>,
}

impl Problems {
    /// Looks at the node as it is now. What is wrong, the worst first, and of the same severity what began first. To be called every few seconds,
    /// since what happens in between is told as of the next call.
    pub(super) fn look(&mut self, now: SystemTime, seen: &Seen) -> Vec<Problem> {
        use Severity::{Critical, Warning};
        let mut found = Vec::new();
        let mut tell = |what, text: String, since, severity| found.push(Problem { what, text, since: Utc(since), severity });
        if let Some(since) = seen.origin_down {
            tell("origin", "origin unreachable".to_owned(), since, Critical);
        }
        if let Some(since) = seen.disk_silent {
            tell("disk", "disk not answering".to_owned(), since, Critical);
        }
        if let Some(since) = seen.disk_read_only {
            tell("disk", "disk read-only".to_owned(), since, Warning);
        }
        for (name, since) in &seen.peers_down {
            tell("peer", format!("{name} is down"), *since, Warning);
        }
        let sheds = self.going_on("shedding", &seen.sheds, now, LATELY);
        if let Some(since) = sheds.iter().map(|(_, since)| *since).min() {
            let limits: Vec<_> = sheds.iter().map(|(limit, _)| *limit).collect();
            tell("shedding", format!("requests are turned away at a limit: {}", limits.join(", ")), since, Critical);
        }
        for (source, since) in self.going_on("corrupt", &seen.corrupt, now, CORRUPT) {
            let (text, severity) = match source {
                "origin" => ("the origin sent wrong bytes", Critical),
                "disk" => ("blobs on disk were damaged", Warning),
                _ => ("a peer sent wrong bytes", Warning),
            };
            tell("corrupt", text.to_owned(), since, severity);
        }
        for (sink, since) in self.going_on("log", &seen.log_dropped, now, LATELY) {
            let text = match sink {
                "otlp" => "spans are dropped: the collector of otlp.endpoint does not take them".to_owned(),
                _ => format!("log records are dropped: {sink} does not take them in time"),
            };
            tell("log", text, since, Warning);
        }
        self.memory_since = match seen.memory {
            Some((held, limit)) if held as f64 >= limit as f64 * MEMORY => {
                let since = *self.memory_since.get_or_insert(now);
                tell("memory", format!("memory at {} % of its limit", held.saturating_mul(100) / limit.max(1)), since, Warning);
                Some(since)
            }
            _ => None,
        };
        found.sort_by_key(|problem| (problem.severity, problem.since));
        found
    }

    /// Which of these happened lately, and since when.
    fn going_on(
        &mut self,
        kind: &'static str,
        counts: &[(&'static str, u64)],
        now: SystemTime,
        hold: Duration,
    ) -> Vec<(&'static str, SystemTime)> {
        let mut going_on = Vec::new();
        for (label, count) in counts {
            let known = self.counters.iter().position(|counter| (counter.kind, counter.label) == (kind, *label));
            let at = known.unwrap_or_else(|| {
                self.counters.push(Counter { kind, label, count: 0, episode: None });
                self.counters.len() - 1
            });
            let counter = &mut self.counters[at];
            if *count > counter.count {
                counter.count = *count;
                counter.episode = Some((counter.episode.map_or(now, |(since, _)| since), now));
            }
            counter.episode = counter.episode.filter(|(_, last)| now.duration_since(*last).unwrap_or_default() <= hold);
            going_on.extend(counter.episode.map(|(since, _)| (*label, since)));
        }
        going_on
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn told(problems: &mut Problems, now: u64, seen: &Seen) -> Vec<(&'static str, String, u64)> {
        let told = problems.look(at(now), seen).into_iter();
        told.map(|problem| (problem.what, problem.text, super::super::utc::unix(problem.since.0))).collect()
    }

    #[test]
    fn the_worst_comes_first_and_then_the_oldest() {
        let seen = Seen {
            origin_down: Some(at(50)),
            disk_read_only: Some(at(10)),
            disk_silent: None,
            peers_down: vec![("b:1".into(), at(40)), ("a:1".into(), at(5))],
            sheds: vec![("fills", 3), ("files", 0)],
            corrupt: vec![("origin", 0), ("peer", 1), ("disk", 0)],
            log_dropped: vec![("stderr", 0), ("loki", 2)],
            memory: Some((95, 100)),
        };
        let mut problems = Problems::default();
        let texts: Vec<_> = told(&mut problems, 60, &seen).into_iter().map(|(_, text, _)| text).collect();
        assert_eq!(
            texts,
            [
                "origin unreachable",
                "requests are turned away at a limit: fills",
                "a:1 is down",
                "disk read-only",
                "b:1 is down",
                "a peer sent wrong bytes",
                "log records are dropped: loki does not take them in time",
                "memory at 95 % of its limit",
            ]
        );
        assert_eq!(told(&mut Problems::default(), 60, &Seen { disk_silent: Some(at(7)), ..Seen::default() })[0].0, "disk");
        assert_eq!(told(&mut problems, 60, &Seen { memory: Some((89, 100)), ..Seen::default() }), []);
    }

    #[test]
    fn what_happens_now_and_then_is_one_problem_until_it_stops() {
        let mut problems = Problems::default();
        let shed = |fills, files| Seen { sheds: vec![("fills", fills), ("files", files)], ..Seen::default() };
        assert_eq!(told(&mut problems, 0, &shed(0, 0)), []);
        let one = |limits: &str, since| vec![("shedding", format!("requests are turned away at a limit: {limits}"), since)];
        assert_eq!(told(&mut problems, 10, &shed(1, 0)), one("fills", 10));
        assert_eq!(told(&mut problems, 70, &shed(1, 0)), one("fills", 10), "it was a minute ago");
        assert_eq!(told(&mut problems, 70, &shed(2, 5)), one("fills, files", 10));
        assert_eq!(told(&mut problems, 130, &shed(2, 6)), one("fills, files", 10));
        assert_eq!(told(&mut problems, 131, &shed(2, 6)), one("files", 70));
        assert_eq!(told(&mut problems, 191, &shed(2, 6)), []);
        assert_eq!(told(&mut problems, 200, &shed(3, 6)), one("fills", 200));
        // A clock that is set back ends nothing, and breaks nothing.
        assert_eq!(told(&mut problems, 100, &shed(3, 6)), one("fills", 200));
    }

    #[test]
    fn memory_is_a_problem_since_it_came_near_the_limit() {
        let mut problems = Problems::default();
        let near = Seen { memory: Some((90, 100)), ..Seen::default() };
        assert_eq!(told(&mut problems, 5, &near)[0].2, 5);
        assert_eq!(told(&mut problems, 9, &near)[0].2, 5);
        assert_eq!(told(&mut problems, 10, &Seen::default()), []);
        assert_eq!(told(&mut problems, 11, &near)[0].2, 11);
    }
}

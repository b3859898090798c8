//! The list `problems` of `/stats`: what is wrong now, and since when.

use super::utc::Utc;
use serde::Serialize;
use std::time::{Duration, SystemTime};

/// A recurring event is a problem until this time has passed since the last one.
const LATELY: Duration = Duration::from_secs(60);
/// The same for wrong bytes.
const CORRUPT: Duration = Duration::from_secs(900);
/// Memory is a problem from this fraction of the limit on.
const MEMORY: f64 = 0.9;

/// How bad a problem is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Severity {
    /// Clients notice it, or data is at risk.
    Critical,
    /// Clients do not notice it yet.
    Warning,
}

/// One entry of the list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct NodeProblem {
    what: &'static str,
    text: String,
    since: Utc,
    severity: Severity,
}

/// The state of the node from which the problems are derived.
#[derive(Clone, Debug, Default)]
pub(super) struct NodeState {
    /// Since when the origin is down.
    pub(super) origin_down: Option<SystemTime>,
    /// Since when the disk tier is read-only.
    pub(super) disk_read_only: Option<SystemTime>,
    /// Since when the disk tier's file system does not answer.
    pub(super) disk_silent: Option<SystemTime>,
    /// The peers that are down, and since when.
    pub(super) peers_down: Vec<(String, SystemTime)>,
    /// The routes whose upstreams are down, and since when.
    pub(super) upstreams_down: Vec<(String, SystemTime)>,
    /// Requests refused at a limit since the start, by limit.
    pub(super) sheds: Vec<(&'static str, u64)>,
    /// Blobs that came with wrong bytes since the start, by source.
    pub(super) corrupt: Vec<(&'static str, u64)>,
    /// Log records dropped since the start, by sink.
    pub(super) log_dropped: Vec<(&'static str, u64)>,
    /// The memory of the process and its limit, in bytes.
    pub(super) memory: Option<(u64, u64)>,
}

/// Remembers when problems started.
#[derive(Default)]
pub(super) struct ProblemTracker {
    counters: Vec<EventCounter>,
    memory_since: Option<SystemTime>,
}

/// A counter of events that should not happen.
struct EventCounter {
    kind: &'static str,
    label: &'static str,
    count: u64,
    /// The first and the last event of the current episode.
    episode: Option<(SystemTime, SystemTime)>,
}

impl ProblemTracker {
    /// The problems of the node at the time `now`, sorted by severity and then by start. Call it every few seconds: it dates events by the
    /// first call after them.
    pub(super) fn update(&mut self, now: SystemTime, node: &NodeState) -> Vec<NodeProblem> {
        use Severity::{Critical, Warning};
        let mut found = Vec::new();
        let mut add = |what, text: String, since, severity| found.push(NodeProblem { what, text, since: Utc(since), severity });
        if let Some(since) = node.origin_down {
            add("origin", "origin unreachable".to_owned(), since, Critical);
        }
        if let Some(since) = node.disk_silent {
            add("disk", "disk not answering".to_owned(), since, Critical);
        }
        if let Some(since) = node.disk_read_only {
            add("disk", "disk read-only".to_owned(), since, Warning);
        }
        for (name, since) in &node.peers_down {
            add("peer", format!("{name} is down"), *since, Warning);
        }
        for (route, since) in &node.upstreams_down {
            add("upstream", format!("the upstream of route {route} is down"), *since, Warning);
        }
        let sheds = self.ongoing("shedding", &node.sheds, now, LATELY);
        if let Some(since) = sheds.iter().map(|(_, since)| *since).min() {
            let limits: Vec<_> = sheds.iter().map(|(limit, _)| *limit).collect();
            add("shedding", format!("requests are turned away at a limit: {}", limits.join(", ")), since, Critical);
        }
        for (source, since) in self.ongoing("corrupt", &node.corrupt, now, CORRUPT) {
            let (text, severity) = match source {
                "origin" => ("the origin sent wrong bytes", Critical),
                "disk" => ("blobs on disk were damaged", Warning),
                _ => ("a peer sent wrong bytes", Warning),
            };
            add("corrupt", text.to_owned(), since, severity);
        }
        for (sink, since) in self.ongoing("log", &node.log_dropped, now, LATELY) {
            let text = match sink {
                "otlp" => "spans are dropped: the collector of otlp.endpoint does not take them".to_owned(),
                _ => format!("log records are dropped: {sink} does not take them in time"),
            };
            add("log", text, since, Warning);
        }
        self.memory_since = match node.memory {
            Some((held, limit)) if held as f64 >= limit as f64 * MEMORY => {
                let since = *self.memory_since.get_or_insert(now);
                add("memory", format!("memory at {} % of its limit", held.saturating_mul(100) / limit.max(1)), since, Warning);
                Some(since)
            }
            _ => None,
        };
        found.sort_by_key(|problem| (problem.severity, problem.since));
        found
    }

    /// Which of these counters have grown within `hold`, and since when.
    fn ongoing(
        &mut self,
        kind: &'static str,
        counts: &[(&'static str, u64)],
        now: SystemTime,
        hold: Duration,
    ) -> Vec<(&'static str, SystemTime)> {
        let mut ongoing = Vec::new();
        for (label, count) in counts {
            let found = self.counters.iter().position(|counter| (counter.kind, counter.label) == (kind, *label));
            let at = found.unwrap_or_else(|| {
                self.counters.push(EventCounter { kind, label, count: 0, episode: None });
                self.counters.len() - 1
            });
            let counter = &mut self.counters[at];
            if *count > counter.count {
                counter.count = *count;
                counter.episode = Some((counter.episode.map_or(now, |(since, _)| since), now));
            }
            counter.episode = counter.episode.filter(|(_, last)| now.duration_since(*last).unwrap_or_default() <= hold);
            ongoing.extend(counter.episode.map(|(since, _)| (*label, since)));
        }
        ongoing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn list(problems: &mut ProblemTracker, now: u64, node: &NodeState) -> Vec<(&'static str, String, u64)> {
        let found = problems.update(at(now), node).into_iter();
        found.map(|problem| (problem.what, problem.text, super::super::utc::unix(problem.since.0))).collect()
    }

    #[test]
    fn the_worst_comes_first_and_then_the_oldest() {
        let node = NodeState {
            origin_down: Some(at(50)),
            disk_read_only: Some(at(10)),
            disk_silent: None,
            peers_down: vec![("b:1".into(), at(40)), ("a:1".into(), at(5))],
            upstreams_down: vec![("npm /npm".into(), at(30))],
            sheds: vec![("fills", 3), ("files", 0)],
            corrupt: vec![("origin", 0), ("peer", 1), ("disk", 0)],
            log_dropped: vec![("stderr", 0), ("loki", 2)],
            memory: Some((95, 100)),
        };
        let mut problems = ProblemTracker::default();
        let texts: Vec<_> = list(&mut problems, 60, &node).into_iter().map(|(_, text, _)| text).collect();
        assert_eq!(
            texts,
            [
                "origin unreachable",
                "requests are turned away at a limit: fills",
                "a:1 is down",
                "disk read-only",
                "the upstream of route npm /npm is down",
                "b:1 is down",
                "a peer sent wrong bytes",
                "log records are dropped: loki does not take them in time",
                "memory at 95 % of its limit",
            ]
        );
        assert_eq!(list(&mut ProblemTracker::default(), 60, &NodeState { disk_silent: Some(at(7)), ..NodeState::default() })[0].0, "disk");
        assert_eq!(list(&mut problems, 60, &NodeState { memory: Some((89, 100)), ..NodeState::default() }), []);
    }

    #[test]
    fn a_recurring_event_is_one_problem_until_it_stops() {
        let mut problems = ProblemTracker::default();
        let shed = |fills, files| NodeState { sheds: vec![("fills", fills), ("files", files)], ..NodeState::default() };
        assert_eq!(list(&mut problems, 0, &shed(0, 0)), []);
        let one = |limits: &str, since| vec![("shedding", format!("requests are turned away at a limit: {limits}"), since)];
        assert_eq!(list(&mut problems, 10, &shed(1, 0)), one("fills", 10));
        assert_eq!(list(&mut problems, 70, &shed(1, 0)), one("fills", 10), "it was a minute ago");
        assert_eq!(list(&mut problems, 70, &shed(2, 5)), one("fills, files", 10));
        assert_eq!(list(&mut problems, 130, &shed(2, 6)), one("fills, files", 10));
        assert_eq!(list(&mut problems, 131, &shed(2, 6)), one("files", 70));
        assert_eq!(list(&mut problems, 191, &shed(2, 6)), []);
        assert_eq!(list(&mut problems, 200, &shed(3, 6)), one("fills", 200));
        // A clock that is set back does not end the problem.
        assert_eq!(list(&mut problems, 100, &shed(3, 6)), one("fills", 200));
    }

    #[test]
    fn memory_near_its_limit_is_a_problem() {
        let mut problems = ProblemTracker::default();
        let near = NodeState { memory: Some((90, 100)), ..NodeState::default() };
        assert_eq!(list(&mut problems, 5, &near)[0].2, 5);
        assert_eq!(list(&mut problems, 9, &near)[0].2, 5);
        assert_eq!(list(&mut problems, 10, &NodeState::default()), []);
        assert_eq!(list(&mut problems, 11, &near)[0].2, 11);
    }
}

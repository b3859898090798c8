//! The command line, and the checks of its flags.

use crate::{
    mix::{Mix, Op},
    scenario::{LoadShape, Scenario, Work},
    schedule::RunLimit,
};
use bytesize::ByteSize;
use clap::Parser;
use std::time::Duration;

/// The most blobs. The digests of more would fill the memory.
const MAX_OBJECTS: usize = 50_000_000;
/// The most clients. More would run out of local ports.
const MAX_CONCURRENCY: usize = 60_000;
/// The longest timeout or run: a year. Longer ones are mistakes, and could overflow a clock.
const MAX_TIME: Duration = Duration::from_secs(365 * 24 * 3600);
/// The largest corpus in bytes. A larger one takes hours to make.
const MAX_CORPUS: u64 = 1 << 40;
/// The least size of blobs that the run deletes, in bytes. Smaller blobs can be equal by chance, and a client would delete another one's.
const MIN_DELETED: u64 = 16;
/// `--verify bytes` holds the whole corpus, up to this.
const MAX_HELD: u64 = 2 << 30;

/// Sends load to content-addressed stores, and checks every body against its digest.
///
/// Exits with 0 if every request succeeded and no body was corrupt, and else with 1. Exits with 2 before it sends load if the flags
/// contradict each other or a target cannot be used.
#[derive(Debug, Parser)]
#[command(name = "castier-load", version)]
pub(crate) struct Args {
    /// Server to load, as http://127.0.0.1:8080; repeat it to spread the load over several
    #[arg(long, value_name = "URL")]
    target: Vec<String>,
    /// End after this number of requests
    #[arg(long, value_name = "N")]
    requests: Option<u64>,
    /// End after this time, as 30s or 5m
    #[arg(long, value_name = "D", value_parser = humantime::parse_duration)]
    duration: Option<Duration>,
    /// Clients, each with its own connection [default: 10]
    #[arg(long, value_name = "C")]
    concurrency: Option<usize>,
    /// Open loop: start this number of requests per second, however slow the answers are; latency counts from the intended start
    #[arg(long, value_name = "R", allow_negative_numbers = true)]
    rate: Option<f64>,
    /// Blobs in the corpus [default: 100]
    #[arg(long, value_name = "K")]
    objects: Option<usize>,
    /// Size of every blob, as 1000, 64KiB or 1MiB [default: 1KiB]
    #[arg(long, value_name = "S")]
    size: Option<ByteSize>,
    /// Popularity by Zipf's law with this exponent; without it all blobs are equally popular
    #[arg(long, value_name = "A", allow_negative_numbers = true)]
    zipf: Option<f64>,
    /// Shares of the operations; put and post store blobs that no other run has, delete deletes those again [default: get=100]
    #[arg(long, value_name = "MIX")]
    mix: Option<Mix>,
    /// Store the corpus at this URL and not at the targets, so that they start without it
    #[arg(long, value_name = "URL")]
    fill: Option<String>,
    /// Seed of the corpus and of the order of requests
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Admin address of a castier, for the origin loads of the run; may be repeated
    #[arg(long, value_name = "URL")]
    stats: Vec<String>,
    /// Print the report as one JSON object
    #[arg(long)]
    json: bool,
    /// Repeat a published run; it fixes everything about the load except its targets
    #[arg(long, value_name = "NAME", value_enum)]
    scenario: Option<Scenario>,
    /// A new connection for every request
    #[arg(long)]
    close: bool,
    /// Check bodies by hashing them, or by comparing them with the blobs held in memory, which is cheaper for large ones
    #[arg(long, value_name = "HOW", value_enum, default_value_t = Verify::Digest)]
    verify: Verify,
    /// Longest time for one request, from its intended start
    #[arg(long, value_name = "D", value_parser = humantime::parse_duration, default_value = "60s")]
    timeout: Duration,
    /// Threads that send; the clients are distributed among them
    #[arg(long, value_name = "N", default_value_t = 1)]
    threads: usize,
    /// Allow targets that are not on this machine
    #[arg(long)]
    yes_remote: bool,
}

/// How bodies are checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Verify {
    Digest,
    Bytes,
}

/// A checked run. Its addresses are not resolved yet.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) targets: Vec<String>,
    pub(crate) fill: Option<String>,
    pub(crate) stats: Vec<String>,
    pub(crate) remote: bool,
    pub(crate) scenario: Option<Scenario>,
    pub(crate) shape: LoadShape,
    pub(crate) seed: u64,
    pub(crate) json: bool,
    pub(crate) close: bool,
    pub(crate) verify: Verify,
    pub(crate) timeout: Duration,
    pub(crate) threads: usize,
}

impl Args {
    /// Checks the flags against each other.
    pub(crate) fn plan(self) -> Result<Plan, String> {
        if self.target.is_empty() {
            return Err("--target is missing: name the server to load, as --target http://127.0.0.1:8080".to_owned());
        }
        if self.timeout.is_zero() || self.threads == 0 || self.threads > 256 {
            return Err("--timeout must be above 0, and --threads from 1 to 256".to_owned());
        }
        if self.timeout > MAX_TIME || self.duration.is_some_and(|duration| duration > MAX_TIME) {
            return Err("--timeout and --duration go up to a year".to_owned());
        }
        let shape = match self.scenario {
            Some(scenario) => {
                self.refuse_beside(scenario)?;
                scenario.shape()
            }
            None => self.shape()?,
        };
        if shape.size.saturating_mul(if shape.work.reads_corpus() { shape.objects as u64 } else { 1 }) > MAX_CORPUS {
            return Err(format!("--size times --objects is the corpus: {} is the most", ByteSize::b(MAX_CORPUS)));
        }
        if !shape.work.reads_corpus() && (self.fill.is_some() || self.verify == Verify::Bytes) {
            return Err("--fill and --verify are about the corpus, which only get and head read".to_owned());
        }
        if self.verify == Verify::Bytes && shape.size.saturating_mul(shape.objects as u64) > MAX_HELD {
            return Err(format!("--verify bytes holds the corpus in memory: {} is the most", ByteSize::b(MAX_HELD)));
        }
        Ok(Plan {
            targets: self.target,
            fill: self.fill,
            stats: self.stats,
            remote: self.yes_remote,
            scenario: self.scenario,
            shape,
            seed: self.seed,
            json: self.json,
            close: self.close,
            verify: self.verify,
            timeout: self.timeout,
            threads: self.threads.min(shape.concurrency),
        })
    }

    /// Refuses flags that would change the load of a scenario.
    fn refuse_beside(&self, scenario: Scenario) -> Result<(), String> {
        let given = [
            ("--requests", self.requests.is_some()),
            ("--duration", self.duration.is_some()),
            ("--concurrency", self.concurrency.is_some()),
            ("--rate", self.rate.is_some()),
            ("--objects", self.objects.is_some()),
            ("--size", self.size.is_some()),
            ("--zipf", self.zipf.is_some()),
            ("--mix", self.mix.is_some()),
        ];
        match given.iter().find(|(_, given)| *given) {
            Some((flag, _)) => Err(format!("{flag} cannot be used with --scenario {}, which fixes it", scenario.name())),
            None => Ok(()),
        }
    }

    fn shape(&self) -> Result<LoadShape, String> {
        let limit = match (self.requests, self.duration) {
            (Some(0), None) => return Err("--requests must be at least 1".to_owned()),
            (None, Some(Duration::ZERO)) => return Err("--duration must be above 0".to_owned()),
            (Some(requests), None) => RunLimit::Turns(requests),
            (None, Some(duration)) => RunLimit::Time(duration),
            (Some(_), Some(_)) => return Err("--requests and --duration exclude each other".to_owned()),
            (None, None) => return Err("say when to end: --requests N, --duration D or --scenario NAME".to_owned()),
        };
        let mix = self.mix.unwrap_or_else(|| Mix::only(Op::Get));
        if mix.has(Op::Delete) && !mix.writes() {
            return Err("a mix with delete needs put or post: only blobs that the run stored itself are deleted".to_owned());
        }
        if self.zipf.is_some() && !mix.reads() {
            return Err("--zipf says which blobs are read: it needs get or head in the mix".to_owned());
        }
        if self.zipf.is_some_and(|a| !(a.is_finite() && a >= 0.0)) {
            return Err("--zipf must be a number from 0 up".to_owned());
        }
        if self.rate.is_some_and(|rate| !(rate.is_finite() && (0.001..=10_000_000.0).contains(&rate))) {
            return Err("--rate must be from 0.001 to 10000000 requests per second".to_owned());
        }
        let concurrency = self.concurrency.unwrap_or(10);
        if concurrency == 0 || concurrency > MAX_CONCURRENCY {
            return Err(format!("--concurrency must be from 1 to {MAX_CONCURRENCY}"));
        }
        let objects = self.objects.unwrap_or(100);
        if objects == 0 || objects > MAX_OBJECTS {
            return Err(format!("--objects must be from 1 to {MAX_OBJECTS}"));
        }
        let size = self.size.unwrap_or(ByteSize::kib(1)).as_u64();
        if mix.has(Op::Delete) && size < MIN_DELETED {
            return Err(format!("a mix with delete needs a --size of {MIN_DELETED} or more: smaller blobs are equal by chance"));
        }
        Ok(LoadShape { work: Work::Mix(mix), limit, concurrency, rate: self.rate, objects, size, zipf: self.zipf })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(line: &str) -> Result<Plan, String> {
        let line = format!("castier-load --target http://127.0.0.1:1 {line}");
        Args::try_parse_from(line.split_whitespace()).map_err(|error| error.to_string()).and_then(Args::plan)
    }

    #[test]
    fn sizes_and_times_as_people_write_them() {
        let shape = |line: &str| plan(line).unwrap().shape;
        assert_eq!(shape("--requests 5 --size 64KiB").size, 64 << 10);
        assert_eq!(shape("--requests 5 --size 25kB").size, 25_000);
        assert_eq!(shape("--requests 5 --size 0").size, 0);
        assert_eq!(shape("--requests 5 --size 2048").size, 2048);
        assert_eq!(shape("--duration 1m30s").limit, RunLimit::Time(Duration::from_secs(90)));
        assert_eq!(shape("--scenario cas-harness"), Scenario::CasHarness.shape());
        assert_eq!(shape("--requests 5").work, Work::Mix("get=100".parse::<Mix>().map(|_| Mix::only(Op::Get)).unwrap()));
    }

    #[test]
    fn impossible_combinations_are_one_line_that_names_the_flag() {
        for (line, names) in [
            ("", "--requests N, --duration D or --scenario"),
            ("--requests 0", "--requests"),
            ("--requests 1 --duration 1s", "exclude"),
            ("--duration 0s", "--duration"),
            ("--requests 1 --concurrency 0", "--concurrency"),
            ("--requests 1 --objects 0", "--objects"),
            ("--requests 1 --rate 0", "--rate"),
            ("--requests 1 --rate nan", "--rate"),
            ("--requests 1 --zipf -1", "--zipf"),
            ("--requests 1 --zipf inf", "--zipf"),
            ("--requests 1 --zipf 1 --mix put=1", "--zipf"),
            ("--requests 1 --mix get=1,delete=1", "delete"),
            ("--requests 1 --mix fetch=1", "fetch"),
            ("--requests 1 --size big", "--size"),
            ("--requests 1 --verify bytes --size 1GiB", "--verify bytes"),
            ("--requests 1 --timeout 0s", "--timeout"),
            ("--requests 1 --timeout 300000000000y", "--timeout"),
            ("--duration 2y", "--duration"),
            ("--requests 1 --size 16EiB", "--size"),
            ("--requests 1 --size 1 --mix put=1,delete=1", "--size"),
            ("--requests 1 --mix put=1 --fill http://127.0.0.1:2", "--fill"),
            ("--requests 1 --mix put=1 --verify bytes", "--verify"),
            ("--requests 1 --threads 0", "--threads"),
            ("--scenario forms --requests 3", "--requests cannot be used with --scenario forms"),
            ("--scenario sangraha-2k --mix get=1", "--mix cannot be used with --scenario sangraha-2k"),
        ] {
            let error = plan(line).unwrap_err();
            assert!(error.lines().next().is_some_and(|first| first.contains(names)), "{line}: {error}");
        }
        let none = Args::try_parse_from(["castier-load", "--requests", "1"]).unwrap().plan().unwrap_err();
        assert!(none.contains("--target"));
    }
}

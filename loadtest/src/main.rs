//! `castier-load`: sends load to content-addressed stores over HTTP, and checks every byte of the answers.
//!
//! In reading order: `args` checks the flags; `scenario` has the published runs; `target` resolves addresses; `prepare` checks that the
//! targets can be used, and stores the `corpus`; `run` sends requests of the `mix` with `client`s, when the `schedule` says; `tally` counts,
//! and `report` prints.

mod args;
mod client;
mod corpus;
mod mix;
mod prepare;
mod report;
mod run;
mod scenario;
mod schedule;
mod tally;
mod target;

use crate::{
    args::{Args, Plan, Verify},
    corpus::{Corpus, Popularity},
    report::{Context, Report},
    run::Run,
    schedule::{RunLimit, Schedule},
    tally::Tally,
    target::Target,
};
use clap::Parser as _;
use indicatif::{ProgressBar, ProgressStyle};
use rustix::process::{Resource, getrlimit, setrlimit};
use std::{
    io::Write as _,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Signals within this time count as one.
const SAME_SIGNAL: Duration = Duration::from_millis(500);

/// Why there is no report.
enum Refusal {
    /// The flags contradict each other, or a target cannot be used. No load was sent.
    Usage(String),
    /// The run started, and could not continue.
    Broken(String),
}

fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) if !error.use_stderr() => {
            // Help or version: clap prints them. A closed pipe is not a failure.
            let _ = error.print();
            return ExitCode::SUCCESS;
        }
        Err(error) => return refuse(&Refusal::Usage(first_line(&error.to_string()))),
    };
    let result = args.plan().map_err(Refusal::Usage).and_then(|plan| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(512).build();
        let runtime = runtime.map_err(|error| Refusal::Broken(format!("cannot start: {error}")))?;
        let result = runtime.block_on(load(plan));
        // After an interruption, do not wait for the thread that makes the corpus.
        runtime.shutdown_background();
        result
    });
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(refusal) => refuse(&refusal),
    }
}

fn refuse(refusal: &Refusal) -> ExitCode {
    let (text, code) = match refusal {
        Refusal::Usage(text) => (text, 2),
        Refusal::Broken(text) => (text, 1),
    };
    eprintln!("castier-load: {text}");
    ExitCode::from(code)
}

/// The first line of clap's error.
fn first_line(text: &str) -> String {
    let line = text.lines().next().unwrap_or_default().trim_start_matches("error: ");
    format!("{line}; see castier-load --help")
}

/// Does the whole run. Returns whether everything succeeded.
async fn load(plan: Plan) -> Result<bool, Refusal> {
    let stop = stop_on_signal().map_err(|error| Refusal::Broken(format!("cannot wait for signals: {error}")))?;
    let resolve = async |urls: &[String]| {
        let mut targets = Vec::with_capacity(urls.len());
        for url in urls {
            targets.push(Arc::new(Target::resolve(url, plan.remote).await.map_err(Refusal::Usage)?));
        }
        Ok(targets)
    };
    let (targets, stores, admins) = (resolve(&plan.targets).await?, resolve(plan.fill.as_slice()).await?, resolve(&plan.stats).await?);
    let shape = plan.shape;
    allow_descriptors(shape.concurrency * targets.len()).map_err(Refusal::Usage)?;
    for target in &targets {
        prepare::check_target(target, shape.work.deletes()).await.map_err(Refusal::Usage)?;
    }
    for store in &stores {
        prepare::check_target(store, false).await.map_err(Refusal::Usage)?;
    }
    prepare::origin_loads(&admins).await.map_err(Refusal::Usage)?;
    let popularity = Popularity::new(shape.objects, shape.zipf).map_err(Refusal::Usage)?;

    let objects = if shape.work.reads_corpus() { shape.objects } else { 0 };
    let corpus = make(&plan, objects, &stop).await?;
    if let Some(corpus) = &corpus {
        let stored = Arc::new(AtomicU64::new(0));
        let store = prepare::store(corpus, if stores.is_empty() { &targets } else { &stores }, plan.timeout, &stored);
        let bar = bar("storing", objects as u64);
        let stored = stop.run_until_cancelled(with_progress(store, &bar, || stored.load(Ordering::Relaxed))).await;
        bar.finish_and_clear();
        stored.unwrap_or(Ok(())).map_err(Refusal::Broken)?;
    }

    let before = prepare::origin_loads(&admins).await.map_err(Refusal::Broken)?;
    let tally = match corpus.filter(|_| !stop.is_cancelled()) {
        Some(corpus) => {
            let run = Arc::new(Run {
                targets,
                work: shape.work,
                schedule: Schedule::new(shape.limit, shape.rate),
                corpus,
                popularity,
                seed: plan.seed,
                concurrency: shape.concurrency,
                threads: plan.threads,
                timeout: plan.timeout,
                close: plan.close,
                done: AtomicU64::new(0),
            });
            drive(&run, &stop).await.map_err(|error| Refusal::Broken(format!("the run broke off: {error}")))?
        }
        None => Tally::default(),
    };
    let origin_loads = match prepare::origin_loads(&admins).await {
        _ if admins.is_empty() => None,
        Ok(after) => Some(after.saturating_sub(before)),
        Err(text) => {
            // Print the rest of the report all the same.
            eprintln!("castier-load: the report is without origin loads: {text}");
            None
        }
    };

    let context = Context { origin_loads, scenario: plan.scenario.map(|scenario| scenario.name()), interrupted: stop.is_cancelled() };
    let report = Report::new(&tally, context);
    let text = if plan.json {
        report.json()
            + "
"
    } else {
        report.text(&tally)
    };
    match std::io::stdout().write_all(text.as_bytes()) {
        // A closed pipe is not a failure.
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(Refusal::Broken(format!("cannot print the report: {error}"))),
        _ => Ok(tally.flawless()),
    }
}

/// Makes the corpus on another thread. Returns `None` if the run is stopped before that is done.
async fn make(plan: &Plan, objects: usize, stop: &CancellationToken) -> Result<Option<Arc<Corpus>>, Refusal> {
    let (seed, size, hold) = (plan.seed, plan.shape.size, plan.verify == Verify::Bytes);
    let made = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&made);
    let making = tokio::task::spawn_blocking(move || Corpus::new(seed, objects, size, hold, &counter));
    let bar = bar("making", objects as u64);
    let corpus = stop.run_until_cancelled(with_progress(making, &bar, || made.load(Ordering::Relaxed))).await;
    bar.finish_and_clear();
    let corpus = corpus.transpose().map_err(|error| Refusal::Broken(format!("cannot make the corpus: {error}")))?;
    Ok(corpus.map(Arc::new))
}

async fn drive(run: &Arc<Run>, stop: &CancellationToken) -> std::io::Result<Tally> {
    let start = Instant::now();
    let (length, clock) = match run.schedule.limit {
        RunLimit::Turns(turns) => (turns, false),
        RunLimit::TurnsOfEach(turns) => (turns * run.concurrency as u64, false),
        RunLimit::Time(time) => (u64::try_from(time.as_millis()).unwrap_or(u64::MAX), true),
    };
    let bar = bar("loading", length);
    let position = || {
        if clock { u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX).min(length) } else { run.done.load(Ordering::Relaxed) }
    };
    let tally = with_progress(run.drive(stop), &bar, position).await;
    bar.finish_and_clear();
    tally
}

/// A progress bar on standard error, if that is a terminal.
fn bar(what: &'static str, length: u64) -> ProgressBar {
    let bar = ProgressBar::new(length).with_message(what);
    match ProgressStyle::with_template("{msg} {wide_bar} {percent:>3} % {elapsed}") {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

/// Redraws the bar while `work` runs. Only a few times per second, since the tester's core is busy.
async fn with_progress<T>(work: impl Future<Output = T>, bar: &ProgressBar, position: impl Fn() -> u64) -> T {
    let mut tick = tokio::time::interval(Duration::from_millis(250));
    let mut work = std::pin::pin!(work);
    loop {
        tokio::select! {
            result = &mut work => return result,
            _ = tick.tick() => bar.set_position(position()),
        }
    }
}

/// A token that the first SIGINT or SIGTERM cancels, so that the report is still printed. The second signal ends the process at once. Signals
/// right after the first one are ignored: shells and `timeout` signal the process and its group.
fn stop_on_signal() -> std::io::Result<CancellationToken> {
    let stop = CancellationToken::new();
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let token = stop.clone();
    tokio::spawn(async move {
        let mut first: Option<Instant> = None;
        loop {
            tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
            if first.get_or_insert_with(Instant::now).elapsed() > SAME_SIGNAL {
                std::process::exit(130);
            }
            token.cancel();
        }
    });
    Ok(stop)
}

/// Raises the soft limit of open files to what the run needs.
fn allow_descriptors(connections: usize) -> Result<(), String> {
    let needed = connections as u64 + 64;
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current.is_none_or(|current| current >= needed) {
        return Ok(());
    }
    limit.current = Some(needed);
    setrlimit(Resource::Nofile, limit)
        .map_err(|_| format!("{connections} connections need {needed} open files: raise the limit with ulimit -n {needed}"))
}

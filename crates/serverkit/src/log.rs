//! The log. Records go to stderr, and if configured also to Loki.
//!
//! Nothing here delays or fails a request. A writer thread and a task for Loki take the records out of queues that are bounded in bytes.
//! When a queue is full, records are dropped and counted, and requests go on.

use castier_config::{Log, LogFormat};
use std::{
    cell::RefCell,
    io,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::SystemTime,
};
use tokio::net::TcpListener;
use tracing::{Event, Level, Subscriber};
use tracing_log::NormalizeEvent as _;
use tracing_subscriber::{
    Layer, Registry,
    filter::{LevelFilter, ParseError, Targets},
    layer::{Context, SubscriberExt as _},
    reload,
    util::SubscriberInitExt as _,
};

mod line;
mod loki;
mod stderr;

use line::Line;

/// The modules whose own modules `log.level` can name by their last word alone.
const PARENTS: [&str; 8] = [
    "castier",
    "castier::handlers",
    "castier_cache",
    "castier_cluster",
    "castier_events",
    "castier_origin",
    "castier_serverkit",
    "castier_upstream",
];

/// Why logging could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The level is invalid.
    #[error("log.level: {0}; write a level such as info, or a list such as info,access=off")]
    Level(#[from] ParseError),
    /// Loki's URL is unusable.
    #[error("log.loki_url: {0}; write http://HOST:PORT or https://HOST")]
    Loki(String),
    /// The writer thread could not be started.
    #[error("the log has no thread: {0}")]
    Thread(io::Error),
    /// Logging is set up already.
    #[error("this process logs already")]
    Twice,
}

/// The destinations of records and spans: the label `sink` of `castier_log_dropped_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sink {
    Stderr,
    Loki,
    /// For spans; see [`crate::otlp`].
    Otlp,
}

static DROPPED: [AtomicU64; 3] = [const { AtomicU64::new(0) }; 3];

pub(crate) fn dropped(sink: Sink, records: u64) {
    DROPPED[sink as usize].fetch_add(records, Relaxed);
}

/// For each sink: its label, and how many records or spans were dropped since the start.
pub fn drops() -> [(&'static str, u64); 3] {
    [("stderr", Sink::Stderr), ("loki", Sink::Loki), ("otlp", Sink::Otlp)].map(|(name, sink)| (name, DROPPED[sink as usize].load(Relaxed)))
}

/// Keeps the log running. [`Guard::close`] writes the records that are left to all sinks. A drop does so for stderr only.
pub struct Guard {
    level: reload::Handle<Targets, Registry>,
    format: LogFormat,
    program: &'static str,
    loki: Option<loki::Shipper>,
    stderr: stderr::Stderr,
}

/// Starts the log. `program` is the `target` of the program's messages about itself, and the label `job` in Loki.
///
/// With a `loki_url`, must be called within a tokio runtime. The task for Loki runs there.
///
/// # Errors
/// [`LogError`], which names the wrong configuration key.
pub fn init(log: &Log, program: &'static str) -> Result<Guard, LogError> {
    let (filter, level) = reload::Layer::new(targets(&log.level)?);
    let stderr = stderr::Stderr::start().map_err(LogError::Thread)?;
    let (queue, loki) = match log.loki_url.as_str() {
        "" => (None, None),
        url => {
            loki::Shipper::start(url, &log.loki, program).map(|(queue, shipper)| (Some(queue), Some(shipper))).map_err(LogError::Loki)?
        }
    };
    let records = Records { format: log.format, stderr: stderr.clone(), loki: queue };
    tracing_subscriber::registry().with(filter).with(records).try_init().map_err(|_| LogError::Twice)?;
    log_panics();
    Ok(Guard { level, format: log.format, program, loki, stderr })
}

/// Logs each panic as a record.
fn log_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let payload = panic.payload();
        let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned()).or_else(|| payload.downcast_ref::<String>().cloned());
        let at = panic.location().map(tracing::field::display);
        tracing::error!(target: "panic", at, thread = std::thread::current().name(), cause = text, "a part of the program stopped: this is a bug; please report it");
    }));
}

/// The targets of `log.level`. Unless it names pingora, pingora logs only what an operator can act on. Its connection pool logs an error when two tasks
/// take the same kept-alive connection. Its shutdown and its proxy repeat messages of castier.
///
/// A name without `::` is the last part of a target: `access=off` stands for `castier::access` and `castier_origin::access`.
fn targets(level: &str) -> Result<Targets, ParseError> {
    let mut all: Targets = level.parse()?;
    if !level.contains("pingora") {
        let most = all.default_level().unwrap_or(LevelFilter::OFF).min(LevelFilter::WARN);
        all = all.with_target("pingora_core", most).with_target("pingora_proxy", LevelFilter::OFF);
        all = all.with_target("pingora_core::connectors", LevelFilter::OFF);
    }
    // castier says itself that a broker is away, and does so once.
    for client in ["async_nats", "lapin"].into_iter().filter(|client| !level.contains(client)) {
        all = all.with_target(client, LevelFilter::OFF);
    }
    let named: Targets = level.parse()?;
    let parts = || named.iter().filter(|(part, _)| !part.contains("::"));
    for (part, level) in parts() {
        // `disk` is castier_cache::disk, and `upstream` is castier_upstream.
        all = all.with_targets(PARENTS.map(|parent| (format!("{parent}::{part}"), level))).with_target(format!("castier_{part}"), level);
    }
    // A whole target is more specific than its last part, so it is added last.
    Ok(all.with_targets(named.iter().filter(|(part, _)| part.contains("::")).map(|(part, level)| (part.to_owned(), level))))
}

impl Guard {
    /// Changes the level. `level` is a value of `log.level`.
    ///
    /// # Errors
    /// [`LogError::Level`] if it is invalid. Then nothing changes.
    pub fn set_level(&self, level: &str) -> Result<(), LogError> {
        let targets = targets(level)?;
        // Fails only if the subscriber no longer exists. Then there is no log.
        self.level.reload(targets).ok();
        Ok(())
    }

    /// Sets the label `instance` for Loki, unless `log.loki.labels` has one.
    pub fn name_instance(&self, name: String) {
        if let Some(loki) = &self.loki {
            loki.name_instance(name);
        }
    }

    /// Writes a record to stdout at any level, for the person who started the program.
    pub fn say(&self, text: &str) {
        write_record(&mut io::stdout(), self.format, Level::INFO, self.program, text);
    }

    /// Sends the last records to Loki, then to stderr, each within a short timeout. Called at the end of the program.
    pub async fn close(mut self) {
        if let Some(loki) = self.loki.take() {
            loki.close().await;
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.stderr.flush();
    }
}

/// Writes a record to stderr without the log, when a program cannot start. Returns when it is written.
pub(crate) fn fail(format: LogFormat, program: &str, text: &str) {
    write_record(&mut io::stderr(), format, Level::ERROR, program, text);
}

fn write_record(to: &mut impl io::Write, format: LogFormat, level: Level, target: &str, text: &str) {
    let (mut out, mut scratch) = (String::new(), String::new());
    let mut line = Line::begin(&mut out, &mut scratch, format, SystemTime::now(), level, target);
    line.text("message", text);
    line.end();
    // A closed stdout or stderr must not end the program.
    to.write_all(out.as_bytes()).and_then(|()| to.flush()).ok();
}

/// The name of this machine.
fn host() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// The default name of an instance in records and spans: the machine, and the port of this listener.
pub fn instance(listener: &TcpListener) -> String {
    format!("{}:{}", host(), listener.local_addr().map_or(0, |address| address.port()))
}

/// Formats each record as a line, and sends it to the sinks.
struct Records {
    format: LogFormat,
    stderr: stderr::Stderr,
    loki: Option<loki::Queue>,
}

thread_local! {
    /// A buffer for a line, and one for a value in it.
    static BUFFERS: RefCell<(String, String)> = const { RefCell::new((String::new(), String::new())) };
}

/// The most capacity that a thread's buffers keep between records.
const KEPT: usize = 16 << 10;

impl<S: Subscriber> Layer<S> for Records {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        BUFFERS.with(|buffers| {
            // The borrow fails if formatting a value logs a record itself. That record is dropped.
            let Ok(mut buffers) = buffers.try_borrow_mut() else { return };
            let (out, scratch) = &mut *buffers;
            let (at, normalized) = (SystemTime::now(), event.normalized_metadata());
            let metadata = normalized.as_ref().unwrap_or_else(|| event.metadata());
            let mut line = Line::begin(out, scratch, self.format, at, *metadata.level(), metadata.target());
            event.record(&mut line);
            line.end();
            self.stderr.send(out);
            if let Some(loki) = &self.loki {
                loki.send(at, *metadata.level(), metadata.target(), out);
            }
            out.shrink_to(KEPT);
            scratch.shrink_to(KEPT);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_the_last_words_of_targets() {
        let enabled = |level: &str, target: &str| targets(level).unwrap().would_enable(target, &Level::INFO);
        for (level, target, wanted) in [
            ("info", "castier::access", true),
            ("info,access=off", "castier::access", false),
            ("info,access=off", "castier_origin::access", false),
            ("info,access=off", "castier_cache::disk", true),
            ("info,castier_origin::access=off", "castier_origin::access", false),
            ("info,castier_origin::access=off", "castier::access", true),
            ("off,castier_origin::access=info,access=off", "castier_origin::access", true),
            ("warn,access=info", "castier::access", true),
            ("warn,access=info", "castier_cache::disk", false),
            ("warn,disk=info", "castier_cache::disk::scan", true),
            ("warn,relay=info", "castier::handlers::relay", true),
            ("warn,upstream=info", "castier_upstream::origin_state", true),
            ("warn,members=info", "castier_cluster::members::dns", true),
            ("warn,disk=info", "castier_cache::fill", false),
            ("info,stats=off", "stats", false),
            ("info", "pingora_proxy::proxy_common", false),
            ("info,pingora_proxy=info", "pingora_proxy::proxy_common", true),
        ] {
            assert_eq!(enabled(level, target), wanted, "{level} {target}");
        }
    }
}

//! Where log records go: stderr, and if wanted the same records to Loki. Used by every program of the project.
//!
//! Nothing here can hold up or fail a request. Records are handed to a writer thread and to Loki's own task through
//! bounded queues; when those are full, records are dropped, and requests go on.

use castier_config::{Log, LogFormat};
use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::{
    Layer, Registry,
    filter::{LevelFilter, ParseError, Targets},
    layer::SubscriberExt as _,
    reload,
    util::SubscriberInitExt as _,
};

mod loki;

/// Records waiting for stderr: some ten MiB at most.
const WAITING_LINES: usize = 65_536;

/// Why logging could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The level cannot be read.
    #[error("log.level: {0}; write a level such as info, or a list such as info,castier_origin=debug")]
    Level(#[from] ParseError),
    /// Loki's address cannot be used.
    #[error("log.loki_url: {0}; write http://HOST:PORT or https://HOST")]
    Loki(String),
    /// Somebody was first.
    #[error("this process logs already")]
    Twice,
}

/// Keeps the log going. Dropping it writes out what waits for stderr; [`Guard::close`] does so for Loki too.
pub struct Guard {
    level: reload::Handle<Targets, Registry>,
    loki: Option<loki::Shipper>,
    _writer: WorkerGuard,
}

/// Begins to log as `log` says. `program` names this process in Loki, as the label of that name.
///
/// With a `loki_url` this must be called within a tokio runtime, where the shipping then runs.
///
/// # Errors
/// [`LogError`], which names the key that is wrong.
pub fn init(log: &Log, program: &str) -> Result<Guard, LogError> {
    let (filter, level) = reload::Layer::new(targets(&log.level)?);
    let (writer, guard) =
        NonBlockingBuilder::default().buffered_lines_limit(WAITING_LINES).lossy(true).thread_name("log").finish(std::io::stderr());
    let lines = tracing_subscriber::fmt::layer().with_writer(writer);
    let lines = match log.format {
        LogFormat::Text => lines.with_ansi(false).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    let (loki_layer, loki) = match log.loki_url.as_str() {
        "" => (None, None),
        url => loki::ship(url, program).map(|(layer, shipper)| (Some(layer), Some(shipper))).map_err(LogError::Loki)?,
    };
    tracing_subscriber::registry().with(filter).with(lines).with(loki_layer).try_init().map_err(|_| LogError::Twice)?;
    Ok(Guard { level, loki, _writer: guard })
}

/// `log.level`, with pingora held to what an operator can act on: its connection pool calls it an error when two tasks reach for
/// the same kept-alive connection, and its shutdown repeats what castier says. Naming pingora in the level overrides this.
fn targets(level: &str) -> Result<Targets, ParseError> {
    let targets: Targets = level.parse()?;
    if level.contains("pingora") {
        return Ok(targets);
    }
    let most = targets.default_level().unwrap_or(LevelFilter::OFF).min(LevelFilter::WARN);
    Ok(targets.with_target("pingora_core", most).with_target("pingora_core::connectors", LevelFilter::OFF))
}

impl Guard {
    /// Changes what is worth a record, from now on. The text is that of `log.level`.
    ///
    /// # Errors
    /// [`LogError::Level`] when it cannot be read; nothing changes then.
    pub fn set_level(&self, level: &str) -> Result<(), LogError> {
        let targets = targets(level)?;
        // Fails only when the subscriber is gone, and then there is no log whose level could matter.
        self.level.reload(targets).ok();
        Ok(())
    }

    /// The last thing a program does: gives Loki a moment to take what was logged last, then stderr.
    pub async fn close(self) {
        if let Some(loki) = self.loki {
            loki.close().await;
        }
    }
}

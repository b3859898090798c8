//! The signals that a program acts on, and those that must not end it.

use castier_config::{Loaded, Problems};
use std::{sync::Arc, time::Duration};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    task::JoinHandle,
    time::timeout,
};

/// How long reading the configuration again may take: a disk that does not answer must not hold up the program.
const READING: Duration = Duration::from_secs(10);

/// SIGXFSZ: without a handler, a file that reaches the limit on file sizes ends the program. With one, the write fails.
const XFSZ: i32 = rustix::process::Signal::XFSZ.as_raw();

/// SIGTERM and SIGINT end the program. SIGHUP makes it read its configuration again. SIGUSR1 and SIGUSR2 do nothing: without a handler they
/// would end the program.
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hang_up: Signal,
    _ignored: [Signal; 3],
}

/// What a signal asks for.
pub enum Order<T> {
    /// End the program.
    End,
    /// Use this configuration, which was read again.
    Reload(T),
}

/// Reads the configuration again, on a thread of its own: signals are acted on meanwhile.
pub struct Reading<T> {
    /// Blocks.
    read: Arc<dyn Fn() -> T + Send + Sync>,
    under_way: Option<JoinHandle<Result<T, String>>>,
    /// Another SIGHUP came while the configuration was read.
    again: bool,
}

impl<T: Send + 'static> Reading<T> {
    /// Will read with this function.
    pub fn new(read: impl Fn() -> T + Send + Sync + 'static) -> Self {
        Self { read: Arc::new(read), under_way: None, again: false }
    }

    fn begin(&mut self) {
        if self.under_way.is_some() {
            self.again = true;
            return;
        }
        let read = Arc::clone(&self.read);
        self.under_way = Some(tokio::spawn(async move {
            match timeout(READING, tokio::task::spawn_blocking(move || read())).await {
                Ok(Ok(read)) => Ok(read),
                Ok(Err(_)) => Err("reading it failed".to_owned()),
                Err(_) => Err(format!("it could not be read within {} s: the disk does not answer", READING.as_secs())),
            }
        }));
    }

    async fn done(&mut self) -> Result<T, String> {
        let Some(under_way) = &mut self.under_way else { return std::future::pending().await };
        let read = under_way.await.unwrap_or_else(|_| Err("reading it failed".to_owned()));
        self.under_way = None;
        if std::mem::take(&mut self.again) {
            self.begin();
        }
        read
    }
}

impl Signals {
    /// Installs the handlers.
    ///
    /// # Errors
    /// A text, when the system does not allow it.
    pub fn new() -> Result<Self, String> {
        let handle = |kind| signal(kind).map_err(|error| format!("signals cannot be received: {error}"));
        Ok(Self {
            terminate: handle(SignalKind::terminate())?,
            interrupt: handle(SignalKind::interrupt())?,
            hang_up: handle(SignalKind::hangup())?,
            _ignored: [handle(SignalKind::user_defined1())?, handle(SignalKind::user_defined2())?, handle(SignalKind::from_raw(XFSZ))?],
        })
    }

    /// Waits for the next signal that asks for something.
    pub async fn next<T: Send + 'static>(&mut self, reading: &mut Reading<T>) -> Order<T> {
        loop {
            tokio::select! {
                biased;
                _ = self.terminate.recv() => return Order::End,
                _ = self.interrupt.recv() => return Order::End,
                _ = self.hang_up.recv() => reading.begin(),
                read = reading.done() => match read {
                    Ok(read) => return Order::Reload(read),
                    Err(why) => tracing::error!(why, "the configuration was not read again, and nothing changes"),
                },
            }
        }
    }

    /// Waits for SIGTERM or SIGINT. While the program ends, that is the second one.
    pub async fn end(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// The configuration that was read again. If it has problems, logs them and returns none.
pub fn sound<C>(read: Result<Loaded<C>, Problems>) -> Option<C> {
    match read {
        Ok(loaded) => Some(loaded.config),
        Err(problems) => {
            let problems = problems.to_string().replace('\n', "; ");
            tracing::error!(problems, "the configuration was not read again, and nothing changes");
            None
        }
    }
}

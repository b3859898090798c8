//! The signals that a program acts on, and those that must not end it. Used by every program of the project.

use castier_config::{Loaded, Problems};
use std::{sync::Arc, time::Duration};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    task::JoinHandle,
    time::timeout,
};

/// How long the configuration may take to be read again: a disk that does not answer must not be waited for.
const READING: Duration = Duration::from_secs(10);

/// SIGXFSZ: without a handler, a file that reaches the limit on file sizes ends the program. With one, the write fails.
const XFSZ: i32 = rustix::process::Signal::XFSZ.as_raw();

/// SIGTERM and SIGINT end the program, SIGHUP has the configuration read again. SIGUSR1 and SIGUSR2 would end a program that does not
/// know them; here they do nothing.
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hang_up: Signal,
    _ignored: [Signal; 3],
}

/// What there is to do.
pub enum Told<T> {
    /// To end.
    End,
    /// To take over what was read.
    Reload(T),
}

/// The configuration on its way, read on a thread of its own: however long that takes, signals are heard.
pub struct Reading<T> {
    /// Blocks.
    read: Arc<dyn Fn() -> T + Send + Sync>,
    under_way: Option<JoinHandle<Result<T, String>>>,
    /// Another SIGHUP came meanwhile.
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
    /// From now on these signals are heard.
    ///
    /// # Errors
    /// A text, when the system does not allow it.
    pub fn new() -> Result<Self, String> {
        let hear = |kind| signal(kind).map_err(|error| format!("signals cannot be received: {error}"));
        Ok(Self {
            terminate: hear(SignalKind::terminate())?,
            interrupt: hear(SignalKind::interrupt())?,
            hang_up: hear(SignalKind::hangup())?,
            _ignored: [hear(SignalKind::user_defined1())?, hear(SignalKind::user_defined2())?, hear(SignalKind::from_raw(XFSZ))?],
        })
    }

    /// Waits until there is something to do.
    pub async fn next<T: Send + 'static>(&mut self, reading: &mut Reading<T>) -> Told<T> {
        loop {
            tokio::select! {
                biased;
                _ = self.terminate.recv() => return Told::End,
                _ = self.interrupt.recv() => return Told::End,
                _ = self.hang_up.recv() => reading.begin(),
                read = reading.done() => match read {
                    Ok(read) => return Told::Reload(read),
                    Err(why) => tracing::error!(why, "the configuration was not read again, and nothing changes"),
                },
            }
        }
    }

    /// Waits until the program is told to end: once more, if it is ending.
    pub async fn end(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// What was read, or why not, told in the log.
pub fn told<C>(read: Result<Loaded<C>, Problems>) -> Option<C> {
    match read {
        Ok(loaded) => Some(loaded.config),
        Err(problems) => {
            let problems = problems.to_string().replace('\n', "; ");
            tracing::error!(problems, "the configuration was not read again, and nothing changes");
            None
        }
    }
}

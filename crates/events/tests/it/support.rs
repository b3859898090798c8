//! A journal in memory, programs, and waiting.

use castier_config::EventSink;
use castier_events::{Event, Journal, JournalError, Kind, Running, start};
use prometheus::Registry;
use std::{
    collections::BTreeMap,
    env, io,
    io::Write as _,
    net::TcpListener,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant, SystemTime},
};
use tokio::sync::watch;

/// Turns a hang into a failure. It does not measure speed.
const DEADLINE: Duration = Duration::from_secs(180);

pub(crate) const DIGEST: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

/// A journal whose cursors can be lost, as in a crash, and which can fail.
#[derive(Default)]
pub(crate) struct Memory {
    events: Mutex<Vec<Vec<u8>>>,
    cursors: Mutex<BTreeMap<String, u64>>,
    appended: watch::Sender<u64>,
    pub(crate) broken: AtomicBool,
}

impl Memory {
    pub(crate) fn append(&self, count: usize) {
        self.append_kinds(&vec![Kind::Stored; count]);
    }

    pub(crate) fn append_kinds(&self, kinds: &[Kind]) {
        let mut events = self.events.lock().unwrap();
        for kind in kinds {
            let id = format!("node-{}", events.len() + 1);
            events.push(Event::new(*kind, DIGEST, Some(7), "node", Some("ci"), SystemTime::now(), &id).to_json());
        }
        self.appended.send_replace(events.len() as u64);
    }

    pub(crate) fn len(&self) -> usize {
        self.events.lock().unwrap().len()
    }

    pub(crate) fn at(&self, sink: &str) -> u64 {
        self.cursors.lock().unwrap().get(sink).copied().unwrap_or(0)
    }

    /// As after a crash before the last events were acknowledged durably.
    pub(crate) fn forget(&self, sink: &str, events: u64) {
        *self.cursors.lock().unwrap().get_mut(sink).unwrap() -= events;
    }

    fn check(&self) -> Result<(), JournalError> {
        if self.broken.load(Ordering::SeqCst) { Err(JournalError("input/output error".into())) } else { Ok(()) }
    }
}

impl Journal for Memory {
    fn read(&self, after: u64, most: usize) -> Result<Vec<(u64, Vec<u8>)>, JournalError> {
        self.check()?;
        let events = self.events.lock().unwrap();
        let from = usize::try_from(after).unwrap();
        Ok(events.iter().enumerate().skip(from).take(most).map(|(i, event)| (i as u64 + 1, event.clone())).collect())
    }

    fn cursor(&self, sink: &str) -> Result<u64, JournalError> {
        self.check()?;
        let end = self.len() as u64;
        Ok(*self.cursors.lock().unwrap().entry(sink.to_owned()).or_insert(end))
    }

    fn advance(&self, sink: &str, to: u64) -> Result<(), JournalError> {
        self.check()?;
        let before = self.cursors.lock().unwrap().insert(sink.to_owned(), to).unwrap();
        assert!(to > before, "the cursor only moves on");
        Ok(())
    }

    fn appended(&self) -> watch::Receiver<u64> {
        self.appended.subscribe()
    }
}

/// Dispatchers, their journal and their series.
pub(crate) struct Started {
    pub(crate) journal: Arc<Memory>,
    registry: Registry,
    running: Running,
}

pub(crate) fn begin(journal: &Arc<Memory>, sinks: &[EventSink]) -> Started {
    let registry = Registry::new();
    let running = start(sinks, &(journal.clone() as Arc<dyn Journal>), &registry).unwrap();
    Started { journal: journal.clone(), registry, running }
}

impl Started {
    pub(crate) fn series(&self, name: &str, sink: &str) -> f64 {
        let families = self.registry.gather();
        let family = families.iter().find(|family| family.name() == name).unwrap_or_else(|| panic!("no {name}"));
        let metric = family.get_metric().iter().find(|metric| metric.get_label()[0].value() == sink).unwrap();
        metric.get_counter().get_value() + metric.get_gauge().get_value()
    }

    pub(crate) fn failures(&self, sink: &str) -> f64 {
        self.series("castier_events_failures_total", sink)
    }

    /// Waits until the receiver has everything.
    pub(crate) async fn delivered(&self, sink: &str) {
        eventually(&format!("{sink} has everything"), async || self.journal.at(sink) == self.journal.len() as u64).await;
    }

    pub(crate) async fn stop(self) {
        let start = Instant::now();
        self.running.stop(Duration::from_secs(5)).await;
        assert!(start.elapsed() < Duration::from_secs(20), "the end has a bound");
    }
}

pub(crate) async fn eventually(what: &str, mut probe: impl AsyncFnMut() -> bool) {
    let start = Instant::now();
    while !probe().await {
        assert!(start.elapsed() < DEADLINE, "not within {DEADLINE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Says visibly that a test is left out. The harness would hold back what a test prints.
pub(crate) fn skip(reason: &str) {
    let test = thread::current().name().unwrap_or_default().to_owned();
    let _ = io::stderr().write_all(format!("SKIPPED: {test}: {reason}\n").as_bytes());
}

/// The program of that name, from what `scripts/setup-tests` installs or from the machine. None, after saying so, if there is none.
pub(crate) fn tool(name: &str) -> Option<PathBuf> {
    // target/release/deps/it-… is this program.
    let beside = || env::current_exe().unwrap().ancestors().nth(3).unwrap().join("test-tools");
    let tools = env::var_os("CASTIER_TEST_TOOLS").map_or_else(beside, PathBuf::from);
    let own = ["bin", "venv/bin"].map(|folder| tools.join(folder)).into_iter();
    let path = env::var_os("PATH").unwrap_or_default();
    let found = own
        .chain(env::split_paths(&path))
        .chain(["/usr/sbin".into()])
        .find_map(|folder| Some(folder.join(name)).filter(|file| file.is_file()));
    if found.is_none() {
        skip(&format!("{name} is not installed (scripts/setup-tests installs it)"));
    }
    found
}

/// A port of the loopback that is free now.
pub(crate) fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// What a receiver got must be every event, in order once repetitions are left out.
pub(crate) fn assert_complete(ids: &[String], count: usize) {
    let mut seen = std::collections::BTreeSet::new();
    let first: Vec<_> = ids.iter().filter(|id| seen.insert(id.as_str())).cloned().collect();
    let expected: Vec<_> = (1..=count).map(|number| format!("node-{number}")).collect();
    let differs = first.iter().zip(&expected).position(|(got, expected)| got != expected);
    assert_eq!((first.len(), differs), (count, None), "every event, in order");
}

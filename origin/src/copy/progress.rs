//! The figures of a copy: a bar on a terminal, else a line every few seconds; and what is said at the end.

use super::Outcome;
use castier_blob::Digest;
use castier_wire::entry::Name;
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use parking_lot::Mutex;
use std::{
    io::{IsTerminal as _, Write as _},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

/// How often a line is written if standard error is no terminal.
const LINE: Duration = Duration::from_secs(5);
/// How often the bar is drawn.
const DRAW: Duration = Duration::from_millis(250);
/// How many objects of others are named.
const NAMED: usize = 5;

/// A number of things, and their bytes.
#[derive(Default)]
struct Count {
    number: AtomicU64,
    bytes: AtomicU64,
}

impl Count {
    fn add(&self, bytes: u64) {
        self.number.fetch_add(1, Relaxed);
        self.bytes.fetch_add(bytes, Relaxed);
    }

    fn number(&self) -> u64 {
        self.number.load(Relaxed)
    }

    fn bytes(&self) -> u64 {
        self.bytes.load(Relaxed)
    }
}

fn add_one(count: &AtomicU64) {
    count.fetch_add(1, Relaxed);
}

/// What was found and done so far.
pub(super) struct Progress {
    bar: ProgressBar,
    is_dry: bool,
    expected: Count,
    expected_entries: AtomicU64,
    copied: Count,
    present: Count,
    copied_entries: AtomicU64,
    present_entries: AtomicU64,
    gone: AtomicU64,
    corrupt: AtomicU64,
    failed: AtomicU64,
    /// Bytes of blobs that are being copied.
    under_way: AtomicU64,
    others: AtomicU64,
    named: Mutex<Vec<String>>,
}

/// The bytes of one blob that is being copied.
pub(super) struct UnderWay {
    progress: Arc<Progress>,
    bytes: u64,
}

impl UnderWay {
    pub(super) fn add(&mut self, bytes: u64) {
        self.bytes += bytes;
        self.progress.under_way.fetch_add(bytes, Relaxed);
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.progress.under_way.fetch_sub(self.bytes, Relaxed);
    }
}

impl Progress {
    pub(super) fn new(is_dry: bool) -> Arc<Self> {
        let bar = ProgressBar::new(0);
        let bar = match ProgressStyle::with_template("{msg} {wide_bar} {percent:>3} % {elapsed}") {
            Ok(style) => bar.with_style(style),
            Err(_) => bar,
        };
        Arc::new(Self {
            bar,
            is_dry,
            expected: Count::default(),
            expected_entries: AtomicU64::default(),
            copied: Count::default(),
            present: Count::default(),
            copied_entries: AtomicU64::default(),
            present_entries: AtomicU64::default(),
            gone: AtomicU64::default(),
            corrupt: AtomicU64::default(),
            failed: AtomicU64::default(),
            under_way: AtomicU64::default(),
            others: AtomicU64::default(),
            named: Mutex::default(),
        })
    }

    pub(super) fn expect_blob(&self, size: u64) {
        self.expected.add(size);
    }

    pub(super) fn expect_entry(&self) {
        self.expected_entries.fetch_add(1, Relaxed);
    }

    pub(super) fn under_way(self: &Arc<Self>) -> UnderWay {
        UnderWay { progress: self.clone(), bytes: 0 }
    }

    pub(super) fn blob(&self, digest: &Digest, size: u64, outcome: &Outcome) {
        match outcome {
            Outcome::Copied => self.copied.add(size),
            Outcome::Present => self.present.add(size),
            _ => self.note(&format!("blob {digest}"), outcome),
        }
    }

    pub(super) fn entry(&self, name: &Name, outcome: &Outcome) {
        match outcome {
            Outcome::Copied => add_one(&self.copied_entries),
            Outcome::Present => add_one(&self.present_entries),
            _ => self.note(&format!("entry {name}"), outcome),
        }
    }

    fn note(&self, what: &str, outcome: &Outcome) {
        match outcome {
            Outcome::Copied | Outcome::Present => {}
            Outcome::Gone => add_one(&self.gone),
            Outcome::Corrupt(why) => self.corrupt(what, why),
            Outcome::Failed(why) => self.failed(what, why),
        }
    }

    /// The source has wrong bytes.
    pub(super) fn corrupt(&self, what: &str, why: &str) {
        self.corrupt.fetch_add(1, Relaxed);
        self.say(&format!("{what}: corrupt at the source, not copied: {why}"));
    }

    pub(super) fn failed(&self, what: &str, why: &str) {
        self.failed.fetch_add(1, Relaxed);
        self.say(&format!("{what}: not copied: {why}"));
    }

    /// What is neither a blob nor an entry.
    pub(super) fn other(&self, what: String) {
        self.others.fetch_add(1, Relaxed);
        let mut named = self.named.lock();
        if named.len() < NAMED {
            named.push(what);
        }
    }

    /// Writes a line above the bar.
    fn say(&self, line: &str) {
        // Keys and names are others' text.
        let line: String = line.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
        self.bar.suspend(|| eprintln!("castier-origin copy: {line}"));
    }

    /// Shows the figures until it is dropped.
    pub(super) async fn show(self: Arc<Self>) {
        let is_terminal = std::io::stderr().is_terminal();
        let mut ticks = tokio::time::interval(if is_terminal { DRAW } else { LINE });
        ticks.tick().await;
        loop {
            ticks.tick().await;
            let done = self.copied.bytes() + self.present.bytes();
            let moved = done + self.under_way.load(Relaxed);
            if is_terminal {
                self.bar.set_length(self.expected.bytes().max(moved));
                self.bar.set_position(moved);
                self.bar.set_message(self.figures());
            } else {
                eprintln!(
                    "castier-origin copy: {} of {}: {}",
                    HumanBytes(moved),
                    HumanBytes(self.expected.bytes().max(moved)),
                    self.figures()
                );
            }
        }
    }

    fn figures(&self) -> String {
        let blobs = self.copied.number() + self.present.number();
        let entries = self.copied_entries.load(Relaxed) + self.present_entries.load(Relaxed);
        let all_entries = self.expected_entries.load(Relaxed).max(entries);
        let mut text = format!("{blobs} of {} blobs", self.expected.number().max(blobs));
        if entries > 0 {
            text += &format!(", {entries} of {all_entries} entries");
        }
        text
    }

    /// Says how it went. Returns whether everything is at the destination.
    pub(super) fn finish(&self, ended: Result<(), String>) -> bool {
        self.bar.finish_and_clear();
        let load = |count: &AtomicU64| count.load(Relaxed);
        let (corrupt, failed, others) = (load(&self.corrupt), load(&self.failed), load(&self.others));
        let found = self.copied.number() + self.present.number() + load(&self.copied_entries) + load(&self.present_entries);
        let mut lines = vec![format!(
            "{} {} blobs ({}) and {} entries; there already: {} blobs ({}) and {} entries",
            if self.is_dry { "would copy" } else { "copied" },
            self.copied.number(),
            HumanBytes(self.copied.bytes()),
            load(&self.copied_entries),
            self.present.number(),
            HumanBytes(self.present.bytes()),
            load(&self.present_entries),
        )];
        if load(&self.gone) > 0 {
            lines.push(format!("deleted at the source meanwhile: {}", load(&self.gone)));
        }
        if corrupt + failed > 0 {
            lines.push(format!("not copied: {corrupt} corrupt at the source, {failed} for other reasons; see above"));
        }
        if others > 0 {
            let named = self.named.lock().iter().map(|name| format!("{name:?}")).collect::<Vec<_>>().join(", ");
            let more = if others > NAMED as u64 { ", …" } else { "" };
            lines.push(format!("neither blobs nor entries, left alone: {others} ({named}{more})"));
        }
        // A closed standard output must not end the program.
        writeln!(std::io::stdout(), "{}", lines.join("\n")).ok();
        let is_empty = found + corrupt + failed == 0 && others > 0;
        match ended {
            Err(why) => self.say(&why),
            Ok(()) if is_empty => {
                self.say("FROM has no blob and no entry; is it the root of a store (store.root), and are prefix and store.key right?")
            }
            Ok(()) => return corrupt + failed == 0,
        }
        false
    }
}

//! Helpers of all tests: a scripted origin, a raw client, real processes, the ledger.

pub(crate) mod blob;
pub(crate) mod client;
pub(crate) mod cluster;
pub(crate) mod disk;
pub(crate) mod group;
pub(crate) mod hang;
pub(crate) mod http2;
pub(crate) mod lie;
pub(crate) mod log;
pub(crate) mod mute;
pub(crate) mod origin;
pub(crate) mod process;
pub(crate) mod proof;
pub(crate) mod raw;
pub(crate) mod route;
pub(crate) mod stats;
pub(crate) mod wire;

pub(crate) use blob::Blob;
pub(crate) use client::{Conn, Download, Reply, Request, get};
pub(crate) use cluster::Cluster;
pub(crate) use disk::{Cache, assert_hit};
pub(crate) use group::MemoryGroup;
pub(crate) use lie::{Gate, Lie};
pub(crate) use mute::MuteOrigin;
pub(crate) use origin::LyingOrigin;
pub(crate) use process::{Castier, RealOrigin};
pub(crate) use raw::RawOrigin;
pub(crate) use route::RouteUpstream;
pub(crate) use stats::{assert_ledger, metrics, stats};

use std::{
    io::Write,
    sync::{Once, mpsc},
    thread,
    time::{Duration, Instant},
};
use tokio::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

/// The default deadline. It is generous: it turns a hang into a failure, and does not measure speed.
pub(crate) const DEADLINE: Duration = Duration::from_secs(120);

pub(crate) const KIB: u64 = 1024;
pub(crate) const MIB: u64 = 1024 * KIB;
/// The bytes that castier holds back from every streamed response until the blob is verified.
pub(crate) const HELD_BACK: u64 = 64 * KIB;

static TURN: RwLock<()> = RwLock::const_new(());

/// The right to run a test. A test that holds it for too long ends the whole run, since other tests would wait for it for ever.
pub(crate) struct Turn<T> {
    _turn: T,
    _alarm: mpsc::Sender<()>,
}

/// The longest time to hold it: several times the longest test on two busy cores.
const LONGEST_TURN: Duration = Duration::from_secs(900);

impl<T> Turn<T> {
    fn new(turn: T) -> Self {
        static ONCE: Once = Once::new();
        ONCE.call_once(|| {
            // Report a failure at once: the harness reports it only when the test ends, which it may never do.
            let usual = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                uncaptured(&format!("{:?}: {panic}\n", thread::current().name()));
                usual(panic);
            }));
        });
        let (alarm, ended) = mpsc::channel::<()>();
        let test = thread::current().name().unwrap_or_default().to_owned();
        thread::spawn(move || {
            if ended.recv_timeout(LONGEST_TURN) == Err(mpsc::RecvTimeoutError::Timeout) {
                uncaptured(&format!("{test} has not ended within {LONGEST_TURN:?}: the run is given up\n"));
                std::process::abort();
            }
        });
        Self { _turn: turn, _alarm: alarm }
    }
}

/// Prints directly, since the harness holds back a test's output until the test has ended.
fn uncaptured(text: &str) {
    let _ = std::io::stderr().write_all(text.as_bytes());
}

/// For a test that can run in parallel with others.
pub(crate) async fn light() -> Turn<RwLockReadGuard<'static, ()>> {
    Turn::new(TURN.read().await)
}

/// For a test that must run alone: many clients or many bytes.
pub(crate) async fn heavy() -> Turn<RwLockWriteGuard<'static, ()>> {
    Turn::new(TURN.write().await)
}

/// Polls until there is a value. Panics after the deadline.
pub(crate) async fn eventually<T>(what: &str, mut probe: impl AsyncFnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(answer) = probe().await {
            return answer;
        }
        assert!(start.elapsed() < DEADLINE, "not within {DEADLINE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Awaits a future. Panics after the deadline.
pub(crate) async fn within<T>(limit: Duration, what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(limit, future).await.unwrap_or_else(|_| panic!("not within {limit:?}: {what}"))
}

/// A small random generator with a seed (SplitMix64).
pub(crate) struct Random(u64);

impl Random {
    /// Takes the seed from the environment to repeat a run, else from the clock. Prints it.
    pub(crate) fn seeded() -> Self {
        let clock = || std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
        let seed = std::env::var("TEST_SEED").ok().map_or_else(clock, |text| text.parse().expect("TEST_SEED is a number"));
        println!("TEST_SEED={seed}");
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// An independent generator.
    pub(crate) fn fork(&mut self) -> Self {
        Self(self.next())
    }

    /// A random number below `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

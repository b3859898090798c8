//! Threads for work on files. A file system can hang: a call then neither fails nor returns, and nothing ends the thread that is in it.
//! So each use has threads of its own, few enough that all of them may be lost, and who waits for them has a deadline.
//!
//! States: a pool is *well* until work takes longer than its time-out. Then it *hangs*: work is refused at once, for the length of the
//! cool-down. After that one piece of work is let through, and its end decides: in time, and the pool is well; late, and it hangs for another
//! cool-down. Threads that are stuck stay stuck, and are never replaced beyond the limit. If all are stuck, all work is refused.
//!
//! Invariants:
//! - No async thread waits for a file system. It does not close files either: closing waits for the file system as well, see
//!   [`Pool::dispose`].
//! - Work that nobody waits for any more is dropped before it begins, on a thread of the pool.

use parking_lot::{Condvar, Mutex};
use std::{
    cell::Cell,
    collections::VecDeque,
    fs::File,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};
use tokio::sync::oneshot;

/// How much work may wait for a thread. A piece of work is a few hundred bytes, or holds a batch of bytes that has a budget of its own.
const QUEUE: usize = 4096;
/// How long a thread without work stays: long enough for the next burst.
const IDLE: Duration = Duration::from_secs(10);

thread_local! {
    /// This thread may wait for a file system.
    static MAY_WAIT: Cell<bool> = const { Cell::new(false) };
}

/// Says that the current thread serves nobody who cannot wait, so that files may be closed on it.
pub(crate) fn may_wait_here() {
    MAY_WAIT.set(true);
}

/// Why work was not done, or not in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Undone {
    /// It was not begun: the pool hangs, or too much waits already.
    #[error("the file system does not answer, or is overloaded")]
    Busy,
    /// It has not ended in time. It may still end.
    #[error("the file system does not answer in time")]
    Late,
    /// It panicked.
    #[error("the work panicked")]
    Panicked,
}

/// What became of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// It hangs from now on.
    Hangs,
    /// It is well again.
    Well,
}

/// Some threads. A handle: clones are the same pool.
#[derive(Clone)]
pub struct Pool(Arc<Shared>);

struct Shared {
    name: &'static str,
    /// The most threads.
    most: usize,
    timeout: Duration,
    cooldown: Duration,
    state: Mutex<State>,
    /// There is work, for one thread that waits.
    work: Condvar,
    /// Told of each turn, once.
    tell: Box<dyn Fn(Turn) + Send + Sync>,
}

struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    /// Threads that wait for work.
    idle: usize,
    /// Work that goes on; a free place is none.
    running: Vec<Option<Running>>,
    hang: Option<Hang>,
}

type Job = Box<dyn FnOnce() + Send>;

#[derive(Clone, Copy)]
struct Running {
    since: Instant,
    /// It is late, and the pool has turned for it. After a recovery it does not count again.
    late: bool,
}

#[derive(Clone, Copy)]
struct Hang {
    /// When it was found.
    since: Instant,
    /// When work is tried again.
    until: Instant,
}

impl Pool {
    /// A pool of up to `most` threads, which are started as they are needed.
    pub fn new(
        name: &'static str,
        most: usize,
        timeout: Duration,
        cooldown: Duration,
        tell: impl Fn(Turn) + Send + Sync + 'static,
    ) -> Self {
        let state = State { jobs: VecDeque::new(), threads: 0, idle: 0, running: Vec::new(), hang: None };
        Self(Arc::new(Shared {
            name,
            most: most.max(1),
            timeout,
            cooldown,
            state: Mutex::new(state),
            work: Condvar::new(),
            tell: Box::new(tell),
        }))
    }

    /// Whether work would be tried now.
    pub fn is_usable(&self) -> bool {
        let now = Instant::now();
        let (usable, turn) = {
            let mut state = self.0.state.lock();
            let turn = self.0.look_for_late_work(&mut state, now);
            (state.hang.is_none_or(|hang| now >= hang.until) && state.late() < self.0.most, turn)
        };
        self.0.told(turn);
        usable
    }

    /// Begins work at once, whether or not the future is awaited. The future ends within the time-out, whatever becomes of the work. Dropped
    /// before a thread has taken up the work, it takes the work with it.
    ///
    /// # Errors
    /// See [`Undone`].
    pub fn run<T: Send + 'static, W: FnOnce() -> T + Send + 'static>(
        &self,
        work: W,
    ) -> impl Future<Output = Result<T, Undone>> + Send + use<T, W> {
        let (answer, end) = oneshot::channel();
        let begun = self.submit(Box::new(move || {
            if !answer.is_closed() {
                answer.send(work()).ok();
            }
        }));
        let shared = self.0.clone();
        let deadline = tokio::time::Instant::now() + shared.timeout;
        async move {
            begun?;
            match tokio::time::timeout_at(deadline, end).await {
                Ok(done) => done.map_err(|_| Undone::Panicked),
                Err(_) => {
                    shared.hang();
                    Err(Undone::Late)
                }
            }
        }
    }

    /// As [`Self::run`], for a thread that may wait.
    ///
    /// # Errors
    /// See [`Undone`].
    pub fn run_here<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T, Undone> {
        let (answer, end) = std::sync::mpsc::sync_channel(1);
        self.submit(Box::new(move || drop(answer.send(work()))))?;
        end.recv_timeout(self.0.timeout).map_err(|error| match error {
            std::sync::mpsc::RecvTimeoutError::Disconnected => Undone::Panicked,
            std::sync::mpsc::RecvTimeoutError::Timeout => {
                self.0.hang();
                Undone::Late
            }
        })
    }

    /// Does work on the current thread, which may wait, and notices if that takes too long.
    pub fn watch<T>(&self, work: impl FnOnce() -> T) -> T {
        let place = self.0.state.lock().begin();
        let done = work();
        self.0.end(place);
        done
    }

    /// Has work done that must be done some day, however long that takes: it is never refused. Nobody hears of its end.
    pub fn insist(&self, work: impl FnOnce() + Send + 'static) {
        let mut state = self.0.state.lock();
        state.jobs.push_back(Box::new(work));
        self.0.wake(&mut state);
    }

    /// Drops what holds files, on a thread that may wait for the file system to close them.
    pub fn dispose<T: Send + 'static>(&self, files: T) {
        if MAY_WAIT.get() {
            return drop(files);
        }
        self.insist(move || drop(files));
    }

    fn submit(&self, job: Job) -> Result<(), Undone> {
        let now = Instant::now();
        let mut state = self.0.state.lock();
        let turn = self.0.look_for_late_work(&mut state, now);
        let waits = state.hang.is_some_and(|hang| now < hang.until);
        let mut refused = waits || state.late() >= self.0.most || state.jobs.len() >= QUEUE;
        if !refused {
            if let Some(hang) = &mut state.hang {
                // This one finds out whether the file system answers again. The others wait for what it finds.
                hang.until = now + self.0.cooldown;
            }
            state.jobs.push_back(job);
            self.0.wake(&mut state);
            if state.threads == 0 {
                // The system gives no thread at all.
                refused = state.jobs.pop_back().is_some();
            }
        }
        drop(state);
        self.0.told(turn);
        if refused { Err(Undone::Busy) } else { Ok(()) }
    }
}

impl State {
    /// Notes that work goes on. Where it is noted.
    fn begin(&mut self) -> usize {
        let running = Some(Running { since: Instant::now(), late: false });
        let place = self.running.iter().position(Option::is_none).unwrap_or(self.running.len());
        if place == self.running.len() {
            self.running.push(running);
        } else {
            self.running[place] = running;
        }
        place
    }

    /// How much work is stuck.
    fn late(&self) -> usize {
        self.running.iter().flatten().filter(|running| running.late).count()
    }
}

impl Shared {
    /// Sees to it that a thread takes up what waits.
    fn wake(self: &Arc<Self>, state: &mut State) {
        // A thread that is told of work is idle until it wakes.
        if state.jobs.len() <= state.idle || state.threads >= self.most {
            self.work.notify_one();
        } else {
            let shared = self.clone();
            // Where there is no thread to be had, those that are there do the work.
            if thread::Builder::new().name(self.name.to_owned()).spawn(move || shared.serve()).is_ok() {
                state.threads += 1;
            }
        }
    }

    /// What a thread does.
    fn serve(self: Arc<Self>) {
        may_wait_here();
        let mut state = self.state.lock();
        loop {
            let Some(job) = state.jobs.pop_front() else {
                state.idle += 1;
                let idle = self.work.wait_for(&mut state, IDLE).timed_out();
                state.idle -= 1;
                if idle && state.jobs.is_empty() {
                    state.threads -= 1;
                    return;
                }
                continue;
            };
            let place = state.begin();
            drop(state);
            // A panic is told where it happens, and to who waits by the answer that does not come.
            catch_unwind(AssertUnwindSafe(job)).ok();
            self.end(place);
            state = self.state.lock();
        }
    }

    /// Notes that work has ended.
    fn end(&self, place: usize) {
        let now = Instant::now();
        let recovered = {
            let mut state = self.state.lock();
            let running = state.running[place].take();
            // What began before the hang was found says nothing of the file system as it is now.
            let proves = |hang: &Hang| {
                running.is_some_and(|running| running.since >= hang.since && now.duration_since(running.since) < self.timeout)
            };
            let recovered = state.hang.as_ref().is_some_and(proves);
            if recovered {
                state.hang = None;
            }
            recovered
        };
        self.told(recovered.then_some(Turn::Well));
    }

    /// Somebody has waited for too long.
    fn hang(&self) {
        let turn = self.turn(&mut self.state.lock(), Instant::now());
        self.told(turn);
    }

    /// Finds work that is late though nobody waits for it any more: clients may be less patient than this pool.
    fn look_for_late_work(&self, state: &mut State, now: Instant) -> Option<Turn> {
        let late = |running: &Running| !running.late && now.duration_since(running.since) > self.timeout;
        if state.running.iter().flatten().any(late) { self.turn(state, now) } else { None }
    }

    fn turn(&self, state: &mut State, now: Instant) -> Option<Turn> {
        for running in state.running.iter_mut().flatten() {
            running.late |= now.duration_since(running.since) >= self.timeout;
        }
        let since = state.hang.map(|hang| hang.since);
        state.hang = Some(Hang { since: now, until: now + self.cooldown });
        since.is_none().then_some(Turn::Hangs)
    }

    fn told(&self, turn: Option<Turn>) {
        if let Some(turn) = turn {
            (self.tell)(turn);
        }
    }
}

/// A file that is closed where that may take its time. Shared by all who read it.
pub struct SharedFile {
    /// None only while it is dropped.
    file: Option<File>,
    /// What a file system in memory has is always there; others are asked each time. Found out when the file was opened, since the
    /// question is one that a file system can hang on.
    in_memory: bool,
    pool: Pool,
}

impl SharedFile {
    /// Takes over a file. Blocks.
    pub fn new(file: File, pool: Pool) -> Self {
        Self { in_memory: is_in_memory(&file), file: Some(file), pool }
    }

    /// The file.
    ///
    /// # Errors
    /// Never while it can be called.
    pub fn get(&self) -> io::Result<&File> {
        self.file.as_ref().ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    /// Whether reading it never waits.
    pub const fn is_in_memory(&self) -> bool {
        self.in_memory
    }

    /// Where work on it is done.
    pub const fn pool(&self) -> &Pool {
        &self.pool
    }
}

impl Drop for SharedFile {
    fn drop(&mut self) {
        if let Some(file) = self.file.take() {
            self.pool.dispose(file);
        }
    }
}

/// What Linux calls a tmpfs in `statfs`; see statfs(2).
const TMPFS: rustix::fs::FsWord = 0x0102_1994;

fn is_in_memory(file: &File) -> bool {
    rustix::fs::fstatfs(file).is_ok_and(|system| system.f_type == TMPFS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{
        atomic::{AtomicUsize, Ordering},
        mpsc::{Receiver, Sender, channel},
    };

    type Turns = Arc<Mutex<Vec<Turn>>>;

    /// A pool, its turns, and what holds work that hangs until it is dropped.
    fn pool(most: usize, timeout: u64, cooldown: u64) -> (Pool, Turns, Sender<()>, Arc<Mutex<Receiver<()>>>) {
        let turns = Arc::new(Mutex::new(Vec::new()));
        let told = turns.clone();
        let (timeout, cooldown) = (Duration::from_millis(timeout), Duration::from_millis(cooldown));
        let (hold, held) = channel();
        (Pool::new("test", most, timeout, cooldown, move |turn| told.lock().push(turn)), turns, hold, Arc::new(Mutex::new(held)))
    }

    #[tokio::test]
    async fn work_is_done_by_few_threads() {
        let (pool, turns, ..) = pool(3, 60_000, 60_000);
        let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let work = (0..500).map(|n| {
            let (now, most) = (now.clone(), most.clone());
            pool.run(move || {
                most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                thread::yield_now();
                now.fetch_sub(1, Ordering::SeqCst);
                n
            })
        });
        let work: Vec<_> = work.collect();
        for (n, work) in work.into_iter().enumerate() {
            assert_eq!(work.await, Ok(n));
        }
        assert!((1..=3).contains(&most.load(Ordering::SeqCst)));
        assert_eq!(pool.run(|| panic!("as it must")).await, Err::<(), _>(Undone::Panicked));
        assert_eq!(pool.run(|| 7).await, Ok(7), "a panic costs no thread");
        assert!(turns.lock().is_empty());
    }

    #[tokio::test]
    async fn what_hangs_is_left_and_nothing_waits_for_it() {
        let (pool, turns, hold, held) = pool(2, 50, 200);
        let stuck = held.clone();
        assert_eq!(
            pool.run(move || {
                stuck.lock().recv().ok();
            })
            .await,
            Err(Undone::Late)
        );
        // Refused at once, for a while.
        let begun = Instant::now();
        assert_eq!(pool.run(|| ()).await, Err(Undone::Busy));
        assert!(!pool.is_usable() && begun.elapsed() < Duration::from_millis(50));
        // Then one is let through, and the pool is well: the other thread is still there.
        while !pool.is_usable() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(pool.run(|| 1).await, Ok(1));
        while turns.lock().len() < 2 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(*turns.lock(), [Turn::Hangs, Turn::Well]);
        assert_eq!(pool.run(|| 2).await, Ok(2), "what is stuck does not count twice");
        // With all threads stuck there is no cool-down to wait for.
        let stuck = held.clone();
        assert_eq!(
            pool.run(move || {
                stuck.lock().recv().ok();
            })
            .await,
            Err(Undone::Late)
        );
        tokio::time::sleep(Duration::from_millis(250)).await;
        assert!(!pool.is_usable());
        assert_eq!(pool.run(|| ()).await, Err(Undone::Busy));
        drop(hold);
        while !pool.is_usable() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(pool.run(|| 3).await, Ok(3));
    }

    #[tokio::test]
    async fn who_waits_less_than_the_time_out_does_not_hide_a_hang() {
        let (pool, turns, _hold, held) = pool(4, 50, 60_000);
        drop(pool.run(move || {
            held.lock().recv().ok();
        }));
        tokio::time::sleep(Duration::from_millis(20)).await;
        // Begun or not when its future was dropped: if it was, it is found out.
        let begun = pool.0.state.lock().running.iter().flatten().count() > 0;
        tokio::time::sleep(Duration::from_millis(60)).await;
        assert_eq!(pool.is_usable(), !begun);
        assert_eq!(turns.lock().len(), usize::from(begun));
    }

    #[tokio::test]
    async fn files_are_closed_elsewhere() {
        struct Tell(Sender<bool>);
        impl Drop for Tell {
            fn drop(&mut self) {
                self.0.send(MAY_WAIT.get()).ok();
            }
        }
        let (pool, _turns, ..) = pool(1, 60_000, 60_000);
        let (told, closed) = channel();
        pool.dispose(Tell(told.clone()));
        assert_eq!(closed.recv_timeout(Duration::from_secs(10)), Ok(true));
        let inner = pool.clone();
        pool.run(move || inner.dispose(Tell(told))).await.unwrap();
        assert_eq!(closed.recv_timeout(Duration::from_secs(10)), Ok(true));
    }
}

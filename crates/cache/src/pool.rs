//! Thread pools for work on files.
//!
//! A file system can hang: a system call neither fails nor returns, and nothing can end its thread. So each use has a pool of its own, with
//! so few threads that all of them may be lost, and every caller has a deadline.
//!
//! A pool works as a circuit breaker:
//! 1. It is *well* until one piece of work takes longer than the timeout.
//! 2. Then it *hangs*: for the cool-down it refuses all work at once.
//! 3. After the cool-down it accepts one piece of work. If that ends in time, the pool is well again. If not, it hangs for another
//!    cool-down.
//!
//! A stuck thread is never replaced beyond the limit of threads. If all threads are stuck, the pool refuses all work.
//!
//! Invariants:
//! - No async thread waits for a file system. It does not close files either, since closing may block too; see [`Pool::dispose`].
//! - If the caller drops the future before the work starts, the work is dropped, on a thread of the pool.

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

/// The most jobs in the queue. A job takes a few hundred bytes; the data that it writes counts against another budget.
const QUEUE: usize = 4096;
/// A thread ends after this time without work. Long enough to stay for the next burst.
const IDLE: Duration = Duration::from_secs(10);

thread_local! {
    static MAY_BLOCK: Cell<bool> = const { Cell::new(false) };
}

/// Marks the current thread as one that may block on a file system, so that [`Pool::dispose`] closes files on it.
pub(crate) fn may_block_here() {
    MAY_BLOCK.set(true);
}

/// Why work was not done, or not in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PoolError {
    /// Not started: the pool hangs, or its queue is full.
    #[error("the file system does not answer, or is overloaded")]
    Busy,
    /// Not finished within the timeout. It may still finish.
    #[error("the file system does not answer in time")]
    TimedOut,
    /// The work panicked.
    #[error("the work panicked")]
    Panicked,
}

/// A change of a pool's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PoolEvent {
    /// The pool hangs.
    Hangs,
    /// The pool is well again.
    Recovered,
}

/// A handle on a pool of threads. Clones share the pool.
#[derive(Clone)]
pub struct Pool(Arc<Shared>);

struct Shared {
    name: &'static str,
    max_threads: usize,
    timeout: Duration,
    cooldown: Duration,
    state: Mutex<PoolState>,
    /// Wakes one idle thread.
    work: Condvar,
    /// Called once for each change of the state.
    notify: Box<dyn Fn(PoolEvent) + Send + Sync>,
}

struct PoolState {
    jobs: VecDeque<Job>,
    threads: usize,
    /// Threads without work.
    idle: usize,
    /// Jobs that are running. A free slot is `None`.
    running: Vec<Option<Running>>,
    hang: Option<Hang>,
}

/// Work on a thread of the pool. Returns whether it did anything: not if its caller had left before.
type Job = Box<dyn FnOnce() -> bool + Send>;

#[derive(Clone, Copy)]
struct Running {
    since: Instant,
    /// It exceeded the timeout, and the pool has hung because of it. It does not make the pool hang a second time.
    late: bool,
}

#[derive(Clone, Copy)]
struct Hang {
    /// When the pool noticed it.
    since: Instant,
    /// The end of the cool-down.
    until: Instant,
}

impl Pool {
    /// A pool of up to `max_threads` threads with this name. It starts threads when it needs them, and calls `notify` once for each change
    /// of its state.
    pub fn new(
        name: &'static str,
        max_threads: usize,
        timeout: Duration,
        cooldown: Duration,
        notify: impl Fn(PoolEvent) + Send + Sync + 'static,
    ) -> Self {
        let state = PoolState { jobs: VecDeque::new(), threads: 0, idle: 0, running: Vec::new(), hang: None };
        Self(Arc::new(Shared {
            name,
            max_threads: max_threads.max(1),
            timeout,
            cooldown,
            state: Mutex::new(state),
            work: Condvar::new(),
            notify: Box::new(notify),
        }))
    }

    /// Whether the pool accepts work now.
    pub fn is_usable(&self) -> bool {
        let now = Instant::now();
        let (usable, event) = {
            let mut state = self.0.state.lock();
            let event = self.0.find_late_jobs(&mut state, now);
            (state.hang.is_none_or(|hang| now >= hang.until) && state.late() < self.0.max_threads, event)
        };
        self.0.report(event);
        usable
    }

    /// Submits work at once, even if the future is not polled. The future ends within the timeout. If it is dropped before the work starts,
    /// the work is dropped too.
    ///
    /// # Errors
    /// See [`PoolError`].
    pub fn run<T: Send + 'static, W: FnOnce() -> T + Send + 'static>(
        &self,
        work: W,
    ) -> impl Future<Output = Result<T, PoolError>> + Send + use<T, W> {
        let (answer, end) = oneshot::channel();
        let begun = self.submit(Box::new(move || {
            let wanted = !answer.is_closed();
            if wanted {
                answer.send(work()).ok();
            }
            wanted
        }));
        let shared = self.0.clone();
        let deadline = tokio::time::Instant::now() + shared.timeout;
        async move {
            begun?;
            match tokio::time::timeout_at(deadline, end).await {
                Ok(done) => done.map_err(|_| PoolError::Panicked),
                Err(_) => {
                    shared.hang();
                    Err(PoolError::TimedOut)
                }
            }
        }
    }

    /// As [`Self::run`], and blocks the calling thread until the work is done.
    ///
    /// # Errors
    /// See [`PoolError`].
    pub fn run_here<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T, PoolError> {
        let (answer, end) = std::sync::mpsc::sync_channel(1);
        self.submit(Box::new(move || {
            answer.send(work()).ok();
            true
        }))?;
        end.recv_timeout(self.0.timeout).map_err(|error| match error {
            std::sync::mpsc::RecvTimeoutError::Disconnected => PoolError::Panicked,
            std::sync::mpsc::RecvTimeoutError::Timeout => {
                self.0.hang();
                PoolError::TimedOut
            }
        })
    }

    /// Does work on the calling thread, which may block. If it takes longer than the timeout, the pool hangs.
    pub fn watch<T>(&self, work: impl FnOnce() -> T) -> T {
        let slot = self.0.state.lock().begin();
        let done = work();
        self.0.end(slot, true);
        done
    }

    /// Submits work that must happen, even if the pool hangs. The pool never refuses it, and nobody learns of its end.
    pub fn run_detached(&self, work: impl FnOnce() + Send + 'static) {
        let mut state = self.0.state.lock();
        state.jobs.push_back(Box::new(|| {
            work();
            true
        }));
        self.0.wake(&mut state);
    }

    /// Drops `files` on a thread that may block, since closing and deleting files may block.
    pub fn dispose<T: Send + 'static>(&self, files: T) {
        if MAY_BLOCK.get() {
            return drop(files);
        }
        self.run_detached(move || drop(files));
    }

    fn submit(&self, job: Job) -> Result<(), PoolError> {
        let now = Instant::now();
        let mut state = self.0.state.lock();
        let event = self.0.find_late_jobs(&mut state, now);
        let cooling_down = state.hang.is_some_and(|hang| now < hang.until);
        let mut refused = cooling_down || state.late() >= self.0.max_threads || state.jobs.len() >= QUEUE;
        if !refused {
            if let Some(hang) = &mut state.hang {
                // This job tests whether the file system answers again. Refuse others until it ends.
                hang.until = now + self.0.cooldown;
            }
            state.jobs.push_back(job);
            self.0.wake(&mut state);
            if state.threads == 0 {
                // The system did not start a thread.
                refused = state.jobs.pop_back().is_some();
            }
        }
        drop(state);
        self.0.report(event);
        if refused { Err(PoolError::Busy) } else { Ok(()) }
    }
}

impl PoolState {
    /// Records that a job starts. Returns its slot.
    fn begin(&mut self) -> usize {
        let running = Some(Running { since: Instant::now(), late: false });
        let slot = self.running.iter().position(Option::is_none).unwrap_or(self.running.len());
        if slot == self.running.len() {
            self.running.push(running);
        } else {
            self.running[slot] = running;
        }
        slot
    }

    /// The number of stuck jobs.
    fn late(&self) -> usize {
        self.running.iter().flatten().filter(|running| running.late).count()
    }
}

impl Shared {
    /// Wakes an idle thread, or starts a new one.
    fn wake(self: &Arc<Self>, state: &mut PoolState) {
        // A notified thread counts as idle until it runs, so compare with the number of jobs.
        if state.jobs.len() <= state.idle || state.threads >= self.max_threads {
            self.work.notify_one();
        } else {
            let shared = self.clone();
            // If the system does not start a thread, the existing ones do the work.
            if thread::Builder::new().name(self.name.to_owned()).spawn(move || shared.serve()).is_ok() {
                state.threads += 1;
            }
        }
    }

    /// The main function of a thread.
    fn serve(self: Arc<Self>) {
        may_block_here();
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
            let slot = state.begin();
            drop(state);
            // The panic hook logs a panic. The caller gets `PoolError::Panicked`, since its channel closes without an answer.
            let worked = catch_unwind(AssertUnwindSafe(job)).unwrap_or(true);
            self.end(slot, worked);
            state = self.state.lock();
        }
    }

    /// Records that a job has ended. If it `worked`, on the file system, and in time, the file system answers.
    fn end(&self, slot: usize, worked: bool) {
        let now = Instant::now();
        let recovered = {
            let mut state = self.state.lock();
            let running = state.running[slot].take();
            // A job that started before the hang was noticed does not prove that the file system answers again.
            let proves = |hang: &Hang| {
                worked && running.is_some_and(|running| running.since >= hang.since && now.duration_since(running.since) < self.timeout)
            };
            let recovered = state.hang.as_ref().is_some_and(proves);
            if recovered {
                state.hang = None;
            }
            recovered
        };
        self.report(recovered.then_some(PoolEvent::Recovered));
    }

    /// A caller has waited for the whole timeout.
    fn hang(&self) {
        let event = self.start_hang(&mut self.state.lock(), Instant::now());
        self.report(event);
    }

    /// Finds late jobs whose callers have left before the timeout. Nobody else would notice that those jobs hang.
    fn find_late_jobs(&self, state: &mut PoolState, now: Instant) -> Option<PoolEvent> {
        let late = |running: &Running| !running.late && now.duration_since(running.since) > self.timeout;
        if state.running.iter().flatten().any(late) { self.start_hang(state, now) } else { None }
    }

    /// Makes the pool hang, or renews the cool-down. Returns the change, if there is one.
    fn start_hang(&self, state: &mut PoolState, now: Instant) -> Option<PoolEvent> {
        for running in state.running.iter_mut().flatten() {
            running.late |= now.duration_since(running.since) >= self.timeout;
        }
        let since = state.hang.map(|hang| hang.since);
        state.hang = Some(Hang { since: now, until: now + self.cooldown });
        since.is_none().then_some(PoolEvent::Hangs)
    }

    fn report(&self, event: Option<PoolEvent>) {
        if let Some(event) = event {
            (self.notify)(event);
        }
    }
}

/// An open file that a pool's thread closes.
pub struct SharedFile {
    /// `None` only during drop.
    file: Option<File>,
    /// The file is on a tmpfs, so reading it never waits. Asked once when the file is opened, since `fstatfs` can hang.
    in_memory: bool,
    pool: Pool,
}

impl SharedFile {
    /// Takes over a file. Calls `fstatfs`, and so may block.
    pub fn new(file: File, pool: Pool) -> Self {
        Self { in_memory: is_in_memory(&file), file: Some(file), pool }
    }

    /// The file.
    ///
    /// # Errors
    /// Never: the file is missing only during drop.
    pub fn get(&self) -> io::Result<&File> {
        self.file.as_ref().ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    /// Whether the file is on a tmpfs, so that reading it never waits.
    pub const fn is_in_memory(&self) -> bool {
        self.in_memory
    }

    /// The pool for work on this file.
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

/// `TMPFS_MAGIC` of statfs(2).
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

    type Events = Arc<Mutex<Vec<PoolEvent>>>;

    /// A pool; its changes of state; a sender that releases hanging work when dropped, and the receiver that the work waits on.
    fn pool(most: usize, timeout: u64, cooldown: u64) -> (Pool, Events, Sender<()>, Arc<Mutex<Receiver<()>>>) {
        let events = Arc::new(Mutex::new(Vec::new()));
        let changes = events.clone();
        let (timeout, cooldown) = (Duration::from_millis(timeout), Duration::from_millis(cooldown));
        let (hold, held) = channel();
        (Pool::new("test", most, timeout, cooldown, move |event| changes.lock().push(event)), events, hold, Arc::new(Mutex::new(held)))
    }

    #[tokio::test]
    async fn work_is_done_by_few_threads() {
        let (pool, events, ..) = pool(3, 60_000, 60_000);
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
        assert_eq!(pool.run(|| panic!("as it must")).await, Err::<(), _>(PoolError::Panicked));
        assert_eq!(pool.run(|| 7).await, Ok(7), "a panic costs no thread");
        assert!(events.lock().is_empty());
    }

    #[tokio::test]
    async fn nothing_waits_for_a_hanging_job() {
        let (pool, events, hold, held) = pool(2, 50, 200);
        let hanging_job = || {
            let stuck = held.clone();
            pool.run(move || {
                stuck.lock().recv().ok();
            })
        };
        assert_eq!(hanging_job().await, Err(PoolError::TimedOut));
        // Refused at once, for a while.
        let begun = Instant::now();
        assert_eq!(pool.run(|| ()).await, Err(PoolError::Busy));
        assert!(!pool.is_usable() && begun.elapsed() < Duration::from_millis(50));
        // Then one job is accepted, and the pool is well: the other thread is not stuck.
        while !pool.is_usable() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(pool.run(|| 1).await, Ok(1));
        while events.lock().len() < 2 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(*events.lock(), [PoolEvent::Hangs, PoolEvent::Recovered]);
        assert_eq!(pool.run(|| 2).await, Ok(2), "a stuck job does not count twice");
        // With all threads stuck, the end of the cool-down changes nothing.
        assert_eq!(hanging_job().await, Err(PoolError::TimedOut));
        tokio::time::sleep(Duration::from_millis(250)).await;
        assert!(!pool.is_usable());
        assert_eq!(pool.run(|| ()).await, Err(PoolError::Busy));
        drop(hold);
        while !pool.is_usable() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(pool.run(|| 3).await, Ok(3));
    }

    #[tokio::test]
    async fn a_caller_that_leaves_early_does_not_hide_a_hang() {
        let (pool, events, _hold, held) = pool(4, 50, 60_000);
        drop(pool.run(move || {
            held.lock().recv().ok();
        }));
        tokio::time::sleep(Duration::from_millis(20)).await;
        // The job may have started before its future was dropped. If so, the hang must be noticed.
        let begun = pool.0.state.lock().running.iter().flatten().count() > 0;
        tokio::time::sleep(Duration::from_millis(60)).await;
        assert_eq!(pool.is_usable(), !begun);
        assert_eq!(events.lock().len(), usize::from(begun));
    }

    #[tokio::test]
    async fn files_are_closed_elsewhere() {
        struct ReportsThread(Sender<bool>);
        impl Drop for ReportsThread {
            fn drop(&mut self) {
                self.0.send(MAY_BLOCK.get()).ok();
            }
        }
        let (pool, _turns, ..) = pool(1, 60_000, 60_000);
        let (changes, closed) = channel();
        pool.dispose(ReportsThread(changes.clone()));
        assert_eq!(closed.recv_timeout(Duration::from_secs(10)), Ok(true));
        let inner = pool.clone();
        pool.run(move || inner.dispose(ReportsThread(changes))).await.unwrap();
        assert_eq!(closed.recv_timeout(Duration::from_secs(10)), Ok(true));
    }
}

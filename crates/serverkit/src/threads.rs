//! Whether the system grants the threads that a program needs.

use std::{io, sync::Arc, thread};

/// Threads beside those of the runtime: for logs, for counting, and for work that blocks.
const BESIDE: usize = 8;

/// Tries it at the start. The runtime panics if it cannot make a thread, and a panic does not say what to do.
///
/// # Errors
/// A text that says which limit to raise.
pub(crate) fn check() -> Result<(), String> {
    let wanted = thread::available_parallelism().map_or(1, usize::from) + BESIDE;
    let mut made = Vec::new();
    let mut failed = None;
    // All exist at the same time, as they will later. They wait for a lock, and end when it is released.
    let lock = Arc::new(parking_lot::Mutex::new(()));
    let held = lock.lock();
    while made.len() < wanted && failed.is_none() {
        let lock = Arc::clone(&lock);
        match thread::Builder::new().spawn(move || drop(lock.lock())) {
            Ok(thread) => made.push(thread),
            Err(error) => failed = Some(error),
        }
    }
    drop(held);
    let had = made.len();
    for thread in made {
        // It does nothing that can fail.
        thread.join().ok();
    }
    failed.map_or(Ok(()), |error| Err(explain(wanted, had, &error)))
}

fn explain(wanted: usize, had: usize, error: &io::Error) -> String {
    format!(
        "the system grants {had} of the {wanted} threads that are needed to start ({error}); raise its limit on processes and threads \
         (ulimit -u, TasksMax=, pids.max)"
    )
}

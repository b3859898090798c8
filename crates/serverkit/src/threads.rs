//! Whether the system grants the threads that a program needs. Shared by all programs.

use std::{io, sync::Arc, thread};

/// What is needed beside the runtime's own: logs, counting, and work that blocks.
const BESIDE: usize = 8;

/// Finds out at the start: the runtime panics where it cannot make a thread, and a panic tells nobody what to do.
///
/// # Errors
/// A text that says which limit to raise.
pub fn check() -> Result<(), String> {
    let wanted = thread::available_parallelism().map_or(1, usize::from) + BESIDE;
    let mut made = Vec::new();
    let mut failed = None;
    // All at once, as they will be. They wait for a lock, and end when it is let go.
    let gate = Arc::new(parking_lot::Mutex::new(()));
    let closed = gate.lock();
    while made.len() < wanted && failed.is_none() {
        let gate = Arc::clone(&gate);
        match thread::Builder::new().spawn(move || drop(gate.lock())) {
            Ok(thread) => made.push(thread),
            Err(error) => failed = Some(error),
        }
    }
    drop(closed);
    let had = made.len();
    for thread in made {
        // It did nothing that could fail.
        thread.join().ok();
    }
    failed.map_or(Ok(()), |error| Err(told(wanted, had, &error)))
}

fn told(wanted: usize, had: usize, error: &io::Error) -> String {
    format!(
        "the system grants {had} of the {wanted} threads that are needed to start ({error}); raise its limit on processes and threads \
         (ulimit -u, TasksMax=, pids.max)"
    )
}

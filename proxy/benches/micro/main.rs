//! What the steps of a request cost, one by one. Run by `scripts/bench micro`.
#![expect(clippy::unwrap_used, reason = "a benchmark that cannot go on should stop where it is")]

mod flight;
mod hit;
mod ring;

use criterion::Criterion;
use std::time::Duration;

// As the program has it: some of these are mostly allocation.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() {
    let mut criterion =
        Criterion::default().warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(3)).configure_from_args();
    hit::request_head(&mut criterion);
    hit::memory_get(&mut criterion);
    hit::reply_head(&mut criterion);
    hit::note(&mut criterion);
    ring::look_up(&mut criterion);
    flight::fan_out(&mut criterion);
    criterion.final_summary();
}

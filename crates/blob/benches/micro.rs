//! What naming and verifying cost. Run by `scripts/bench micro`.

use castier_blob::{Digest, Verifier};
use criterion::{Criterion, Throughput};
use std::{hint::black_box, time::Duration};

fn main() {
    let mut criterion =
        Criterion::default().warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(3)).configure_from_args();
    digest(&mut criterion);
    verify(&mut criterion);
    criterion.final_summary();
}

/// A digest out of the path of a request, and a text that is none.
fn digest(criterion: &mut Criterion) {
    let digest = Digest::of(b"").to_string();
    let malformed = digest.to_uppercase();
    let mut group = criterion.benchmark_group("digest");
    group.bench_function("parse", |bencher| bencher.iter(|| Digest::parse(black_box(digest.as_bytes()))));
    group.bench_function("refuse", |bencher| bencher.iter(|| Digest::parse(black_box(malformed.as_bytes()))));
}

/// All that a fill hashes.
fn verify(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("verify");
    for (name, size) in [("1 KiB", 1 << 10), ("1 MiB", 1 << 20)] {
        let bytes = vec![7; size];
        let digest = Digest::of(&bytes);
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                let mut verifier = Verifier::of(digest, ());
                verifier.update(black_box(&bytes));
                verifier.finish().is_ok()
            });
        });
    }
}

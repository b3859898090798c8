//! Who owns a digest.

use castier_blob::Digest;
use castier_cluster::Ring;
use criterion::{BenchmarkId, Criterion};

/// The owner of one digest after the other, among members of equal weight and among members of several.
pub(crate) fn look_up(criterion: &mut Criterion) {
    let digests: Vec<_> = (0..1024u32).map(|number| Digest::of(&number.to_le_bytes())).collect();
    let mut group = criterion.benchmark_group("ring owner");
    for (kind, weights) in [("even", 1), ("weighted", 3)] {
        for members in [3, 20, 100] {
            let ring = Ring::new((0..members).map(|member: u32| (format!("10.0.0.{member}:8081"), 1 + member % weights)));
            let mut digests = digests.iter().cycle();
            group.bench_function(BenchmarkId::new(kind, members), |bencher| {
                bencher.iter(|| digests.next().and_then(|digest| ring.owner(digest)));
            });
        }
    }
}

//! How long things took, in buckets that are an eighth of their value wide: fine enough for a median of microseconds, where the buckets of
//! the metrics begin at a millisecond.

use std::time::Duration;

/// Buckets for each doubling.
const STEPS: usize = 4;
/// Up to 2^27 µs, which is over two minutes; what takes longer counts as that.
const BUCKETS: usize = 26 * STEPS;

/// Counts by duration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Latency([u64; BUCKETS]);

impl Default for Latency {
    fn default() -> Self {
        Self([0; BUCKETS])
    }
}

fn bucket(micros: u64) -> usize {
    if micros < STEPS as u64 {
        return micros as usize;
    }
    let octave = micros.ilog2() as usize;
    ((octave - 1) * STEPS + (micros >> (octave - 2)) as usize % STEPS).min(BUCKETS - 1)
}

/// The middle of a bucket, in microseconds.
fn middle(bucket: usize) -> f64 {
    if bucket < STEPS {
        return bucket as f64 + 0.5;
    }
    let width = (1_u64 << (bucket / STEPS - 1)) as f64;
    ((STEPS + bucket % STEPS) as f64 + 0.5) * width
}

impl Latency {
    pub(super) fn add(&mut self, took: Duration) {
        self.0[bucket(u64::try_from(took.as_micros()).unwrap_or(u64::MAX))] += 1;
    }

    pub(super) fn merge(&mut self, other: &Self) {
        self.0.iter_mut().zip(other.0).for_each(|(mine, theirs)| *mine += theirs);
    }

    /// What came since `before`.
    pub fn since(&self, before: &Self) -> Self {
        let mut since = self.clone();
        since.0.iter_mut().zip(before.0).for_each(|(now, then)| *now = now.saturating_sub(then));
        since
    }

    /// The duration, in milliseconds, that this part of all does not exceed, to within an eighth; none if there is nothing.
    pub fn quantile(&self, part: f64) -> Option<f64> {
        let total: u64 = self.0.iter().sum();
        let rank = ((total as f64 * part).ceil() as u64).max(1);
        let mut seen = 0;
        let found = self.0.iter().position(|count| {
            seen += count;
            seen >= rank
        });
        found.filter(|_| total > 0).map(|found| middle(found) / 1000.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn quantiles_are_right_to_an_eighth(mut micros in prop::collection::vec(8_u64..100_000_000, 1..200), part in 0.01_f64..1.0) {
            let mut latency = Latency::default();
            micros.iter().for_each(|micros| latency.add(Duration::from_micros(*micros)));
            micros.sort_unstable();
            let exact = micros[((micros.len() as f64 * part).ceil() as usize).max(1) - 1] as f64 / 1000.0;
            let told = latency.quantile(part).unwrap();
            prop_assert!((told - exact).abs() <= exact / 8.0, "{told} for {exact}");
        }
    }

    #[test]
    fn buckets_follow_each_other_and_end() {
        assert!((0..1_000_000_u64).all(|micros| (0..=1).contains(&(bucket(micros + 1) - bucket(micros)))));
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
        assert_eq!(Latency::default().quantile(0.5), None);
        let (mut before, mut now) = (Latency::default(), Latency::default());
        before.add(Duration::from_secs(1));
        now.merge(&before);
        now.add(Duration::from_micros(10));
        assert_eq!(now.since(&before).quantile(1.0), Some(0.011), "10 and 11 µs share a bucket");
    }
}

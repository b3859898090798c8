//! A histogram of durations in microseconds, for medians below the first bucket of the metrics (one millisecond).

use hdrhistogram::Histogram;
use std::time::Duration;

/// The longest duration that it can tell apart, in microseconds: over two minutes. A longer one counts as this.
const MAX_MICROS: u64 = (1 << 27) - 1;
/// One decimal digit, which hdrhistogram keeps to within 1/16. A histogram takes 3 KiB.
const DIGITS: u8 = 1;

/// Counts of durations. Its memory is fixed.
#[derive(Clone, Debug, PartialEq)]
pub struct Latency(Histogram<u64>);

impl Default for Latency {
    fn default() -> Self {
        Self(Histogram::new_with_bounds(1, MAX_MICROS, DIGITS).unwrap_or_else(|_| unreachable!("these bounds are valid")))
    }
}

impl Latency {
    pub(super) fn add(&mut self, took: Duration) {
        self.0.saturating_record(u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
    }

    pub(super) fn merge(&mut self, other: &Self) {
        // Fails only for other bounds.
        self.0.add(&other.0).ok();
    }

    /// The durations that were added since `before`, an earlier copy of `self`.
    pub fn since(&self, before: &Self) -> Self {
        let mut since = self.clone();
        since.0.subtract(&before.0).ok();
        since
    }

    /// The quantile in milliseconds, to within 1/16; `None` if there are no durations. `part` is from 0 to 1.
    pub fn quantile(&self, part: f64) -> Option<f64> {
        (!self.0.is_empty()).then(|| self.0.value_at_quantile(part) as f64 / 1000.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn quantiles_are_right_to_a_sixteenth(mut micros in prop::collection::vec(8_u64..100_000_000, 1..200), part in 0.01_f64..1.0) {
            let mut latency = Latency::default();
            micros.iter().for_each(|micros| latency.add(Duration::from_micros(*micros)));
            micros.sort_unstable();
            let exact = micros[((micros.len() as f64 * part).ceil() as usize).max(1) - 1] as f64 / 1000.0;
            let found = latency.quantile(part).unwrap();
            prop_assert!((found - exact).abs() <= exact / 16.0, "{found} for {exact}");
        }
    }

    #[test]
    fn differences_and_the_longest_duration() {
        assert_eq!(Latency::default().quantile(0.5), None);
        let (mut before, mut now) = (Latency::default(), Latency::default());
        before.add(Duration::from_secs(1));
        now.merge(&before);
        now.add(Duration::from_micros(10));
        assert_eq!(now.since(&before).quantile(1.0), Some(0.01));
        assert_eq!(now.since(&now).quantile(1.0), None);
        now.add(Duration::MAX);
        assert!(now.quantile(1.0).is_some_and(|longest| (134_000.0..150_000.0).contains(&longest)));
        assert!(now.0.distinct_values() * size_of::<u64>() <= 3 << 10);
    }
}

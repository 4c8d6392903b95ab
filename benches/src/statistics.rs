//! The median of paired ratios and how sure it is; the README says what and why.

/// A median with half the width of its 95 % confidence interval.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// The median.
    pub median: f64,
    /// Half the width of the interval; infinite below six samples, where there is no such interval.
    pub spread: f64,
}

/// The estimate from these samples; NaN of none.
///
/// ```
/// use broker_benches::statistics::estimate;
///
/// let estimate = estimate(&[1.0, 9.0, 2.0, 3.0, 2.0, 2.0, 2.0, 3.0, 1.0]);
/// assert_eq!((estimate.median, estimate.spread), (2.0, 1.0));
/// ```
pub fn estimate(samples: &[f64]) -> Estimate {
    let sorted = sort(samples);
    let spread = match outside(sorted.len()).and_then(|k| Some((sorted.get(k)?, sorted.get(sorted.len() - 1 - k)?))) {
        Some((low, high)) => (high - low) / 2.0,
        None => f64::INFINITY,
    };
    Estimate { median: middle(&sorted), spread }
}

/// The median; NaN of none.
///
/// ```
/// assert_eq!(broker_benches::statistics::median(&[3.0, 1.0, 2.0, 4.0]), 2.5);
/// ```
pub fn median(samples: &[f64]) -> f64 {
    middle(&sort(samples))
}

fn sort(samples: &[f64]) -> Vec<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

fn middle(sorted: &[f64]) -> f64 {
    let half = sorted.len() / 2;
    match (sorted.get(half), sorted.get(half.wrapping_sub(1))) {
        (Some(high), Some(low)) if sorted.len().is_multiple_of(2) => f64::midpoint(*low, *high),
        (Some(middle), _) => *middle,
        _ => f64::NAN,
    }
}

/// How many of `n` sorted samples may lie beyond each end of the interval: the most heads that `n`
/// throws show at most that many of with a probability of 2.5 % or less. `None` below six samples.
///
/// Of many samples two to the power of minus `n` is zero, and so the normal distribution stands in
/// for the binomial one, from which it no longer differs.
fn outside(n: usize) -> Option<usize> {
    let size = n as f64;
    if n > 500 {
        return Some((size / 2.0 - 0.98 * size.sqrt()).floor() as usize);
    }
    let mut exactly = 0.5_f64.powf(size);
    let mut at_most = exactly;
    let mut heads = None;
    for k in 0..n {
        if at_most > 0.025 {
            break;
        }
        heads = Some(k);
        exactly *= (n - k) as f64 / (k + 1) as f64;
        at_most += exactly;
    }
    heads
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_is_that_of_the_sign_test() {
        // From the tables of the binomial distribution (as in Conover, "Practical Nonparametric
        // Statistics", table A3): ranks from 1, so one more than what lies outside.
        for (n, rank) in [(6, 1), (8, 1), (9, 2), (12, 3), (20, 6), (25, 8), (50, 18), (100, 40)] {
            assert_eq!(outside(n), Some(rank - 1), "{n} samples");
        }
        assert_eq!(outside(5), None);
        assert!(outside(501).unwrap().abs_diff(outside(500).unwrap()) <= 1);
    }

    #[test]
    fn a_spoilt_round_moves_neither_median_nor_spread() {
        let calm: Vec<f64> = (0..20).map(|i| 2.0 + f64::from(i) / 100.0).collect();
        let mut noisy = calm.clone();
        noisy[19] = 50.0;
        assert_eq!(estimate(&calm), estimate(&noisy));
    }

    #[test]
    fn few_samples_have_no_interval() {
        assert!(estimate(&[1.0; 5]).spread.is_infinite());
        assert!(estimate(&[]).median.is_nan());
    }
}

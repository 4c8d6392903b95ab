//! Interleaved rounds: ours, theirs, ours, theirs, until it is clear or time is over.

use std::time::{Duration, Instant};

use crate::Result;
use crate::comparison::Comparison;
use crate::report::Report;
use crate::sample::Sample;
use crate::statistics::{estimate, median};

/// Rounds at least: one more than the fewest that have a confidence interval.
const MIN_ROUNDS: usize = 7;

/// The spread, as a part of the ratio, at which no more rounds are needed.
const SMALL_SPREAD: f64 = 0.03;

/// Measures a comparison, for about `limit` at most; `progress` is told the state after each round.
/// At least one round of each side beyond the warm-up is made, however long it takes.
///
/// # Errors
///
/// What a side reports: a broker's error, a message lost or doubled.
pub async fn measure(comparison: Comparison, limit: Duration, mut progress: impl FnMut(usize, f64)) -> Result<Report> {
    let (name, unit, bars) = (comparison.name().to_owned(), comparison.unit(), comparison.bars());
    let mut pair = comparison.prepare().await?;

    // Warm-up: caches, allocator, connections, the processor's clock.
    (pair.ours)().await?;
    (pair.theirs)().await?;

    let began = Instant::now();
    let (mut ours, mut theirs, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    let ratio = loop {
        let round = Instant::now();
        let (our, their) = ((pair.ours)().await?, (pair.theirs)().await?);
        ours.push(our);
        theirs.push(their);
        ratios.push(unit.ratio(our.value, their.value));

        let ratio = estimate(&ratios);
        progress(ratios.len(), ratio.median);
        let is_clear = ratios.len() >= MIN_ROUNDS && ratio.spread <= SMALL_SPREAD * ratio.median;
        if is_clear || began.elapsed() + round.elapsed() > limit {
            break ratio;
        }
    };
    let sides @ (our, their) = (side(&ours), side(&theirs));
    // What a side did the server can do.
    let limit = pair.limit.map(|limit| limit.max(our.value).max(their.value));
    let bar = bars.beside(their.value, limit);
    Ok(Report::new(name, unit, bar, sides, ratio, ratios.len()).with_limit(limit))
}

/// The medians of a side's rounds; of its processor time only if every round told it.
fn side(samples: &[Sample]) -> Sample {
    let values: Vec<f64> = samples.iter().map(|sample| sample.value).collect();
    let cpu: Option<Vec<f64>> = samples.iter().map(|sample| sample.cpu_micros).collect();
    Sample { value: median(&values), cpu_micros: cpu.map(|cpu| median(&cpu)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comparison::{Bar, Pair, Unit};

    fn constant(ours: f64, theirs: f64, bar: f64) -> Comparison {
        Comparison::new("test/constant", Unit::MessagesPerSecond, bar, async move || {
            Ok(Pair::new(move || async move { Ok(ours) }, move || async move { Ok(theirs) }))
        })
    }

    #[tokio::test]
    async fn a_calm_comparison_ends_after_the_least_rounds() {
        let report = measure(constant(20.0, 10.0, 2.0), Duration::from_secs(60), |_, _| ()).await.unwrap();
        assert_eq!((report.rounds, report.ratio, report.spread), (MIN_ROUNDS, 2.0, 0.0));
        assert!(report.holds);
    }

    #[tokio::test]
    async fn a_bar_above_the_ratio_does_not_hold() {
        let report = measure(constant(19.0, 10.0, 2.0), Duration::from_secs(60), |_, _| ()).await.unwrap();
        assert!(!report.holds);
    }

    #[tokio::test]
    async fn what_the_server_can_do_chooses_the_bar() {
        let beside = async |theirs: f64| {
            let comparison = Comparison::new("test/limit", Unit::MessagesPerSecond, 1.3, async move || {
                Ok(Pair::new(async || Ok(20.0), move || async move { Ok(theirs) }).with_limit(18.0))
            });
            let at_limit = Bar { ratio: 0.97, cpu_at_most: None };
            let comparison = comparison.with_bar_at_limit(at_limit);
            measure(comparison, Duration::from_secs(60), |_, _| ()).await.unwrap()
        };
        // Ours shows that it can do 20.
        let (below, at) = (beside(14.5).await, beside(15.0).await);
        assert_eq!([below.limit, at.limit], [Some(20.0); 2]);
        assert_eq!([below.bar, at.bar], [1.3, 0.97]);
    }

    #[tokio::test]
    async fn the_first_round_is_dropped_and_sides_take_turns() {
        let (log, logged) = std::sync::mpsc::channel();
        let comparison = Comparison::new("test/turns", Unit::MessagesPerSecond, 1.0, async move || {
            let (ours, theirs) = (log.clone(), log);
            let mut cold = true;
            let ours = move || {
                let value = if std::mem::replace(&mut cold, false) { 1.0 } else { 8.0 };
                let sent = ours.send("ours");
                async move { sent.map(|()| value).map_err(Into::into) }
            };
            let theirs = move || {
                let sent = theirs.send("theirs");
                async move { sent.map(|()| 4.0).map_err(Into::into) }
            };
            Ok(Pair::new(ours, theirs))
        });
        let report = measure(comparison, Duration::from_secs(60), |_, _| ()).await.unwrap();
        assert_eq!((report.ours, report.theirs, report.ratio), (8.0, 4.0, 2.0));
        let turns: Vec<_> = logged.iter().collect();
        assert_eq!(turns.len(), 2 * (MIN_ROUNDS + 1));
        assert!(turns.chunks(2).all(|turn| turn == ["ours", "theirs"]));
    }

    #[tokio::test]
    async fn processor_time_is_told_where_a_side_measures_it() {
        let ours = async || Ok(Sample { value: 20.0, cpu_micros: Some(3.0) });
        let comparison = Comparison::new("test/cpu", Unit::MessagesPerSecond, 1.0, async move || {
            Ok(Pair::new(ours, async || Ok(10.0)))
        });
        let report = measure(comparison, Duration::from_secs(60), |_, _| ()).await.unwrap();
        assert_eq!((report.ours_cpu_us, report.theirs_cpu_us), (Some(3.0), None));
    }

    #[tokio::test]
    async fn an_error_of_a_side_is_the_result() {
        let failing = Comparison::new("test/failing", Unit::Bytes, 1.0, async || {
            Ok(Pair::new(async || Err::<f64, _>("a message was lost".into()), async || Ok(1.0)))
        });
        let error = measure(failing, Duration::from_secs(60), |_, _| ()).await.unwrap_err();
        assert_eq!(error.to_string(), "a message was lost");
    }
}

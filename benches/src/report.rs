//! What a comparison came to, for a reader and for a program.

use std::fmt;

use serde::Serialize;

use crate::comparison::{Bar, Unit};
use crate::sample::Sample;
use crate::statistics::Estimate;

/// The outcome of a comparison. As JSON it has the fields that the README names; `Display` is the
/// line for a reader.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Report {
    /// The comparison's name.
    pub name: String,
    /// What `ours` and `theirs` are.
    #[serde(serialize_with = "unit_text")]
    pub unit: Unit,
    /// The median of our rounds.
    pub ours: f64,
    /// The median of their rounds.
    pub theirs: f64,
    /// The median of the paired ratios; above 1 ours is better.
    pub ratio: f64,
    /// Half the width of the ratio's 95 % confidence interval; null in JSON where there were too few
    /// rounds for one.
    pub spread: f64,
    /// The ratio to reach; 0 where there is none.
    pub bar: f64,
    /// Whether the ratio, within its spread, reaches the bar; and where the processor time has a bar, that
    /// one too.
    pub holds: bool,
    /// Processor time of this process in our rounds, in microseconds a message: the median, where it is
    /// measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ours_cpu_us: Option<f64>,
    /// The same in their rounds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub theirs_cpu_us: Option<f64>,
    /// The part of their processor time that ours may take at most, where there is such a bar.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_at_most: Option<f64>,
    /// What the server that both sides use can do, in `unit`, where that is measured; it chooses the bar.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<f64>,
    /// Rounds measured, the warm-up not counted.
    #[serde(skip)]
    pub rounds: usize,
}

impl Report {
    pub(crate) fn new(
        name: String,
        unit: Unit,
        bar: Bar,
        (ours, theirs): (Sample, Sample),
        ratio: Estimate,
        rounds: usize,
    ) -> Self {
        // Too few rounds for an interval say nothing but the ratio itself.
        let margin = if ratio.spread.is_finite() { ratio.spread } else { 0.0 };
        let reaches = ratio.median + margin >= bar.ratio;
        let report = Self {
            name,
            unit,
            ours: ours.value,
            theirs: theirs.value,
            ratio: ratio.median,
            spread: ratio.spread,
            bar: bar.ratio,
            holds: reaches,
            ours_cpu_us: ours.cpu_micros,
            theirs_cpu_us: theirs.cpu_micros,
            cpu_at_most: bar.cpu_at_most,
            limit: None,
            rounds,
        };
        // Processor time that is not measured does not hold.
        let is_spare = bar.cpu_at_most.is_none_or(|part| report.cpu_ratio().is_some_and(|ratio| ratio <= part));
        Self { holds: reaches && is_spare, ..report }
    }

    /// With what the server can do.
    pub(crate) fn with_limit(self, limit: Option<f64>) -> Self {
        Self { limit, ..self }
    }

    /// Our processor time as a part of theirs, of the medians.
    fn cpu_ratio(&self) -> Option<f64> {
        Some(self.ours_cpu_us? / self.theirs_cpu_us?)
    }

    /// Whether 1 lies within the spread of the ratio.
    pub fn is_indistinguishable(&self) -> bool {
        self.spread.is_finite() && (self.ratio - 1.0).abs() <= self.spread
    }
}

fn unit_text<S: serde::Serializer>(unit: &Unit, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(unit.as_str())
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, unit, ours, theirs, ratio, spread, bar, holds, ours_cpu_us, theirs_cpu_us, rounds, .. } = self;
        let (ours, theirs, unit) = (Short(*ours), Short(*theirs), unit.as_str());
        write!(f, "{name:<38} ours {ours} theirs {theirs} {unit:<12} ratio {ratio:7.3} ± {spread:5.3}")?;
        write!(f, " of {rounds:>3} rounds  ")?;
        match (*bar > 0.0, *holds) {
            (false, _) => f.write_str("no bar")?,
            (true, true) => write!(f, "bar {bar:6.3} holds")?,
            (true, false) => write!(f, "bar {bar:6.3} DOES NOT HOLD")?,
        }
        if self.is_indistinguishable() {
            f.write_str(", indistinguishable")?;
        }
        if let (Some(ours), Some(theirs)) = (ours_cpu_us, theirs_cpu_us) {
            write!(f, "  client CPU {ours:.2} to {theirs:.2} µs a message")?;
        }
        if let (Some(part), Some(ratio)) = (self.cpu_at_most, self.cpu_ratio()) {
            write!(f, ", {ratio:.2} of theirs, bar at most {part:.2}")?;
        }
        if let Some(limit) = self.limit {
            write!(
                f,
                "  the server can do {}, theirs is {:.2} of it",
                Short(limit).to_string().trim(),
                self.theirs / limit
            )?;
        }
        Ok(())
    }
}

/// A number with three or four digits and a metric prefix.
struct Short(f64);

impl fmt::Display for Short {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (value, prefix) = match self.0.abs() {
            value if value >= 1e9 => (self.0 / 1e9, "G"),
            value if value >= 1e6 => (self.0 / 1e6, "M"),
            value if value >= 1e4 => (self.0 / 1e3, "k"),
            _ => (self.0, " "),
        };
        write!(f, "{value:7.2} {prefix}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(median: f64, spread: f64, bar: f64) -> Report {
        let bar = Bar { ratio: bar, cpu_at_most: None };
        let sides = (Sample::from(127.1e6), Sample::from(7.0e6));
        Report::new("group/name".into(), Unit::DeliveriesPerSecond, bar, sides, Estimate { median, spread }, 9)
    }

    #[test]
    fn a_bar_holds_when_the_ratio_reaches_it_within_the_spread() {
        assert!(report(10.0, 0.0, 10.0).holds);
        assert!(report(9.9, 0.1, 10.0).holds);
        assert!(!report(9.8, 0.1, 10.0).holds);
        assert!(!report(9.8, f64::INFINITY, 10.0).holds, "too few rounds do not excuse a ratio");
    }

    #[test]
    fn json_has_the_fields_that_scripts_rely_on() {
        let json = serde_json::to_string(&report(18.0, 0.5, 10.0)).unwrap();
        assert_eq!(
            json,
            r#"{"name":"group/name","unit":"deliveries/s","ours":127100000.0,"theirs":7000000.0,"ratio":18.0,"spread":0.5,"bar":10.0,"holds":true}"#
        );
    }

    #[test]
    fn a_bar_for_the_processor_time_is_one_more_to_reach() {
        let sides = |ours| [ours, 10.0].map(|cpu| Sample { value: 1.0, cpu_micros: Some(cpu) });
        let ratio = Estimate { median: 2.0, spread: 0.5 };
        let report = |[ours, theirs]: [Sample; 2]| {
            let bar = Bar { ratio: 1.0, cpu_at_most: Some(0.6) };
            Report::new("g/n".into(), Unit::MessagesPerSecond, bar, (ours, theirs), ratio, 9)
        };
        assert!(report(sides(6.0)).holds);
        assert!(!report(sides(6.1)).holds);
        assert!(!report([Sample::from(1.0); 2]).holds, "what is not measured does not hold");
        assert!(report(sides(6.0)).to_string().ends_with("0.60 of theirs, bar at most 0.60"));
    }

    #[test]
    fn processor_time_is_shown_where_both_sides_have_it() {
        let side = |value| Sample { value, cpu_micros: Some(value) };
        let (ratio, bar) = (Estimate { median: 2.0, spread: 0.5 }, Bar { ratio: 1.0, cpu_at_most: None });
        let report = Report::new("g/n".into(), Unit::MessagesPerSecond, bar, (side(2.0), side(1.0)), ratio, 9);
        assert!(report.to_string().ends_with("client CPU 2.00 to 1.00 µs a message"), "{report}");
        let json = serde_json::to_string(&report).unwrap();
        assert!(json.ends_with(r#""ours_cpu_us":2.0,"theirs_cpu_us":1.0}"#), "{json}");
    }

    #[test]
    fn what_the_server_can_do_is_told() {
        let report = report(18.0, 0.5, 10.0).with_limit(Some(14.0e6));
        assert!(report.to_string().ends_with("the server can do 14.00 M, theirs is 0.50 of it"), "{report}");
        let json = serde_json::to_string(&report).unwrap();
        assert!(json.ends_with(r#""holds":true,"limit":14000000.0}"#), "{json}");
    }

    #[test]
    fn without_a_bar_nothing_is_said_to_hold() {
        let report = report(0.5, 0.02, 0.0);
        assert!(report.holds && report.to_string().ends_with("no bar"), "{report}");
    }

    #[test]
    fn a_reader_is_told_what_cannot_be_told_apart() {
        assert!(report(1.01, 0.02, 1.0).to_string().ends_with("holds, indistinguishable"));
        assert!(report(1.03, 0.02, 1.0).to_string().ends_with("holds"));
        assert!(report(0.5, 0.02, 1.0).to_string().ends_with("DOES NOT HOLD"));
    }
}

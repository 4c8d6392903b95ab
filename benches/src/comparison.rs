//! A comparison: a name, a unit, a bar, and two sides to measure in turn.

use std::fmt;

use broker_core::BoxFuture;

use crate::Result;
use crate::sample::Sample;

/// What a side's number is, and which way is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Messages published a second.
    MessagesPerSecond,
    /// Messages received by subscribers a second, all subscribers together.
    DeliveriesPerSecond,
    /// The time that 99 of 100 messages took at most, in microseconds.
    P99Micros,
    /// Bytes of memory held.
    Bytes,
}

impl Unit {
    /// As it is printed.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::MessagesPerSecond => "messages/s",
            Self::DeliveriesPerSecond => "deliveries/s",
            Self::P99Micros => "µs p99",
            Self::Bytes => "bytes",
        }
    }

    /// How much better `ours` is than `theirs`: above 1 where ours is better.
    ///
    /// ```
    /// use broker_benches::comparison::Unit;
    /// assert_eq!(Unit::DeliveriesPerSecond.ratio(30.0, 10.0), 3.0);
    /// assert_eq!(Unit::Bytes.ratio(10.0, 30.0), 3.0);
    /// ```
    pub fn ratio(self, ours: f64, theirs: f64) -> f64 {
        match self {
            Self::MessagesPerSecond | Self::DeliveriesPerSecond => ours / theirs,
            Self::P99Micros | Self::Bytes => theirs / ours,
        }
    }
}

/// One side of a comparison, prepared: each call measures one round.
pub type Side = Box<dyn FnMut() -> BoxFuture<'static, Result<Sample>> + Send>;

/// Both sides, ready to be measured round by round.
pub struct Pair {
    pub(crate) ours: Side,
    pub(crate) theirs: Side,
    pub(crate) limit: Option<f64>,
}

impl Pair {
    /// Two sides, each a function that measures one round and tells a number in the comparison's unit, or
    /// a [`Sample`] that tells the processor time, too.
    pub fn new<O, OF, OS, T, TF, TS>(mut ours: O, mut theirs: T) -> Self
    where
        O: FnMut() -> OF + Send + 'static,
        OF: Future<Output = Result<OS>> + Send + 'static,
        OS: Into<Sample>,
        T: FnMut() -> TF + Send + 'static,
        TF: Future<Output = Result<TS>> + Send + 'static,
        TS: Into<Sample>,
    {
        let ours = move || sampled(ours());
        let theirs = move || sampled(theirs());
        Self { ours: Box::new(ours), theirs: Box::new(theirs), limit: None }
    }

    /// With what the server that both sides use can do, in the comparison's unit.
    #[must_use]
    pub fn with_limit(mut self, limit: f64) -> Self {
        self.limit = Some(limit);
        self
    }
}

fn sampled<S: Into<Sample>>(
    round: impl Future<Output = Result<S>> + Send + 'static,
) -> BoxFuture<'static, Result<Sample>> {
    Box::pin(async move { round.await.map(Into::into) })
}

impl fmt::Debug for Pair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pair")
    }
}

/// What ours has to reach.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bar {
    /// The ratio; nothing to reach where it is 0.
    pub ratio: f64,
    /// The part of their processor time a message that ours may take at most.
    pub cpu_at_most: Option<f64>,
}

impl fmt::Display for Bar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.ratio > 0.0 {
            true => write!(f, "bar {:6.3}", self.ratio)?,
            false => f.write_str("no bar    ")?,
        }
        match self.cpu_at_most {
            Some(part) => write!(f, ", client CPU at most {part:.2} of theirs"),
            None => Ok(()),
        }
    }
}

/// What ours has to reach, by whether the server that both sides use is the limit.
///
/// ```
/// use broker_benches::comparison::{Bar, Bars};
///
/// let bar = |ratio| Bar { ratio, cpu_at_most: Some(0.6) };
/// let bars = Bars { usual: bar(1.3), at_limit: Some(bar(0.97)) };
/// assert_eq!(bars.beside(20.0, Some(30.0)), bar(1.3), "theirs is below three quarters of what the server can do");
/// assert_eq!(bars.beside(24.0, Some(30.0)), bar(0.97));
/// assert_eq!(bars.beside(24.0, None), bar(1.3), "nobody measured what the server can do");
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bars {
    /// Where it is not.
    pub usual: Bar,
    /// Where it is, if that makes a difference.
    pub at_limit: Option<Bar>,
}

impl Bars {
    /// A server is the limit where theirs comes to this part of what it can do: nobody can be much faster.
    const AT_LIMIT: f64 = 0.75;

    /// What to reach where theirs does this, and the server can do that.
    pub fn beside(self, theirs: f64, limit: Option<f64>) -> Bar {
        let is_at_limit = limit.is_some_and(|limit| theirs >= Self::AT_LIMIT * limit);
        self.at_limit.filter(|_| is_at_limit).unwrap_or(self.usual)
    }
}

/// A named comparison with its bar. Adding one is one of these in a group's `comparisons()`.
///
/// ```
/// use broker_benches::comparison::{Comparison, Pair, Unit};
///
/// let twice = Comparison::new("example/twice", Unit::MessagesPerSecond, 2.0, async || {
///     Ok(Pair::new(async || Ok(20.0), async || Ok(10.0)))
/// });
/// assert!(twice.is_selected_by("example") && !twice.is_selected_by("exam"));
/// ```
pub struct Comparison {
    name: String,
    unit: Unit,
    bars: Bars,
    prepare: Box<dyn FnOnce() -> BoxFuture<'static, Result<Pair>> + Send>,
}

impl Comparison {
    /// A comparison called `name`, which holds when ours is at least `bar` times as good as theirs.
    /// `prepare` runs once, before the first round, and sets up what both sides need.
    pub fn new<F, Fut>(name: impl Into<String>, unit: Unit, bar: f64, prepare: F) -> Self
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = Result<Pair>> + Send + 'static,
    {
        let bars = Bars { usual: Bar { ratio: bar, cpu_at_most: None }, at_limit: None };
        Self { name: name.into(), unit, bars, prepare: Box::new(move || Box::pin(prepare())) }
    }

    /// Holds only if ours also takes at most this part of the processor time a message that theirs takes.
    #[must_use]
    pub fn with_cpu_at_most(mut self, part: f64) -> Self {
        self.bars.usual.cpu_at_most = Some(part);
        self
    }

    /// Has another bar where the server is the limit: where theirs comes to three quarters of what the server
    /// can do, which the [`Pair`] tells.
    #[must_use]
    pub fn with_bar_at_limit(mut self, bar: Bar) -> Self {
        self.bars.at_limit = Some(bar);
        self
    }

    /// Its name: a group, slashes, what is compared.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The unit of both sides.
    pub fn unit(&self) -> Unit {
        self.unit
    }

    /// What to reach.
    pub fn bars(&self) -> Bars {
        self.bars
    }

    /// Whether `selector` is its name or a group it belongs to.
    pub fn is_selected_by(&self, selector: &str) -> bool {
        is_selected(&self.name, selector)
    }

    /// Sets up both sides.
    pub(crate) fn prepare(self) -> BoxFuture<'static, Result<Pair>> {
        (self.prepare)()
    }
}

/// Whether `selector` is this name or a group it belongs to.
pub(crate) fn is_selected(name: &str, selector: &str) -> bool {
    let selector = selector.trim_end_matches('/');
    name.strip_prefix(selector).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

impl fmt::Debug for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Comparison")
            .field("name", &self.name)
            .field("unit", &self.unit)
            .field("bars", &self.bars)
            .finish()
    }
}

//! Points in time and durations as people and the wire write them.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jiff::SignedDuration;
use jiff::civil::DateTime;
use jiff::fmt::StdFmtWrite;
use jiff::fmt::temporal::DateTimePrinter;
use serde::{Deserialize, Deserializer, Serializer};

use crate::{Error, Result};

/// A point in time: milliseconds since the Unix epoch, the finest that all brokers carry.
///
/// Its text is RFC 3339 in UTC, with milliseconds.
///
/// ```
/// use broker_core::Timestamp;
///
/// let time: Timestamp = "2026-11-22T12:00:00.250Z".parse()?;
/// assert_eq!(time.as_millis(), 1_795_348_800_250);
/// assert_eq!(time.to_string(), "2026-11-22T12:00:00.250Z");
/// # Ok::<(), broker_core::Error>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Timestamp(i64);

impl Timestamp {
    /// The present by the system clock.
    pub fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
    }

    /// From milliseconds since the Unix epoch.
    pub const fn from_millis(millis: i64) -> Self {
        Self(millis)
    }

    /// Milliseconds since the Unix epoch.
    pub const fn as_millis(self) -> i64 {
        self.0
    }

    /// This much later; the end of time at the most.
    ///
    /// ```
    /// use broker_core::Timestamp;
    /// assert_eq!(Timestamp::from_millis(1).after(std::time::Duration::from_secs(1)).as_millis(), 1_001);
    /// ```
    #[must_use]
    pub fn after(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)))
    }

    /// When all of `wait` from now is over: of the millisecond that it is [`now`](Self::now) some has passed already, so
    /// that this is the whole one after it. For what must not come earlier.
    ///
    /// ```
    /// use std::time::{Duration, Instant};
    /// use broker_core::Timestamp;
    ///
    /// let (begun, due) = (Instant::now(), Timestamp::past(Duration::from_millis(3)));
    /// while Timestamp::now() < due {}
    /// assert!(begun.elapsed() >= Duration::from_millis(3));
    /// ```
    #[must_use]
    pub fn past(wait: Duration) -> Self {
        Self::now().after(wait.saturating_add(Duration::from_millis(1)))
    }

    /// How much later this is than `earlier`; zero if it is not later.
    ///
    /// ```
    /// use broker_core::Timestamp;
    /// let (one, two) = (Timestamp::from_millis(1), Timestamp::from_millis(2));
    /// assert_eq!(two.since(one).as_millis(), 1);
    /// assert_eq!(one.since(two).as_millis(), 0);
    /// ```
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match jiff::Timestamp::from_millisecond(self.0) {
            // What `{time:.3}` does, without a formatter for it: a push has two of these.
            Ok(time) => {
                let printer = DateTimePrinter::new().precision(Some(3));
                printer.print_timestamp(&time, StdFmtWrite(f)).map_err(|_| fmt::Error)
            }
            // Beyond the years RFC 3339 can write, the nearest it can; a day before, `jiff` already has
            // only the calendar.
            Err(_) if self.0 < 0 => write!(f, "{:.3}", jiff::Timestamp::MIN),
            Err(_) => {
                let time = EPOCH.checked_add(SignedDuration::from_millis(self.0)).unwrap_or(DateTime::MAX);
                write!(f, "{time:.3}Z")
            }
        }
    }
}

impl fmt::Debug for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Timestamp({self})")
    }
}

impl FromStr for Timestamp {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let short = shortened(text);
        let read = match short.parse::<jiff::Timestamp>() {
            Ok(time) => Ok(Self(time.as_millisecond())),
            Err(error) => last_day(&short).ok_or(error),
        };
        read.map_err(|error| {
            Error::invalid(format!("time {text:?}: it is written as RFC 3339 does, as in 2026-11-22T12:00:00Z"))
                .with_source(error)
        })
    }
}

crate::text::serde_as_text!(Timestamp);

const EPOCH: DateTime = jiff::civil::date(1970, 1, 1).at(0, 0, 0, 0);

/// Without the digits of a fraction beyond those that are kept: RFC 3339 allows any number.
fn shortened(text: &str) -> Cow<'_, str> {
    const DIGITS: usize = 3;
    let Some((before, after)) = text.split_once('.') else { return text.into() };
    let digits = after.bytes().take_while(u8::is_ascii_digit).count();
    match (after.get(..DIGITS), after.get(digits..)) {
        (Some(kept), Some(rest)) if digits > DIGITS => format!("{before}.{kept}{rest}").into(),
        _ => text.into(),
    }
}

/// The last day that RFC 3339 can write, which `jiff` leaves out, since not all its time zones have it.
fn last_day(text: &str) -> Option<Timestamp> {
    let pieces = jiff::fmt::temporal::Pieces::parse(text).ok()?;
    let offset = pieces.to_numeric_offset()?;
    let local = pieces.date().to_datetime(pieces.time()?).duration_since(EPOCH);
    let millis = local.checked_sub(SignedDuration::from_secs(offset.seconds().into()))?.as_millis();
    let time = Timestamp(i64::try_from(millis).ok()?);
    (pieces.date().year() == 9999 && time.0 <= MAX_MILLIS).then_some(time)
}

/// 9999-12-31T23:59:59.999Z.
const MAX_MILLIS: i64 = 253_402_300_799_999;

/// The longest duration that is not taken for a mistake: a hundred years.
const MAX_DURATION: Duration = Duration::from_secs(100 * 366 * 24 * 3600);

const UNITS: [(&str, u64); 5] = [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];

/// Reads a duration as the HTTP interface, the configuration and the URLs write it: `"500ms"`,
/// `"10s"`, `"1m30s"`, `"2h"`, `"7d"`; units fall from left to right.
///
/// # Errors
///
/// [`Invalid`](crate::ErrorKind::Invalid) for anything else, for a sign and for more than a
/// hundred years.
///
/// ```
/// use std::time::Duration;
/// use broker_core::parse_duration;
///
/// assert_eq!(parse_duration("1m30s")?, Duration::from_secs(90));
/// assert!(parse_duration("10").is_err());
/// assert!(parse_duration("-1s").is_err());
/// # Ok::<(), broker_core::Error>(())
/// ```
pub fn parse_duration(text: &str) -> Result<Duration> {
    let invalid = |why: &str| {
        let shown: String = text.chars().take(40).collect();
        Error::invalid(format!("duration {shown:?}: {why}; write it as 500ms, 10s, 1m30s, 2h or 7d"))
    };
    let mut rest = text;
    let mut units = UNITS.iter();
    let mut millis: u64 = 0;
    if rest.is_empty() {
        return Err(invalid("it is empty"));
    }
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (number, after) = rest.split_at(digits);
        let letters = after.bytes().take_while(u8::is_ascii_alphabetic).count();
        let (unit, after) = after.split_at(letters);
        if number.is_empty() {
            return Err(invalid("a number is expected"));
        }
        let number: u64 = number.parse().map_err(|_| invalid("it is too long"))?;
        let (_, scale) = units.find(|(name, _)| *name == unit).ok_or_else(|| {
            invalid(if unit.is_empty() { "a number needs a unit" } else { "a unit is unknown or out of order" })
        })?;
        millis = number
            .checked_mul(*scale)
            .and_then(|part| millis.checked_add(part))
            .ok_or_else(|| invalid("it is too long"))?;
        rest = after;
    }
    let duration = Duration::from_millis(millis);
    if duration > MAX_DURATION { Err(invalid("it is too long")) } else { Ok(duration) }
}

/// Writes a duration so that [`parse_duration`] reads it back, to the millisecond.
///
/// ```
/// use std::time::Duration;
/// assert_eq!(broker_core::format_duration(Duration::from_millis(90_500)), "1m30s500ms");
/// assert_eq!(broker_core::format_duration(Duration::ZERO), "0s");
/// ```
pub fn format_duration(duration: Duration) -> String {
    let mut millis = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    if millis == 0 {
        return "0s".to_owned();
    }
    let mut text = String::new();
    for (unit, scale) in UNITS {
        // Hours are as far as people read: 48h rather than 2d, but days where they come out even.
        if millis >= scale && (unit != "d" || millis.is_multiple_of(scale)) {
            text.push_str(&format!("{}{unit}", millis / scale));
            millis %= scale;
        }
    }
    text
}

/// `#[serde(with = "broker_core::duration_text")]`: a [`Duration`] as text.
///
/// ```
/// #[derive(serde::Serialize, serde::Deserialize)]
/// struct Options {
///     #[serde(with = "broker_core::duration_text")]
///     timeout: std::time::Duration,
/// }
/// let options: Options = serde_json::from_str(r#"{"timeout":"1m30s"}"#).unwrap();
/// assert_eq!(options.timeout.as_secs(), 90);
/// ```
pub mod duration_text {
    use super::*;

    /// Writes the text.
    ///
    /// # Errors
    ///
    /// The serializer's own.
    pub fn serialize<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format_duration(*duration))
    }

    /// Reads the text.
    ///
    /// # Errors
    ///
    /// What [`parse_duration`] says.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        let text = Cow::<'de, str>::deserialize(deserializer)?;
        parse_duration(&text).map_err(|error| serde::de::Error::custom(error.message()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_round_trip() {
        for text in ["1ms", "500ms", "10s", "1m30s", "2h", "7d", "1h1ms", "0s"] {
            assert_eq!(format_duration(parse_duration(text).unwrap()), text);
        }
    }

    #[test]
    fn durations_that_are_none_are_refused() {
        for bad in [
            "",
            "s",
            "10",
            "-1s",
            "+1s",
            "1s1m",
            "1s1s",
            "1 s",
            "1.5s",
            "1w",
            "99999999999999999999s",
            "99999999999d",
            "ä",
        ] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn fractions_of_any_length_and_the_last_day_are_read() {
        for (text, read) in [
            ("2026-11-22T12:00:00.123456789012Z", "2026-11-22T12:00:00.123Z"),
            ("2026-11-22T12:00:00.1239999999999999+01:00", "2026-11-22T11:00:00.123Z"),
            ("2026-11-22T12:00:00.5Z", "2026-11-22T12:00:00.500Z"),
            ("9999-12-31T23:59:59Z", "9999-12-31T23:59:59.000Z"),
            ("9999-12-31T23:59:59.999999999999Z", "9999-12-31T23:59:59.999Z"),
            ("9999-12-31T12:00:00-11:59", "9999-12-31T23:59:00.000Z"),
            ("9999-12-30T21:00:00Z", "9999-12-30T21:00:00.000Z"),
        ] {
            let time: Timestamp = text.parse().unwrap();
            assert_eq!(time.to_string(), read, "{text}");
            assert_eq!(read.parse::<Timestamp>().unwrap(), time);
        }
        for bad in ["9999-12-31T23:59:59-01:00", "9999-12-31T23:59:59", "9999-12-32T00:00:00Z", "2026-11-22T12:00:00.Z"]
        {
            assert!(bad.parse::<Timestamp>().is_err(), "{bad}");
        }
        let time: Timestamp = "9999-12-31T23:59:59.999Z".parse().unwrap();
        assert_eq!(time.as_millis(), MAX_MILLIS);
    }

    #[test]
    fn times_beyond_the_calendar_still_print() {
        assert!(Timestamp::from_millis(i64::MAX).to_string().starts_with("9999-"));
        assert_eq!(Timestamp::from_millis(i64::MAX).to_string(), "9999-12-31T23:59:59.999Z");
        assert!(Timestamp::from_millis(i64::MIN).to_string().starts_with("-00"));
    }
}

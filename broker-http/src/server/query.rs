//! Paths and query parameters of a request: taken one by one, what is left over is an error.

use std::borrow::Cow;
use std::fmt::Display;
use std::str::FromStr;
use std::time::Duration;

use broker_core::parse_duration;
use http::Uri;
use percent_encoding::percent_decode_str;

use super::problem::{Answer, Problem};

/// The second segment of the path, decoded: the topic or the subscription's name of every route.
pub(crate) fn name_in_path(uri: &Uri) -> Answer<Cow<'_, str>> {
    let segment = uri.path().split('/').nth(2).unwrap_or_default();
    percent_decode_str(segment)
        .decode_utf8()
        .map_err(|_| Problem::invalid("the path is not UTF-8 once it is percent-decoded"))
}

/// The query parameters of a request.
pub(crate) struct Query<'a> {
    parameters: Vec<(Cow<'a, str>, Cow<'a, str>)>,
    known: Vec<&'static str>,
}

impl<'a> Query<'a> {
    pub(crate) fn of(uri: &'a Uri) -> Self {
        let query = uri.query().unwrap_or_default();
        Self { parameters: form_urlencoded::parse(query.as_bytes()).collect(), known: Vec::new() }
    }

    /// Takes the parameter `name`, if it is there once.
    pub(crate) fn text(&mut self, name: &'static str) -> Answer<Option<Cow<'a, str>>> {
        self.known.push(name);
        let mut values = self.parameters.extract_if(.., |(have, _)| have == name).map(|(_, value)| value);
        match (values.next(), values.next()) {
            (value, None) => Ok(value),
            (_, Some(_)) => Err(Problem::invalid(format!("query parameter {name} is given twice"))),
        }
    }

    /// Takes the parameter `name` and parses it.
    pub(crate) fn parsed<T: FromStr<Err: Display>>(&mut self, name: &'static str) -> Answer<Option<T>> {
        let parse = |text: Cow<'_, str>| text.parse().map_err(|error| broken(name, &text, &error));
        self.text(name)?.map(parse).transpose()
    }

    /// Takes the parameter `name` as a duration.
    pub(crate) fn duration(&mut self, name: &'static str) -> Answer<Option<Duration>> {
        let parse = |text: Cow<'_, str>| parse_duration(&text).map_err(|error| broken(name, &text, &error.message()));
        self.text(name)?.map(parse).transpose()
    }

    /// Takes the parameter `name` as a number within `range`.
    pub(crate) fn number(
        &mut self,
        name: &'static str,
        range: std::ops::RangeInclusive<usize>,
    ) -> Answer<Option<usize>> {
        let number = self.parsed::<usize>(name)?;
        if number.is_some_and(|number| !range.contains(&number)) {
            return Err(Problem::invalid(format!(
                "query parameter {name}: it is from {} to {}",
                range.start(),
                range.end()
            )));
        }
        Ok(number)
    }

    /// Checks that nothing is left.
    pub(crate) fn finish(self) -> Answer<()> {
        let Some((name, _)) = self.parameters.first() else { return Ok(()) };
        let shown: String = name.chars().take(40).collect();
        Err(Problem::invalid(if self.known.is_empty() {
            format!("query parameter {shown:?} is unknown; this takes none")
        } else {
            format!("query parameter {shown:?} is unknown; known: {}", self.known.join(", "))
        }))
    }
}

fn broken(name: &str, text: &str, why: &dyn Display) -> Problem {
    let shown: String = text.chars().take(40).collect();
    Problem::invalid(format!("query parameter {name}: {shown:?}: {why}"))
}

/// Checks that a request has no query parameter.
pub(crate) fn no_query(uri: &Uri) -> Answer<()> {
    Query::of(uri).finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_over_or_wrong_is_named() {
        let uri: Uri = "/subscriptions/a/pull?max=10&wait=5s&colour=red".parse().unwrap();
        let mut query = Query::of(&uri);
        assert_eq!(query.number("max", 1..=100).unwrap(), Some(10));
        assert_eq!(query.duration("wait").unwrap(), Some(Duration::from_secs(5)));
        let problem = format!("{:?}", query.finish().unwrap_err());
        assert!(problem.contains("colour") && problem.contains("max, wait"), "{problem}");

        let uri: Uri = "/x?max=0&max=1&wait=x".parse().unwrap();
        let mut query = Query::of(&uri);
        assert!(query.text("max").is_err());
        assert!(query.duration("wait").is_err());
        assert!(name_in_path(&"/topics/%ff".parse().unwrap()).is_err());
        assert_eq!(name_in_path(&"/topics/a%2Eb/stream".parse().unwrap()).unwrap(), "a.b");
    }
}

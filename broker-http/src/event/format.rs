//! Which of the forms a request's body has.

use broker_core::{Error, Result};
use http::HeaderMap;
use http::header::CONTENT_TYPE;

/// How a request carries messages, told by its `Content-Type` alone, as the CloudEvents HTTP
/// binding asks (section 3).
///
/// ```
/// use broker_http::event::Format;
/// use http::{HeaderMap, header::CONTENT_TYPE};
///
/// let mut headers = HeaderMap::new();
/// assert_eq!(Format::of(&headers)?, Format::Single);
/// headers.insert(CONTENT_TYPE, "application/cloudevents+json; charset=utf-8".parse().unwrap());
/// assert_eq!(Format::of(&headers)?, Format::Structured);
/// # Ok::<(), broker_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The payload is the body: a plain message, or a CloudEvent in binary mode.
    Single,
    /// One CloudEvent as JSON.
    Structured,
    /// A JSON array of CloudEvents.
    Batch,
    /// One message a line.
    Lines,
}

impl Format {
    /// The form these headers announce.
    ///
    /// # Errors
    ///
    /// [`Invalid`](broker_core::ErrorKind::Invalid) for a CloudEvents format other than JSON and for
    /// JSON in another charset than UTF-8.
    pub fn of(headers: &HeaderMap) -> Result<Self> {
        let Some(value) = headers.get(CONTENT_TYPE) else { return Ok(Self::Single) };
        // What is no text is no media type we know either.
        let Ok(text) = value.to_str() else { return Ok(Self::Single) };
        let format = match Self::named(text) {
            Some(format) => format,
            None if is_event(text) => {
                return Err(Error::invalid(format!(
                    "content-type {text:?}: of the CloudEvents formats, application/cloudevents+json and application/cloudevents-batch+json are understood"
                )));
            }
            None => return Ok(Self::Single),
        };
        match charset(text) {
            Some(charset) if !charset.eq_ignore_ascii_case("utf-8") => {
                Err(Error::invalid(format!("content-type {text:?}: JSON is in UTF-8, leave the charset out")))
            }
            _ => Ok(format),
        }
    }

    fn named(content_type: &str) -> Option<Self> {
        let essence = essence(content_type);
        let forms =
            [(super::EVENT_TYPE, Self::Structured), (super::BATCH_TYPE, Self::Batch), (super::LINES_TYPE, Self::Lines)];
        forms.into_iter().find(|(name, _)| essence.eq_ignore_ascii_case(name)).map(|(_, form)| form)
    }

    /// Whether a payload of this content type would be taken for one of the other forms, were it a
    /// request's body.
    pub(super) fn is_taken(content_type: &str) -> bool {
        Self::named(content_type).is_some() || is_event(content_type)
    }
}

/// Whether this is a CloudEvents format, known or not.
pub(crate) fn is_event(content_type: &str) -> bool {
    const EVENTS: &str = "application/cloudevents";
    essence(content_type).get(..EVENTS.len()).is_some_and(|text| text.eq_ignore_ascii_case(EVENTS))
}

/// The media type without its parameters; case means nothing in it.
pub(super) fn essence(content_type: &str) -> &str {
    content_type.split(';').next().unwrap_or_default().trim()
}

/// The charset parameter, unquoted.
pub(super) fn charset(content_type: &str) -> Option<&str> {
    content_type.split(';').skip(1).find_map(|parameter| {
        let (name, value) = parameter.split_once('=')?;
        name.trim().eq_ignore_ascii_case("charset").then(|| value.trim().trim_matches('"'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(content_type: &str) -> Result<Format> {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, content_type.parse().unwrap());
        Format::of(&headers)
    }

    #[test]
    fn is_told_by_the_media_type() {
        for (content_type, format) in [
            ("application/json", Format::Single),
            ("text/plain; charset=latin1", Format::Single),
            ("Application/CloudEvents+JSON ; Charset=\"UTF-8\"", Format::Structured),
            ("application/cloudevents-batch+json", Format::Batch),
            ("application/x-ndjson", Format::Lines),
        ] {
            assert_eq!(of(content_type).unwrap(), format, "{content_type}");
        }
        for bad in
            ["application/cloudevents+avro", "application/cloudevents", "application/cloudevents+json; charset=latin1"]
        {
            assert!(of(bad).is_err(), "{bad}");
        }
    }
}

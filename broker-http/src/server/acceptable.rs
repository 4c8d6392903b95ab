//! What `Accept` says of a media type (RFC 9110, sections 12.4.2 and 12.5.1).

use http::{HeaderMap, header};

/// Whether the sender refuses it, by a quality of zero. What it does not speak of it may be given all the same.
pub(crate) fn refuses(headers: &HeaderMap, media_type: &str) -> bool {
    let said = ranges(headers).filter_map(|range| Some((range.closeness(media_type)?, range.wanted)));
    // The most specific one decides; of two alike, the one that takes it.
    said.max().is_some_and(|(_, wanted)| !wanted)
}

/// Whether the sender asks for it by its name.
pub(crate) fn names(headers: &HeaderMap, media_type: &str) -> bool {
    ranges(headers).any(|range| range.wanted && range.essence.eq_ignore_ascii_case(media_type))
}

/// A media range, its parameters left out: those of ours have none.
struct Range<'a> {
    essence: &'a str,
    /// Its quality is more than zero.
    wanted: bool,
}

impl Range<'_> {
    /// How specific it is, if it means this type.
    fn closeness(&self, media_type: &str) -> Option<u8> {
        if self.essence.eq_ignore_ascii_case(media_type) {
            return Some(2);
        }
        let (kind, "*") = self.essence.split_once('/')? else { return None };
        let (of, _) = media_type.split_once('/')?;
        if kind == "*" { Some(0) } else { kind.eq_ignore_ascii_case(of).then_some(1) }
    }
}

fn ranges(headers: &HeaderMap) -> impl Iterator<Item = Range<'_>> {
    let values = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).map(|range| {
        let mut parts = range.split(';').map(str::trim);
        let essence = parts.next().unwrap_or_default();
        let quality = parts.filter_map(|part| part.split_once('=')).find(|(name, _)| name.eq_ignore_ascii_case("q"));
        let is_zero = |text: &str| text.parse::<f32>() == Ok(0.0);
        Range { essence, wanted: !quality.is_some_and(|(_, quality)| is_zero(quality)) }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_specific_range_decides() {
        for (accept, refused, named) in [
            ("", false, false),
            ("text/html", false, false),
            ("text/event-stream", false, true),
            ("Text/Event-Stream;q=0.5", false, true),
            ("text/event-stream;q=0", true, false),
            ("text/event-stream ; Q=0.000", true, false),
            ("*/*, text/event-stream;q=0", true, false),
            ("*/*;q=0, text/event-stream", false, true),
            ("text/*;q=0, */*", true, false),
            ("text/*, */*;q=0", false, false),
            ("*/*;q=0", true, false),
            ("application/*;q=0", false, false),
            ("text/event-stream;q=0, text/event-stream;q=1", false, true),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(header::ACCEPT, accept.parse().unwrap());
            let said = (refuses(&headers, "text/event-stream"), names(&headers, "text/event-stream"));
            assert_eq!(said, (refused, named), "{accept}");
        }
    }
}

//! The W3C trace context of a request and of a message: what is passed on of it, and what is none.

use broker_core::{Message, Result};
use http::{HeaderMap, HeaderName, HeaderValue};

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// Bytes of a `traceparent` of a version that is yet to come; ours has 55.
const MAX_PARENT: usize = 255;
/// Bytes of a `tracestate` that everybody passes on (section 3.3.1.5).
const MAX_STATE: usize = 512;
/// A member that is longer goes first where they are too many bytes.
const LONG_MEMBER: usize = 128;
/// Members of it at most (section 3.3.1.1).
const MAX_MEMBERS: usize = 32;

/// The headers of a message that are HTTP headers as well, where they are well formed (W3C Trace
/// Context): a receiver need not know us to go on with the trace.
pub fn trace_context(message: &Message) -> impl Iterator<Item = (HeaderName, HeaderValue)> {
    let (parent, state) = of_message(message).unzip();
    let parent = parent.and_then(|parent| HeaderValue::from_str(parent).ok());
    let state = state.flatten().and_then(|state| HeaderValue::try_from(state).ok());
    [(TRACEPARENT, parent), (TRACESTATE, state)].into_iter().filter_map(|(name, value)| Some((name, value?)))
}

/// Takes the request's trace context as message headers, unless the message brings its own. What is
/// malformed is no context, as the standard asks.
///
/// # Errors
///
/// None: these are names that a message's header may have.
pub fn take_trace_context(headers: &HeaderMap, message: &mut Message) -> Result<()> {
    if message.headers().get("traceparent").is_some() {
        return Ok(());
    }
    let Some((parent, state)) = of_request(headers) else { return Ok(()) };
    message.headers_mut().append("traceparent", parent.to_owned())?;
    if let Some(state) = state.filter(|_| message.headers().get("tracestate").is_none()) {
        message.headers_mut().append("tracestate", state)?;
    }
    Ok(())
}

/// The `traceparent` of a request and what its `tracestate` headers say together.
pub(crate) fn of_request(headers: &HeaderMap) -> Option<(&str, Option<String>)> {
    let mut parents = headers.get_all(TRACEPARENT).iter();
    let parent = parents.next().and_then(|value| value.to_str().ok());
    // Of two nobody knows which one counts.
    let parent = parent.filter(|text| is_parent(text) && parents.next().is_none())?;
    let states = headers.get_all(TRACESTATE).iter().map(|value| value.to_str().ok());
    Some((parent, states.collect::<Option<Vec<_>>>().and_then(|states| together(&states))))
}

/// The same of a message.
pub(crate) fn of_message(message: &Message) -> Option<(&str, Option<String>)> {
    let headers = message.headers();
    let parent = headers.get_str("traceparent").filter(|text| is_parent(text))?;
    let states = headers.get_all("tracestate").map(|value| std::str::from_utf8(value).ok());
    Some((parent, states.collect::<Option<Vec<_>>>().and_then(|states| together(&states))))
}

/// Section 3.2: version, trace, parent and flags. Version `ff` is forbidden, and so are ids of zeros alone; versions later
/// than `00` may add parts.
fn is_parent(text: &str) -> bool {
    let hex = |text: &str| text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    let mut parts = text.split('-');
    let mut part = |length: usize| parts.next().filter(|part| part.len() == length && hex(part));
    let (Some(version), Some(trace), Some(parent), Some(_)) = (part(2), part(32), part(16), part(2)) else {
        return false;
    };
    let says = |id: &str| id.bytes().any(|byte| byte != b'0');
    let ends = version != "00" || parts.next().is_none();
    version != "ff" && says(trace) && says(parent) && ends && text.len() <= MAX_PARENT
}

/// What several `tracestate` headers say, in their order (section 3.3.1): one list. What is too much of it is left out by
/// whole members, long ones first and then from the end, as section 3.3.1.5 asks.
fn together(values: &[&str]) -> Option<String> {
    let members = values.iter().flat_map(|value| value.split(','));
    let mut members: Vec<_> =
        members.map(|member| member.trim_matches([' ', '\t'])).filter(|member| !member.is_empty()).collect();
    if !members.iter().all(|member| member.bytes().all(|byte| (b' '..=b'~').contains(&byte))) {
        return None;
    }
    let bytes = |members: &[&str]| members.iter().map(|member| member.len() + 1).sum::<usize>().saturating_sub(1);
    if bytes(&members) > MAX_STATE {
        members.retain(|member| member.len() <= LONG_MEMBER);
    }
    members.truncate(MAX_MEMBERS);
    while bytes(&members) > MAX_STATE {
        members.pop();
    }
    (!members.is_empty()).then(|| members.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn a_parent_is_what_the_standard_calls_one() {
        let with = |version: &str, rest: &str| format!("{version}{}{rest}", PARENT.trim_start_matches("00"));
        for good in [with("00", ""), with("01", ""), with("cc", "-what-comes-later"), with("fe", "-")] {
            assert!(is_parent(&good), "{good}");
        }
        for bad in [
            with("ff", ""),
            with("00", "-x"),
            with("00", "-"),
            with("01", "x"),
            with("0", ""),
            with("0A", ""),
            with("cc", &"-x".repeat(150)),
            "00-00000000000000000000000000000000-b7ad6b7169203331-01".to_owned(),
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01".to_owned(),
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01".to_owned(),
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331".to_owned(),
            String::new(),
        ] {
            assert!(!is_parent(&bad), "{bad}");
        }
    }

    #[test]
    fn states_are_one_list_and_bounded() {
        assert_eq!(together(&["a=1", "b=2 ,\tc=3", "", " , "]).as_deref(), Some("a=1,b=2,c=3"));
        assert_eq!(together(&["", ","]), None);
        assert_eq!(together(&["a=1", "b=ü"]), None);
        // A long one goes before others do.
        let (long, short) = (format!("l={}", "x".repeat(220)), format!("s={}", "x".repeat(100)));
        assert_eq!(together(&[&long, &long]), Some(format!("{long},{long}")));
        assert_eq!(together(&[&short, &long, &short, &short]), Some([&*short; 3].join(",")));
        assert_eq!(together(&[&*short; 9]), Some([&*short; 4].join(",")));
        assert_eq!(together(&["a=1"; 100]), Some(["a=1"; 32].join(",")));
    }

    #[test]
    fn two_parents_are_none() {
        let mut headers = HeaderMap::new();
        headers.append(TRACEPARENT, HeaderValue::from_static(PARENT));
        headers.append(TRACESTATE, HeaderValue::from_static("a=1"));
        headers.append(TRACESTATE, HeaderValue::from_static("b=2"));
        assert_eq!(of_request(&headers), Some((PARENT, Some("a=1,b=2".to_owned()))));
        headers.append(TRACEPARENT, HeaderValue::from_static(PARENT));
        assert_eq!(of_request(&headers), None);
    }
}

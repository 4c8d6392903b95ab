//! Topics, filters, groups, durations, times and URLs: what is parsed once and never checked again.
#![no_main]

use broker_core::{BrokerUrl, Group, GroupName, Timestamp, Topic, TopicFilter, format_duration, parse_duration};
use broker_http::push::Allowed;
use broker_http::{CertificateName, Endpoint, TokenHash};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (text, other) = text.split_once('\n').unwrap_or((text, ""));
    if let Ok(duration) = parse_duration(text) {
        assert_eq!(parse_duration(&format_duration(duration)).expect("our own text"), duration);
    }
    if let Ok(filter) = TopicFilter::new(text) {
        assert!(filter.covers(&filter));
        if let (Ok(topic), Ok(within)) = (Topic::new(other), TopicFilter::new(other)) {
            // What is covered is matched, and what is matched is covered.
            assert_eq!(filter.matches(&topic), filter.covers(&within));
        }
    }
    let _ = GroupName::new(text).map(|name| assert_eq!(name.as_str(), text));
    let _ = text.parse::<Group>().map(|group| assert_eq!(group.to_string().parse::<Group>().expect("ours"), group));
    let _ = text.parse::<Timestamp>();
    let _ = text.parse::<Allowed>().map(|allowed| assert!(allowed.to_string().parse::<Allowed>().is_ok()));
    let _ = text.parse::<TokenHash>().map(|hash| assert!(hash.to_string().parse::<TokenHash>().is_ok()));
    let _ = text.parse::<CertificateName>();
    let _ = text.parse::<Endpoint>().map(|endpoint| assert!(endpoint.to_string().parse::<Endpoint>().is_ok()));
    let _ = BrokerUrl::parse(text);
});

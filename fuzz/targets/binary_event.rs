//! `POST /topics/{topic}`: a plain message or a CloudEvent in binary mode.
#![no_main]

mod head;

use broker_core::Topic;
use broker_http::event::binary::Mode;
use broker_http::event::{Envelope, Format, Options, binary};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let request = head::request(data);
    let _ = Format::of(&request.headers);
    let Ok(options) = Options::parse(request.query.as_deref(), &request.headers) else { return };
    let topic = Topic::new("orders.created").expect("a topic");
    let Ok(decoded) = binary::decode(&request.headers, &options, request.body.clone(), Some(&topic)) else { return };
    // What was taken can be sent on, and what is sent can be read.
    let mut headers = http::HeaderMap::new();
    let body = binary::encode(Envelope::new(&topic, &decoded.message), Mode::Binary, &mut headers);
    if binary::fits(&decoded.message) {
        let options = Options::parse(None, &headers).expect("our own options");
        let again = binary::decode(&headers, &options, body, Some(&topic)).expect("our own headers");
        assert_eq!(again.message.id(), decoded.message.id());
        assert_eq!(again.message.payload(), decoded.message.payload());
        assert_eq!(again.message.key(), decoded.message.key());
    }
});

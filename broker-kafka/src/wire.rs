//! Records as librdkafka has them.

use std::panic::{AssertUnwindSafe, catch_unwind};

use broker_core::{Message, Timestamp};
use rdkafka::message::{Header, Headers as _, Message as RdMessage, OwnedHeaders};
use smallvec::SmallVec;

use crate::record::{Copies, Decoded, Field, Format, Writer, from_headers, place};

/// Reads a record.
pub(crate) fn decode(record: &impl RdMessage, format: Format, copies: &mut Copies) -> Decoded {
    let bare = |id| {
        let payload = record.payload().map(|payload| copies.copy(payload));
        let message =
            Message::received(id, Timestamp::from_millis(record.timestamp().to_millis().unwrap_or(0)), payload);
        match record.key() {
            Some(key) => message.with_key(copies.copy(key)),
            None => message,
        }
    };
    let mut headers: SmallVec<[Field<'_>; 6]> = SmallVec::new();
    // rdkafka panics at a name that is not UTF-8; there is no other way to read one.
    let read = catch_unwind(AssertUnwindSafe(|| {
        for header in record.headers().into_iter().flat_map(|headers| headers.iter()) {
            headers.push((header.key, header.value.unwrap_or_default()));
        }
    }));
    let place = || place(record.topic(), record.partition(), record.offset());
    let mut decoded = from_headers(bare, &headers, format, place);
    if read.is_err() && decoded.problem.is_none() {
        decoded.problem = Some("the name of a header is not UTF-8; it and those after it are left out".into());
    }
    decoded
}

/// Headers under construction; always there between two calls, and taken out without making others.
pub(crate) struct Written(Option<OwnedHeaders>);

impl Writer for Written {
    fn with_capacity(capacity: usize) -> Self {
        Self(Some(OwnedHeaders::new_with_capacity(capacity)))
    }

    fn put(&mut self, name: &str, value: &[u8]) {
        self.0 = self.0.take().map(|headers| headers.insert(Header { key: name, value: Some(value) }));
    }
}

impl From<Written> for OwnedHeaders {
    fn from(written: Written) -> Self {
        written.0.unwrap_or_default()
    }
}

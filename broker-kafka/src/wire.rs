//! Records as librdkafka has them.

use broker_core::{Message, Timestamp};
use rdkafka::message::{Header, Headers as _, Message as RdMessage, OwnedHeaders};
use smallvec::SmallVec;

use crate::batch::Record;
use crate::record::{Copies, Decoded, Field, Format, Writer, from_headers, keep_strange, place};

/// Reads a record.
pub(crate) fn decode(record: &Record<'_>, format: Format, copies: &mut Copies) -> Decoded {
    let bare = |id| {
        let payload = record.payload().map(|payload| copies.copy(payload));
        let message =
            Message::received(id, Timestamp::from_millis(record.timestamp().to_millis().unwrap_or(0)), payload);
        match record.key() {
            Some(key) => message.with_key(copies.copy(key)),
            None => message,
        }
    };
    let mut fields: SmallVec<[Field<'_>; 6]> = SmallVec::new();
    let mut strange: SmallVec<[(&[u8], &[u8]); 0]> = SmallVec::new();
    if let Some(headers) = record.headers() {
        for (name, value) in (0..headers.count()).map_while(|index| headers.bytes(index)) {
            match std::str::from_utf8(name) {
                Ok(name) => fields.push((name, value)),
                Err(_) => strange.push((name, value)),
            }
        }
    }
    let place = || place(record.topic(), record.partition(), record.offset());
    let mut decoded = from_headers(bare, &fields, format, place);
    if !strange.is_empty() {
        keep_strange(decoded.message.headers_mut(), &strange);
        decoded.problem.get_or_insert_with(|| "the name of a header is not UTF-8".into());
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

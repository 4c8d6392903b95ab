// A request out of fuzzed bytes: a query, header lines, an empty line, a body.

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue};

#[allow(dead_code, reason = "not every target reads all of it")]
pub struct Request {
    pub query: Option<String>,
    pub headers: HeaderMap,
    pub body: Bytes,
}

pub fn request(data: &[u8]) -> Request {
    let split = data.windows(2).position(|pair| pair == b"\n\n");
    let (head, body) = match split {
        Some(at) => (&data[..at], &data[at + 2..]),
        None => (data, &[][..]),
    };
    let mut lines = head.split(|byte| *byte == b'\n');
    let query = lines.next().and_then(|line| std::str::from_utf8(line).ok());
    let query = query.filter(|query| !query.is_empty()).map(str::to_owned);
    let mut headers = HeaderMap::new();
    for line in lines.take(100) {
        let Some(colon) = line.iter().position(|byte| *byte == b':') else { continue };
        let (name, value) = line.split_at(colon);
        if let (Ok(name), Ok(value)) =
            (HeaderName::from_bytes(name.trim_ascii()), HeaderValue::from_bytes(value[1..].trim_ascii()))
        {
            headers.append(name, value);
        }
    }
    Request { query, headers, body: Bytes::copy_from_slice(body) }
}

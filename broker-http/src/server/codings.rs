//! Transfer codings of requests: `chunked` and no other.
//!
//! The parser looks for the end of a body alone, and so at the last coding alone: `gzip, chunked` is chunked to it, and
//! what it gives is the gzip.

use broker_core::ErrorKind;
use http::{HeaderMap, StatusCode, header};

use super::problem::{Answer, Problem};

/// Checks that a body is what its sender says it is once it is no longer chunked.
///
/// # Errors
///
/// 501 for a coding that is not understood (RFC 9112, section 6.1), 400 for a body that is chunked twice (section 7).
pub(crate) fn check(headers: &HeaderMap) -> Answer<()> {
    let values = headers.get_all(header::TRANSFER_ENCODING).iter();
    let codings = values.flat_map(|value| value.as_bytes().split(|byte| *byte == b','));
    let mut chunked = false;
    // An empty element of a list is none (RFC 9110, section 5.6.1.2).
    for coding in codings.map(<[u8]>::trim_ascii).filter(|coding| !coding.is_empty()) {
        if !coding.eq_ignore_ascii_case(b"chunked") {
            return Err(Problem::new(
                StatusCode::NOT_IMPLEMENTED,
                ErrorKind::Unsupported,
                "transfer-encoding: chunked is understood and no other; compress a body by content-encoding, gzip or zstd",
            ));
        }
        if std::mem::replace(&mut chunked, true) {
            return Err(Problem::invalid("transfer-encoding: a body is chunked once"));
        }
    }
    Ok(())
}

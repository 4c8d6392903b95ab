//! Reading a request's body: bounded in bytes and time, and kind to the sender of one too large.

use std::future::poll_fn;
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use axum::body::Body;
use broker_core::ErrorKind;
use bytes::{Bytes, BytesMut};
use http::{HeaderMap, StatusCode};
use http_body::Body as _;
use http_body_util::BodyExt;
use tokio::time::{Instant, timeout_at};

use super::Shared;
use super::access::Caller;
use super::inflate::{Encoding, inflate};
use super::limits::Limits;
use super::memory::Reservation;
use super::problem::{Answer, Problem};

/// Bytes up to which a body is copied out of the connection's read buffer, so that a small message
/// in a backlog does not keep a large buffer alive.
const COPIED_BYTES: usize = 16 << 10;

/// Reads a body of at most `limit` bytes, after inflation; the reservation is for what it holds.
///
/// # Errors
///
/// 413 beyond, 415 for an encoding we do not know, 408 if it does not arrive in time, 400 if it
/// breaks off, 503 where there is no memory left for it.
pub(crate) async fn collect(
    headers: &HeaderMap,
    body: Body,
    limit: usize,
    shared: &Shared,
    caller: Option<&Caller>,
) -> Answer<(Bytes, Reservation)> {
    collect_on(headers, body, limit, shared, shared.ledger.room().of(caller.map(Caller::bodies))).await
}

/// Reads a request's JSON; it is taken at the bound of memory too, since it may be what makes room.
///
/// # Errors
///
/// As of [`collect`], but 503.
pub(crate) async fn collect_json(
    headers: &HeaderMap,
    body: Body,
    shared: &Shared,
    caller: Option<&Caller>,
) -> Answer<(Bytes, Reservation)> {
    let reservation = shared.ledger.grant().of(caller.map(Caller::bodies));
    collect_on(headers, body, shared.limits().json_body_bytes, shared, reservation).await
}

async fn collect_on(
    headers: &HeaderMap,
    body: Body,
    limit: usize,
    shared: &Shared,
    mut reservation: Reservation,
) -> Answer<(Bytes, Reservation)> {
    let limits = shared.limits();
    let encoding = Encoding::of(headers)?;
    let announced = body.size_hint().lower();
    if announced > limit as u64 {
        return Err(too_large(limit, announced));
    }
    reservation.expect(announced)?;
    let bytes = read(body, limit, &limits, &mut reservation).await?;
    match encoding {
        None if bytes.len() <= COPIED_BYTES => Ok((Bytes::copy_from_slice(&bytes), reservation)),
        None => Ok((bytes, reservation)),
        Some(encoding) => inflate(encoding, bytes, limit, reservation).await,
    }
}

async fn read(mut body: Body, limit: usize, limits: &Limits, reservation: &mut Reservation) -> Answer<Bytes> {
    let expected = usize::try_from(body.size_hint().lower()).unwrap_or(limit).min(limit);
    let mut deadline = Deadline::after(limits.body_timeout);
    let mut first = Bytes::new();
    let mut collected = BytesMut::new();
    while let Some(data) = next_data(&mut body, &mut deadline).await? {
        if first.len() + collected.len() + data.len() > limit {
            return Err(too_large(limit, 0));
        }
        reservation.reach((first.len() + collected.len() + data.len()) as u64)?;
        // Most bodies are one piece, which is then not copied together.
        if first.is_empty() && collected.is_empty() {
            first = data;
            continue;
        }
        if collected.is_empty() {
            collected.reserve(expected.max(first.len() + data.len()));
            collected.extend_from_slice(&std::mem::take(&mut first));
        }
        collected.extend_from_slice(&data);
    }
    Ok(if collected.is_empty() { first } else { collected.freeze() })
}

/// When a body must have arrived: counted from the first time it is waited for, since most are
/// there with their headers and need no clock.
pub(crate) struct Deadline {
    after: Duration,
    at: Option<Instant>,
}

impl Deadline {
    pub(crate) fn after(after: Duration) -> Self {
        Self { after, at: None }
    }

    fn at(&mut self) -> Instant {
        *self.at.get_or_insert_with(|| Instant::now() + self.after)
    }
}

/// The next piece of a body, until the deadline; trailers are read and dropped.
pub(crate) async fn next_data(body: &mut Body, deadline: &mut Deadline) -> Answer<Option<Bytes>> {
    loop {
        let mut frame = pin!(body.frame());
        let frame = match poll_fn(|cx| Poll::Ready(frame.as_mut().poll(cx))).await {
            Poll::Ready(frame) => Ok(frame),
            Poll::Pending => timeout_at(deadline.at(), frame).await,
        };
        let frame = match frame {
            Err(_) => {
                return Err(Problem::new(
                    StatusCode::REQUEST_TIMEOUT,
                    ErrorKind::Timeout,
                    "the body did not arrive in time; send it faster or in smaller requests",
                )
                .closing());
            }
            Ok(None) => return Ok(None),
            Ok(Some(Err(error))) => {
                return Err(Problem::invalid(format!("the body broke off: {error}")).closing());
            }
            Ok(Some(Ok(frame))) => frame,
        };
        if let Ok(data) = frame.into_data()
            && !data.is_empty()
        {
            return Ok(Some(data));
        }
    }
}

fn too_large(limit: usize, announced: u64) -> Problem {
    let what = if announced > 0 { format!("a body of {announced} bytes") } else { "the body".to_owned() };
    Problem::too_large(format!("{what} is over the limit of {limit} bytes"))
}

/// Reads the JSON of a request; an empty body is `None`.
pub(crate) async fn json<T: serde::de::DeserializeOwned>(
    headers: &HeaderMap,
    body: Body,
    shared: &Shared,
    caller: Option<&Caller>,
) -> Answer<Option<T>> {
    let (bytes, _reservation) = collect_json(headers, body, shared, caller).await?;
    read_json(&bytes)
}

/// The JSON of a body; an empty one is `None`.
///
/// # Errors
///
/// 400 that says where it is not what was expected.
pub(crate) fn read_json<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Answer<Option<T>> {
    if bytes.is_empty() {
        return Ok(None);
    }
    // An array would be taken for the fields in their order.
    if bytes.trim_ascii_start().first() == Some(&b'[') {
        return Err(Problem::invalid("the JSON: an object is expected"));
    }
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut reader).map_err(|error| {
        let path = error.path().to_string();
        let why = error.into_inner();
        Problem::invalid(if path == "." { format!("the JSON: {why}") } else { format!("{path}: {why}") })
    })?;
    reader.end().map_err(|error| Problem::invalid(format!("the JSON: {error}")))?;
    Ok(Some(value))
}

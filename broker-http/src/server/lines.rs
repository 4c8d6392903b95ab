//! NDJSON with `Accept: application/x-ndjson`: one result a line as it is known, while the body is
//! still being read, so that a file of any length takes constant memory.

use std::collections::VecDeque;
use std::sync::Arc;

use axum::body::Body;
use axum::response::Response;
use broker_core::{Error, ErrorKind, TopicFilter};
use bytes::{Buf, Bytes, BytesMut};
use futures_util::stream;
use http::{HeaderMap, HeaderValue, StatusCode, header};

use super::access::{Action, Caller, Gate, Revoked};
use super::inflate::{Encoding, Inflating};
use super::memory::Reservation;
use super::metrics::Refusal;
use super::problem::{Answer, Problem};
use super::publish::{Outgoing, ends_stream, publish_all, write_problem, write_result};
use super::publishers::Published;
use super::{Shared, body};
use crate::event::{LINES_TYPE, Options};
use crate::traces::Parent;

/// Lines published in one go.
pub(crate) const AT_ONCE: usize = 256;

/// The lines of a body that say something, with their numbers.
pub(crate) fn of(body: &[u8]) -> impl Iterator<Item = (u64, &[u8])> {
    let ends = memchr::memchr_iter(b'\n', body).chain(std::iter::once(body.len()));
    let mut begin = 0;
    let lines = ends.map(move |end| {
        let line = body.get(begin..end).unwrap_or_default();
        begin = end + 1;
        line
    });
    (1..).zip(lines).filter(|(_, line)| !line.trim_ascii().is_empty())
}

/// Whether the sender wants results as they are known.
pub(crate) fn wants_stream(headers: &HeaderMap) -> bool {
    headers.get_all(header::ACCEPT).iter().any(|value| {
        let text = value.to_str().unwrap_or_default();
        text.split(',').any(|range| range.split(';').next().unwrap_or_default().trim().eq_ignore_ascii_case(LINES_TYPE))
    })
}

/// Answers at once, then reads, publishes and tells, piece by piece. A sender that does not read
/// the results is not read from either.
pub(crate) async fn stream(
    shared: &Arc<Shared>,
    published: Arc<Published>,
    options: Options,
    caller: Option<Caller>,
    headers: &HeaderMap,
    body: Body,
    has_key: bool,
) -> Answer {
    let encoding = match Encoding::of(headers) {
        Ok(encoding) => encoding,
        Err(problem) => return Err(body::refuse(headers, body, &shared.limits(), problem).await),
    };
    let problem = if has_key {
        Some(Problem::invalid("idempotency-key: the answer to a stream of lines is not kept; give each line a dedup"))
    } else if encoding == Some(Encoding::Zstd) {
        Some(Problem::invalid("content-encoding: a stream of lines is compressed by gzip, or sent as it is"))
    } else {
        options.check_many().err().map(Problem::from)
    };
    if let Some(problem) = problem {
        return Err(body::refuse(headers, body, &shared.limits(), problem).await);
    }
    let filter = TopicFilter::from(published.topic());
    let lines = Lines {
        shared: Arc::clone(shared),
        revoked: Gate::revoked(shared, caller.clone(), &[Action::Publish], filter),
        published,
        options,
        caller,
        parent: shared.traces.parent(headers),
        body,
        reservation: shared.ledger.reserve(0)?,
        gzip: encoding.map(|_| Box::new(Inflating::new())),
        buffer: BytesMut::new(),
        pending: VecDeque::new(),
        number: 0,
        skipping: false,
        ended: false,
    };
    let results = stream::unfold(lines, |mut lines| async move { Some((Ok::<_, Error>(lines.next().await?), lines)) });
    let mut response = Response::new(Body::from_stream(results));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(LINES_TYPE));
    Ok(response)
}

struct Lines {
    shared: Arc<Shared>,
    published: Arc<Published>,
    options: Options,
    caller: Option<Caller>,
    revoked: Revoked,
    parent: Parent,
    body: Body,
    reservation: Reservation,
    /// Where the body is compressed.
    gzip: Option<Box<Inflating>>,
    /// What was read and is no whole line yet.
    buffer: BytesMut,
    /// Whole lines, or what is wrong in their place.
    pending: VecDeque<Result<(u64, Bytes), Problem>>,
    /// Of the line that ended last; empty ones count.
    number: u64,
    /// Within a line that is too long.
    skipping: bool,
    ended: bool,
}

impl Lines {
    /// The next results, or `None` at the end.
    async fn next(&mut self) -> Option<Bytes> {
        while self.pending.is_empty() {
            if self.ended {
                return None;
            }
            self.read().await;
        }
        let mut out = Vec::new();
        let lines = self.pending.len().min(AT_ONCE);
        let published = Arc::clone(&self.published);
        let mut messages = Outgoing::to(&published);
        let drained: Vec<_> = self.pending.drain(..lines).collect();
        for line in drained {
            match line {
                Ok((number, line)) => messages.push_line(number, &line, &self.options),
                Err(problem) => {
                    // It stands alone or last: what came before is published first, in order.
                    self.ended |=
                        self.publish(std::mem::replace(&mut messages, Outgoing::to(&published)), &mut out).await;
                    write_problem(&mut out, &problem);
                    out.push(b'\n');
                }
            }
        }
        if self.publish(messages, &mut out).await {
            self.pending.clear();
            self.ended = true;
        }
        Some(out.into())
    }

    /// Publishes lines and appends their results; true if no further one could be published.
    async fn publish(&mut self, messages: Outgoing<'_>, out: &mut Vec<u8>) -> bool {
        let count = messages.len();
        if count == 0 {
            return false;
        }
        let (shared, published) = (&*self.shared, &*self.published);
        if let Err(problem) = published.check_room() {
            for _ in 0..count {
                write_problem(out, &problem);
                out.push(b'\n');
            }
            return false;
        }
        let results = match publish_all(shared, &self.options, self.caller.as_ref(), &self.parent, messages).await {
            Ok(results) => results,
            Err(error) => vec![Err(error); count],
        };
        let mut ends = false;
        for result in results {
            ends |= result.as_ref().is_err_and(ends_stream);
            write_result(out, published.topic(), result);
            out.push(b'\n');
        }
        if let Some(caller) = &self.caller {
            caller.pace().await;
        }
        ends
    }

    async fn read(&mut self) {
        if let Some(piece) = self.gzip.as_mut().and_then(|gzip| gzip.next()) {
            self.take(piece);
            // Little can inflate to much: others run meanwhile.
            return tokio::task::yield_now().await;
        }
        let mut deadline = body::Deadline::after(self.shared.limits().body_timeout);
        let data = tokio::select! {
            biased;
            () = self.revoked.as_mut() => Err(Problem::new(
                StatusCode::FORBIDDEN,
                ErrorKind::Unauthorized,
                "publishing here is no longer allowed; the lines that follow are not published",
            )
            .counted(Refusal::Forbidden)),
            data = body::next_data(&mut self.body, &mut deadline) => data,
        };
        match data {
            Ok(Some(data)) => match &mut self.gzip {
                Some(gzip) => gzip.feed(data),
                None => self.take(Ok(data)),
            },
            Ok(None) => {
                if let Some(rest) = self.gzip.as_mut().map(|gzip| gzip.finish()) {
                    self.take(rest);
                }
                if std::mem::replace(&mut self.ended, true) {
                    return;
                }
                let last = self.buffer.split().freeze();
                if !self.skipping && !last.trim_ascii().is_empty() {
                    self.pending.push_back(Ok((self.number + 1, last)));
                }
            }
            Err(problem) => self.take(Err::<Bytes, _>(problem)),
        }
    }

    /// Takes what came of the body, or ends with what is wrong with it.
    fn take(&mut self, data: Answer<impl AsRef<[u8]>>) {
        let taken = data.and_then(|data| {
            // Of a line and what came with it; given back with the stream.
            self.reservation.reach((self.buffer.len() + data.as_ref().len()) as u64)?;
            self.split(data.as_ref());
            Ok(())
        });
        if let Err(problem) = taken {
            self.ended = true;
            self.pending.push_back(Err(problem));
        }
    }

    fn split(&mut self, data: &[u8]) {
        let max = self.shared.limits().message_body_bytes * 2;
        let mut rest = data;
        while let Some(end) = memchr::memchr(b'\n', rest) {
            let (head, tail) = rest.split_at(end);
            rest = tail.get(1..).unwrap_or_default();
            self.number += 1;
            if std::mem::take(&mut self.skipping) {
                continue;
            }
            self.buffer.extend_from_slice(head);
            let line = self.buffer.split().freeze();
            if line.len() > max {
                self.pending.push_back(Err(too_long(self.number, max)));
            } else if !line.trim_ascii().is_empty() {
                self.pending.push_back(Ok((self.number, line)));
            }
        }
        if self.skipping {
            return;
        }
        self.buffer.extend_from_slice(rest);
        if self.buffer.len() > max {
            self.buffer.advance(self.buffer.len());
            self.skipping = true;
            self.pending.push_back(Err(too_long(self.number + 1, max)));
        }
    }
}

fn too_long(number: u64, max: usize) -> Problem {
    Problem::too_large(format!("line {number} is over the limit of {max} bytes"))
}

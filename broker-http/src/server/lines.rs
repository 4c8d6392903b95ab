//! NDJSON with `Accept: application/x-ndjson`: one result a line as it is known, while the body is
//! still being read, so that a file of any length takes constant memory.

use std::sync::Arc;

use axum::body::Body;
use axum::response::Response;
use broker_core::{Error, ErrorKind, TopicFilter};
use bytes::{Buf, Bytes, BytesMut};
use futures_util::{FutureExt as _, stream};
use http::{HeaderMap, HeaderValue, StatusCode, header};

use super::access::{Action, Caller, Ended, Right};
use super::inflate::{Encoding, Inflating};
use super::memory::Reservation;
use super::metrics::Refusal;
use super::problem::{Answer, Problem};
use super::publish::{Outgoing, RESULT_BYTES, ends_stream, publish_all, write_problem, write_result};
use super::publishers::Published;
use super::{Shared, acceptable, body};
use crate::event::{LINES_TYPE, Options};
use crate::traces::Parent;

/// Lines published in one go.
pub(crate) const AT_ONCE: usize = 128;

/// Bytes that are read, where they have arrived, before the lines before them are published.
const AHEAD_BYTES: usize = 16 << 10;

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
    acceptable::names(headers, LINES_TYPE)
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
    let encoding = Encoding::of(headers)?;
    let problem = if has_key {
        Some(Problem::invalid("idempotency-key: the answer to a stream of lines is not kept; give each line a dedup"))
    } else {
        options.check_many().err().map(Problem::from)
    };
    if let Some(problem) = problem {
        return Err(problem);
    }
    let filter = TopicFilter::from(published.topic());
    let lines = Lines {
        shared: Arc::clone(shared),
        revoked: Right::of(shared, caller.clone(), &[Action::Publish], filter).ended(),
        published,
        options,
        reservation: shared.ledger.room().of(caller.as_ref().map(Caller::bodies)),
        caller,
        parent: shared.traces.parent(headers),
        body,
        inflating: encoding.map(Inflating::new),
        unread: Bytes::new(),
        begun: BytesMut::new(),
        number: 0,
        skipping: false,
        silence: 0,
        max_silence: shared.limits().batch_body_bytes,
        deadline: body::Deadline::after(shared.limits().body_timeout),
        line_ended: false,
        failed: None,
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
    revoked: Ended,
    parent: Parent,
    body: Body,
    reservation: Reservation,
    /// Where the body is compressed.
    inflating: Option<Inflating>,
    /// What has arrived and was not looked at yet.
    unread: Bytes,
    /// A line whose end has not arrived yet.
    begun: BytesMut,
    /// Of the line that ended last; empty ones count.
    number: u64,
    /// Within a line that is too long.
    skipping: bool,
    /// Bytes since the last line that said something: of empty lines, and of such as are too long.
    silence: usize,
    /// How many of them there may be.
    max_silence: usize,
    /// When the line being waited for must have ended; its clock begins where it is first waited for.
    deadline: body::Deadline,
    /// A line has ended since.
    line_ended: bool,
    /// What ended the body early, to be told after the lines before it.
    failed: Option<Problem>,
    /// Nothing more arrives.
    ended: bool,
}

impl Lines {
    /// The next results, or `None` at the end.
    async fn next(&mut self) -> Option<Bytes> {
        let published = Arc::clone(&self.published);
        let mut messages = Outgoing::to(&published, self.reservation.bytes());
        let mut out = Vec::new();
        let max = self.shared.limits().message_body_bytes * 2;
        let mut ahead = 0;
        loop {
            match self.next_line(max) {
                Some(Ok((number, line))) => {
                    if messages.len() == 0 {
                        messages.reserve(AT_ONCE);
                    }
                    messages.push_line(number, &line, &self.options);
                }
                Some(Err(problem)) => {
                    // What came before it is published first, in order.
                    let before = std::mem::replace(&mut messages, Outgoing::to(&published, self.reservation.bytes()));
                    if self.publish(before, &mut out).await {
                        self.stop();
                    } else {
                        self.cost(1).await;
                        tell(&problem, &mut out);
                    }
                }
                // What has arrived is answered before more is waited for; where each line came in a frame of its own, together.
                None if messages.len() > 0 || !out.is_empty() => {
                    let is_over = self.ended || self.failed.is_some() || ahead > AHEAD_BYTES;
                    if is_over || self.read().now_or_never().is_none() {
                        // The next line's time begins where it is waited for, after the results of those before it.
                        self.line_ended = true;
                        break;
                    }
                    ahead += self.unread.len();
                }
                None => match self.failed.take() {
                    Some(problem) => tell(&problem, &mut out),
                    None if self.ended => return None,
                    None => self.read().await,
                },
            }
            if messages.len() == AT_ONCE {
                break;
            }
        }
        if self.publish(messages, &mut out).await {
            self.stop();
        }
        Some(out.into())
    }

    /// The next line that says something, of what has arrived, with its number; or that it is longer than `max`.
    fn next_line(&mut self, max: usize) -> Option<Result<(u64, Bytes), Problem>> {
        loop {
            let Some(end) = memchr::memchr(b'\n', &self.unread) else {
                let rest = std::mem::take(&mut self.unread);
                if self.skipping {
                    self.hear_nothing(rest.len());
                    return None;
                }
                let length = self.begun.len() + rest.len();
                if length > max {
                    self.begun = BytesMut::new();
                    self.skipping = true;
                    self.hear_nothing(length);
                    return Some(Err(too_long(self.number + 1, max)));
                }
                self.begun.extend_from_slice(&rest);
                if !self.ended || self.begun.trim_ascii().is_empty() {
                    return None;
                }
                // The last one needs no end of its own.
                return Some(Ok((self.number + 1, self.begun.split().freeze())));
            };
            let mut line = self.unread.split_to(end);
            self.unread.advance(1);
            self.number += 1;
            self.line_ended = true;
            if std::mem::take(&mut self.skipping) {
                self.hear_nothing(line.len() + 1);
                continue;
            }
            if !self.begun.is_empty() {
                self.begun.extend_from_slice(&line);
                line = self.begun.split().freeze();
            }
            if line.len() > max {
                let problem = too_long(self.number, max);
                self.hear_nothing(line.len() + 1);
                return Some(Err(problem));
            }
            if !line.trim_ascii().is_empty() {
                self.silence = 0;
                return Some(Ok((self.number, line)));
            }
            self.hear_nothing(line.len() + 1);
        }
    }

    /// Counts bytes of which nothing comes. They are read for as long as a body may be that is read whole: a kilobyte
    /// that inflates to a megabyte of them is work that nobody is charged for.
    fn hear_nothing(&mut self, bytes: usize) {
        self.silence += bytes;
        let max = self.max_silence;
        if self.silence > max {
            let detail =
                format!("line {}: the {max} bytes before it say nothing; no more of that is read", self.number + 1);
            self.fail(Problem::too_large(detail));
        }
    }

    /// No further line is published.
    fn stop(&mut self) {
        self.ended = true;
        self.unread.clear();
        self.begun.clear();
        self.failed = None;
    }

    /// Publishes lines and appends their results; true if no further one could be published.
    async fn publish(&mut self, messages: Outgoing<'_>, out: &mut Vec<u8>) -> bool {
        let count = messages.len();
        if count == 0 {
            return false;
        }
        let (shared, published) = (&*self.shared, &*self.published);
        if let Err(problem) = published.check_room() {
            (0..count).for_each(|_| tell(&problem, out));
            self.cost(count).await;
            return false;
        }
        let results = match publish_all(shared, &self.options, self.caller.as_ref(), &self.parent, messages).await {
            Ok(results) => results,
            Err(error) => vec![Err(error); count],
        };
        let mut ends = false;
        out.reserve(results.len() * (RESULT_BYTES + published.topic().as_str().len()));
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

    /// Lines that are refused unread were work too.
    async fn cost(&mut self, count: usize) {
        if let Some(caller) = &self.caller {
            caller.overdraw(count);
            caller.pace().await;
        }
    }

    async fn read(&mut self) {
        if let Some(inflating) = &mut self.inflating {
            if let Some(piece) = inflating.next() {
                self.take(piece);
                // Little can inflate to much: others run meanwhile.
                return tokio::task::yield_now().await;
            }
            // What a window holds back counts before anything comes of it.
            if let Err(problem) = self.hold(0) {
                return self.fail(problem);
            }
        }
        if std::mem::take(&mut self.line_ended) {
            self.deadline = body::Deadline::after(self.shared.limits().body_timeout);
        }
        let data = tokio::select! {
            biased;
            () = self.revoked.as_mut() => Err(Problem::new(
                StatusCode::FORBIDDEN,
                ErrorKind::Unauthorized,
                "publishing here is no longer allowed; the lines that follow are not published",
            )
            .counted(Refusal::Forbidden)),
            data = body::next_data(&mut self.body, &mut self.deadline) => data,
        };
        match data {
            Ok(Some(data)) => match &mut self.inflating {
                Some(inflating) => inflating.feed(data),
                None => self.take(Ok(data)),
            },
            Ok(None) => {
                if let Some(rest) = self.inflating.as_mut().map(|inflating| inflating.finish()) {
                    self.take(rest);
                }
                self.ended = true;
            }
            Err(problem) if problem.status() == StatusCode::REQUEST_TIMEOUT => {
                let detail = format!("line {} did not arrive in time; send it faster", self.number + 1);
                self.fail(Problem::new(StatusCode::REQUEST_TIMEOUT, ErrorKind::Timeout, detail));
            }
            Err(problem) => self.fail(problem),
        }
    }

    /// Takes what came of the body, or ends with what is wrong with it.
    fn take(&mut self, data: Answer<Bytes>) {
        let taken = data.and_then(|data| {
            self.hold(data.len())?;
            self.unread = data;
            Ok(())
        });
        if let Err(problem) = taken {
            self.fail(problem);
        }
    }

    /// Room for what is held: a line, `more` that came with it, and what is not inflated yet. It is given back with
    /// the stream.
    fn hold(&mut self, more: usize) -> Answer<()> {
        let packed = self.inflating.as_ref().map_or(0, |inflating| inflating.held());
        self.reservation.reach((self.begun.len() + more) as u64 + packed)
    }

    /// Nothing more is read; of the line that it breaks off nothing is known.
    fn fail(&mut self, problem: Problem) {
        if let Some(refusal) = problem.refusal() {
            self.shared.metrics.refused(refusal);
        }
        self.stop();
        self.failed = Some(problem);
    }
}

fn tell(problem: &Problem, out: &mut Vec<u8>) {
    write_problem(out, problem);
    out.push(b'\n');
}

fn too_long(number: u64, max: usize) -> Problem {
    Problem::too_large(format!("line {number} is over the limit of {max} bytes"))
}

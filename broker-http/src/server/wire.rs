//! The bytes of a connection, watched: whether a request has begun and stands still, so that its
//! sender can be told 408 instead of being cut off; whether the other side takes what is written; and its
//! end: who has said all he wants to say still gets his answer, and who is refused in the middle of a
//! body still gets to read why.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::task::AbortHandle;
use tokio::time::{Instant, Sleep, sleep};

use super::activity::Activity;
use super::chatter::Chatter;
use super::frames::{Asked, Frames, Heard, Said};
use super::heads::Begun;
use super::metrics::Refusal;
use super::owed::Owed;
use super::{Shared, rest};

/// What is written where a head does not arrive in time.
pub(crate) const HEAD_TOO_SLOW: &[u8] = b"HTTP/1.1 408 Request Timeout\r\n\
    content-type: application/problem+json\r\nconnection: close\r\ncontent-length: 113\r\n\r\n\
    {\"title\":\"Request Timeout\",\"status\":408,\"detail\":\"the request's headers did not arrive in time\",\"kind\":\"timeout\"}";

/// What the connection and whoever watches it have in common.
#[derive(Debug, Default)]
pub(crate) struct Wire {
    /// Bytes that came since a request was last begun or answered.
    heard: AtomicUsize,
    /// The next read answers 408 and is the end.
    late: AtomicBool,
    /// How many bytes of `PRI` the connection began with; HTTP/2's preface does, no method of ours.
    preface: AtomicU8,
    /// Over HTTP/2: a frame or a head has begun and is not whole.
    begun: AtomicBool,
    /// Requests answered.
    answered: AtomicUsize,
    /// Bytes the socket has taken, around the numbers' end.
    written: AtomicUsize,
    /// The socket took nothing when it was last written to.
    blocked: AtomicBool,
    /// Over HTTP/1: who closes his side ends the request at work.
    fleeting: AtomicBool,
    /// The connection ends with something unread.
    unread: AtomicBool,
    /// Answers to be taken in time.
    pub(crate) owed: Arc<Owed>,
    /// Ends the connection at once.
    task: Mutex<Option<AbortHandle>>,
}

const PREFACE: &[u8] = b"PRI";
/// Not HTTP/2.
const OTHER: u8 = u8::MAX;

impl Wire {
    /// A request was read, or is answered: what comes from now on belongs to the next.
    pub(crate) fn forget(&self) {
        self.heard.store(0, Ordering::Relaxed);
    }

    /// So many of the bytes that came belong to nothing that goes on.
    pub(crate) fn leave_out(&self, bytes: usize) {
        let less = |heard: usize| Some(heard.saturating_sub(bytes));
        let _ = self.heard.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
    }

    /// The task that ends with the connection, from now on: that of what it was upgraded to, in the end.
    pub(crate) fn served_by(&self, task: AbortHandle) {
        *self.task.lock() = Some(task);
    }

    pub(crate) fn task(&self) -> Option<AbortHandle> {
        self.task.lock().clone()
    }

    /// A request was answered.
    pub(crate) fn answer(&self) {
        self.answered.fetch_add(1, Ordering::Release);
    }

    /// Whether part of a head, or of another frame, stands still over HTTP/2.
    pub(crate) fn is_amid_frame(&self) -> bool {
        self.begun.load(Ordering::Relaxed)
    }

    /// Ends a connection on which part of a head stands still; false if nothing was begun, or not in
    /// HTTP/1.
    pub(crate) fn end_late(&self) -> bool {
        let late = self.heard.load(Ordering::Relaxed) > 0 && !self.is_http2();
        if late {
            self.late.store(true, Ordering::Release);
        }
        late
    }

    pub(crate) fn is_http2(&self) -> bool {
        usize::from(self.preface.load(Ordering::Relaxed)) == PREFACE.len()
    }

    pub(crate) fn written(&self) -> usize {
        self.written.load(Ordering::Relaxed)
    }

    /// Whether something waits to be written, and the other side has no room for it.
    pub(crate) fn is_blocked(&self) -> bool {
        self.blocked.load(Ordering::Relaxed)
    }

    /// Whether who closes his side is gone, and the request at work with him; else he gets his answer
    /// first.
    pub(crate) fn set_fleeting(&self, fleeting: bool) {
        self.fleeting.store(fleeting, Ordering::Relaxed);
    }

    /// Before it is closed, what still comes is read for a while: closing on it would reset the
    /// connection, and with that take the answer from who has not read it.
    pub(crate) fn set_unread(&self) {
        self.unread.store(true, Ordering::Release);
    }

    /// The connection's task alone writes.
    fn wrote(&self, wrote: &Poll<io::Result<usize>>) {
        self.blocked.store(wrote.is_pending(), Ordering::Relaxed);
        if let Poll::Ready(Ok(bytes)) = wrote {
            self.written.store(self.written().wrapping_add(*bytes), Ordering::Relaxed);
        }
    }

    fn hear(&self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        self.heard.fetch_add(bytes.len(), Ordering::Relaxed);
        let seen = usize::from(self.preface.load(Ordering::Relaxed));
        if let Some(expected) = PREFACE.get(seen..).filter(|rest| !rest.is_empty()) {
            let same = bytes.iter().zip(expected).take_while(|(have, want)| have == want).count();
            let is_more = same == bytes.len().min(expected.len());
            // Three at most.
            self.preface.store(if is_more { (seen + same) as u8 } else { OTHER }, Ordering::Relaxed);
        }
    }
}

/// A connection that is watched.
pub(crate) struct Watched<S> {
    stream: S,
    wire: Arc<Wire>,
    activity: Arc<Activity>,
    /// Over HTTP/1, if it is a large one.
    head: Option<Begun>,
    /// Who counts what HTTP/2 refuses.
    shared: Arc<Shared>,
    frames: Frames,
    heard: Heard,
    /// Frames that may still come and ask for nothing.
    chatter: Chatter,
    /// Pings that are to be answered.
    pings: usize,
    /// Bytes of [`HEAD_TOO_SLOW`] written.
    told: usize,
    /// Bytes read while looking for the end, and how many of them were taken.
    ahead: (Vec<u8>, usize),
    closing: Closing,
    /// The other side floods: it is told so, and that is the end.
    calming: Option<Box<Calming>>,
}

/// How far the end of a flood is.
struct Calming {
    frame: [u8; 17],
    /// Bytes of it written.
    told: usize,
    /// Bytes that may still be read, and for how long.
    most: usize,
    time: Pin<Box<Sleep>>,
}

/// What still comes of a flood is read and dropped, so much and so long: closing on it would reset the connection, and
/// with that take what is told.
const CALM_BYTES: usize = 256 << 10;
const CALM_TIME: Duration = Duration::from_secs(1);

/// Frames that may come with a request: how much of its answer may be sent, what it depends on, its reset.
const A_REQUEST: usize = 4;

/// What the answer to a ping that nobody sent counts as: h2 logs each.
const UNASKED: usize = 100;

/// Bytes read while looking for the end, at most; beyond them it is not looked for.
const AHEAD_BYTES: usize = 16 << 10;

/// How far a slow end is.
#[derive(Debug)]
enum Closing {
    /// Not begun.
    Not,
    /// Our side has ended: bytes that may still be read, and for how long.
    Lingers(u64, Pin<Box<Sleep>>),
}

impl<S> Watched<S> {
    pub(crate) fn new(stream: S, activity: &Arc<Activity>, shared: Arc<Shared>) -> Self {
        Self {
            stream,
            wire: Arc::clone(&activity.wire),
            activity: Arc::clone(activity),
            head: None,
            shared,
            frames: Frames::default(),
            heard: Heard::default(),
            chatter: Chatter::new(Instant::now()),
            pings: 0,
            told: 0,
            ahead: Default::default(),
            closing: Closing::Not,
            calming: None,
        }
    }

    /// Over HTTP/1, what there is of a head that is not whole counts, and so does a message to a WebSocket until all is
    /// told that is to be said to it.
    fn count_head(&mut self) {
        if self.activity.is_active() {
            self.head = None;
            return;
        }
        let most = self.shared.ledger.room_of_heads().max(self.shared.limits().header_bytes as u64);
        let heard = self.wire.heard.load(Ordering::Relaxed);
        let ended = self.shared.heads.grow(&mut self.head, heard, most, &self.shared.ledger, &self.activity);
        (0..ended).for_each(|_| self.shared.metrics.refused(Refusal::Heads));
    }

    /// Over HTTP/2, whether what was read is no flood of frames that ask for nothing, each of which h2 takes as it
    /// comes.
    fn is_calm(&mut self) -> bool {
        let Said { requests, pongs, others } = self.heard.said();
        self.chatter.earn(requests * A_REQUEST);
        let asked = pongs.min(self.pings);
        self.pings -= asked;
        let chatter = others + (pongs - asked) * UNASKED;
        chatter == 0 || self.chatter.may_go_on(chatter, Instant::now())
    }

    /// So much of this was written.
    fn wrote<'a>(&mut self, mut count: usize, pieces: impl IntoIterator<Item = &'a [u8]>) {
        if !self.wire.is_http2() {
            return;
        }
        let given = self.wire.answered.load(Ordering::Acquire);
        for piece in pieces {
            let written = piece.get(..count.min(piece.len())).unwrap_or_default();
            count -= written.len();
            self.frames.written(written, given, |refusal| self.shared.metrics.refused(refusal));
        }
        let Asked { updates, pings } = self.frames.asked();
        self.chatter.earn(updates);
        self.pings += pings;
    }
}

impl<S: AsyncRead + Unpin> Watched<S> {
    /// Looks whether the other side has closed, where that ends the request at work: the parser does not
    /// read before it is answered.
    fn check_end(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        if !self.wire.fleeting.load(Ordering::Relaxed) || self.wire.is_http2() {
            return Ok(());
        }
        // The end is behind what was sent before it.
        while self.ahead.0.len() < AHEAD_BYTES {
            let mut piece = [0; 512];
            let mut piece = ReadBuf::new(&mut piece);
            match Pin::new(&mut self.stream).poll_read(cx, &mut piece) {
                Poll::Pending => break,
                Poll::Ready(Ok(())) if !piece.filled().is_empty() => {
                    self.wire.hear(piece.filled());
                    self.ahead.0.extend_from_slice(piece.filled());
                    // Somebody may wait for them.
                    cx.waker().wake_by_ref();
                }
                Poll::Ready(read) => {
                    return read.and(Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the other side left")));
                }
            }
        }
        Ok(())
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Watched<S> {
    /// Goes on with the end of a flood. Whatever is to be read or written from now on waits for it.
    fn calm(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        let Some(calming) = &mut self.calming else { return Poll::Ready(flood()) };
        if calming.time.as_mut().poll(cx).is_ready() {
            return Poll::Ready(flood());
        }
        while let Some(rest) = calming.frame.get(calming.told..).filter(|rest| !rest.is_empty()) {
            match ready!(Pin::new(&mut self.stream).poll_write(cx, rest)) {
                Ok(count @ 1..) => calming.told += count,
                _ => return Poll::Ready(flood()),
            }
        }
        if ready!(Pin::new(&mut self.stream).poll_flush(cx)).is_err() {
            return Poll::Ready(flood());
        }
        let mut dropped = [0; 4096];
        loop {
            let mut dropped = ReadBuf::new(&mut dropped);
            let read = ready!(Pin::new(&mut self.stream).poll_read(cx, &mut dropped));
            let bytes = dropped.filled().len();
            if read.is_err() || bytes == 0 || bytes > calming.most {
                return Poll::Ready(flood());
            }
            calming.most -= bytes;
        }
    }
}

fn flood() -> io::Error {
    io::Error::other("a flood of frames that ask for nothing")
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Watched<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.calming.is_some() {
            return this.calm(cx).map(Err);
        }
        if this.wire.late.load(Ordering::Acquire) {
            // Nothing else is being written: no request is at work.
            while let Some(rest) = HEAD_TOO_SLOW.get(this.told..).filter(|rest| !rest.is_empty()) {
                this.told += ready!(Pin::new(&mut this.stream).poll_write(cx, rest))?.max(1);
            }
            ready!(Pin::new(&mut this.stream).poll_flush(cx))?;
            return Poll::Ready(Ok(()));
        }
        let (ahead, taken) = &mut this.ahead;
        if let Some(rest) = ahead.get(*taken..).filter(|rest| !rest.is_empty()) {
            let (now, later) = rest.split_at(rest.len().min(buf.remaining()));
            buf.put_slice(now);
            if later.is_empty() {
                this.ahead = Default::default();
            } else {
                *taken += now.len();
            }
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        let read = Pin::new(&mut this.stream).poll_read(cx, buf);
        if read.is_pending() && this.head.is_some() {
            // It may have become whole since it was read.
            this.count_head();
        }
        ready!(read)?;
        let bytes = buf.filled().get(before..).unwrap_or_default();
        this.wire.hear(bytes);
        // Not HTTP/2 as soon as it is known not to be.
        if this.wire.preface.load(Ordering::Relaxed) != OTHER {
            this.heard.read(bytes);
            this.wire.begun.store(this.wire.is_http2() && this.heard.has_begun(), Ordering::Relaxed);
            if !this.is_calm() {
                this.shared.metrics.refused(Refusal::Flood);
                if !this.frames.is_between() {
                    return Poll::Ready(Err(flood()));
                }
                buf.set_filled(before);
                let (frame, time) = (this.heard.calm(), Box::pin(sleep(CALM_TIME)));
                this.calming = Some(Box::new(Calming { frame, told: 0, most: CALM_BYTES, time }));
                return this.calm(cx).map(Err);
            }
        } else {
            this.count_head();
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if self.calming.is_some() {
            return self.calm(cx).map(Err);
        }
        let count = ready!(Pin::new(&mut self.stream).poll_write(cx, buf))?;
        self.wrote(count, [buf]);
        Poll::Ready(Ok(count))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.calming.is_some() {
            return self.calm(cx).map(Err);
        }
        let count = ready!(Pin::new(&mut self.stream).poll_write_vectored(cx, bufs))?;
        self.wrote(count, bufs.iter().map(|buf| &**buf));
        Poll::Ready(Ok(count))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The connection flushes whenever it was looked at and has nothing more to write.
        if self.calming.is_some() {
            return self.calm(cx).map(Err);
        }
        self.check_end(cx)?;
        if self.head.is_some() {
            self.count_head();
        }
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if let Closing::Not = this.closing {
            ready!(Pin::new(&mut this.stream).poll_shutdown(cx))?;
            if !this.wire.unread.load(Ordering::Acquire) {
                return Poll::Ready(Ok(()));
            }
            this.wire.forget();
            let limits = this.shared.limits();
            let time = Box::pin(sleep(rest::patience(&limits)));
            this.closing = Closing::Lingers(limits.refused_body_bytes, time);
        }
        if let Closing::Lingers(most, time) = &mut this.closing {
            let mut dropped = [0; 4096];
            while time.as_mut().poll(cx).is_pending() {
                let mut dropped = ReadBuf::new(&mut dropped);
                let read = ready!(Pin::new(&mut this.stream).poll_read(cx, &mut dropped));
                let bytes = dropped.filled().len() as u64;
                if read.is_err() || bytes == 0 || bytes > *most {
                    break;
                }
                *most -= bytes;
            }
        }
        Poll::Ready(Ok(()))
    }
}

/// A socket whose writes are watched: below TLS, which takes more than the other side does.
pub(crate) struct Socket<S> {
    stream: S,
    wire: Arc<Wire>,
}

impl<S> Socket<S> {
    pub(crate) fn new(stream: S, wire: Arc<Wire>) -> Self {
        Self { stream, wire }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Socket<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Socket<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let wrote = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.wire.wrote(&wrote);
        wrote
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let wrote = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.wire.wrote(&wrote);
        wrote
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_to_a_slow_head_is_well_formed() {
        let text = std::str::from_utf8(HEAD_TOO_SLOW).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        let length: usize =
            head.split("content-length: ").nth(1).unwrap().split("\r\n").next().unwrap().parse().unwrap();
        assert_eq!(length, body.len());
        assert_eq!(serde_json::from_str::<serde_json::Value>(body).unwrap()["status"], 408);
    }

    #[test]
    fn http_2_is_told_from_a_request_however_it_is_cut() {
        for (pieces, late) in [
            (&["PRI * HTTP/2.0"][..], false),
            (&["P", "R", "I"], false),
            (&["POST /"], true),
            (&["P", "OST"], true),
            (&["PR", "OPFIND"], true),
            (&["GET"], true),
            (&["P"], true),
            (&[], false),
        ] {
            let wire = Wire::default();
            pieces.iter().for_each(|piece| wire.hear(piece.as_bytes()));
            assert_eq!(wire.end_late(), late, "{pieces:?}");
        }
        let wire = Wire::default();
        wire.hear(b"GET / HTTP/1.1\r\n\r\n");
        wire.forget();
        assert!(!wire.end_late(), "an idle connection is not late");
    }
}

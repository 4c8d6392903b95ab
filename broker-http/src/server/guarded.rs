//! The body of an answer as the connection takes it: its request is at work until it ends, and over HTTP/2 each piece
//! waits for its reader for as long as any answer may.

use std::pin::Pin;
use std::task::{Context, Poll};

use axum::body::Body;
use bytes::Bytes;
use http::Version;
use http_body::{Frame, SizeHint};

use super::activity::{Busy, Offered};

/// The body of an answer; its request is at work until it ends.
pub(crate) struct Guarded {
    body: Body,
    /// Over HTTP/2, where the connection takes from a body one piece beyond what its stream has a window for.
    offer: Option<Offer>,
    busy: Busy,
}

/// What a body has to give.
struct Offer {
    /// The rest of what the body gave.
    rest: Bytes,
    /// Something is there that nobody has taken.
    waits: Option<Offered>,
}

/// A piece, which the connection keeps until its stream has a window for all of it, and also beyond the end of its body.
struct Piece {
    bytes: Bytes,
    _offered: Offered,
}

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// Bytes taken at a time over HTTP/2 (its least bound of a frame): a reader gets on by each.
const PIECE: usize = 16 << 10;

impl Guarded {
    pub(crate) fn new(body: Body, busy: Busy, version: Version) -> Self {
        let mut guarded = Self { body, offer: None, busy };
        if version == Version::HTTP_2 {
            guarded.offer = Some(Offer { rest: Bytes::new(), waits: None });
            guarded.offer(true);
        }
        guarded
    }

    /// Whether something is there to be taken from now on.
    fn offer(&mut self, waits: bool) {
        let Some(offer) = &mut self.offer else { return };
        offer.waits = waits.then(|| Offered::begin(&self.busy.0));
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        self.offer(false);
        // Lines still read are read by the answer.
        drop(std::mem::take(&mut self.body));
        self.busy.0.rest.leave();
        self.busy.0.wire.set_fleeting(false);
    }
}

impl http_body::Body for Guarded {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = &mut *self;
        let Some(offer) = &mut this.offer else { return Pin::new(&mut this.body).poll_frame(cx) };
        if offer.rest.is_empty() {
            match Pin::new(&mut this.body).poll_frame(cx) {
                Poll::Pending => {
                    this.offer(false);
                    return Poll::Pending;
                }
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) => offer.rest = data,
                    Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
                },
                end => return end,
            }
        }
        let piece = offer.rest.split_to(offer.rest.len().min(PIECE));
        this.offer(true);
        let piece = Piece { bytes: piece, _offered: Offered::begin(&this.busy.0) };
        Poll::Ready(Some(Ok(Frame::data(Bytes::from_owner(piece)))))
    }

    fn is_end_stream(&self) -> bool {
        self.offer.as_ref().is_none_or(|offer| offer.rest.is_empty()) && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let mut hint = self.body.size_hint();
        let rest = self.offer.as_ref().map_or(0, |offer| offer.rest.len() as u64);
        if let Some(upper) = hint.upper() {
            hint.set_upper(upper + rest);
        }
        hint.set_lower(hint.lower() + rest);
        hint
    }
}

//! A way for fuzzing to what is decoded of a delivery, and what must hold of it.
#![allow(clippy::expect_used, missing_docs, reason = "an assertion that fails is what fuzzing looks for")]

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use futures_io::AsyncRead;
use lapin::protocol::basic::parse_properties;
use parking_lot::Mutex;

use crate::intake::{Delivered, Intakes};
use crate::sieve::{HEADER, Sieve, sift};
use crate::wire::{Style, Travel, decode, encode};

/// A delivery, its properties as they stand in the content header (AMQP 0-9-1, 4.2.6.1). What was read is
/// written so that it is read the same.
pub fn delivery(routing_key: &str, properties: &[u8], body: &[u8]) {
    // Class, weight and size come before them; then lapin gets what the sieve lets through.
    let mut header = [&[0; 12], properties].concat();
    sift(HEADER, &mut header);
    let Ok((_, properties)) = parse_properties(header.get(12..).unwrap_or_default()) else { return };
    let body = Bytes::copy_from_slice(body);
    let _ = decode(routing_key, &properties, body.clone(), true);
    let Ok(arrived) = decode(routing_key, &properties, body, false) else { return };
    let travel = Travel {
        attempts: arrived.attempts,
        first: arrived.first,
        topic: Some(arrived.topic.clone()),
        due: arrived.due,
        ..Travel::default()
    };
    // Names of 255 bytes are too long once they are escaped.
    let Ok(written) = encode(&arrived.message, &travel, Style { persistent: true, go_micro: false }) else { return };
    let again = decode("elsewhere", &written, arrived.message.payload().clone(), false).expect("our own properties");
    assert_eq!(again.message, arrived.message);
    assert_eq!((again.topic, again.attempts), (arrived.topic, arrived.attempts));
    assert_eq!((again.first, again.due), (arrived.first, arrived.due));
}

/// What a server sends: what is delivered of it, and what is passed on, is the same in whatever pieces it comes.
pub fn stream(bytes: &[u8], piece: usize) {
    assert_eq!(sifted(bytes, bytes.len()), sifted(bytes, piece));
}

type Sifted = (Result<Vec<u8>, io::ErrorKind>, Vec<(u16, Delivered)>);

fn sifted(bytes: &[u8], piece: usize) -> Sifted {
    let intakes = Intakes::default();
    let taken = Arc::new(Mutex::new(Vec::new()));
    for channel in 0..4 {
        let taken = Arc::clone(&taken);
        let take = move |batch: Vec<Delivered>| taken.lock().extend(batch.into_iter().map(|one| (channel, one)));
        intakes.add(channel, Arc::new(take));
    }
    let mut sieve = Sieve::new(Pieces(bytes, piece.max(1)), intakes);
    let (mut passed_on, mut buffer) = (Vec::new(), vec![0; 1 << 16]);
    let over = loop {
        match Pin::new(&mut sieve).poll_read(&mut Context::from_waker(Waker::noop()), &mut buffer) {
            Poll::Ready(Ok(0)) => break Ok(passed_on),
            Poll::Ready(Ok(count)) => passed_on.extend_from_slice(&buffer[..count]),
            Poll::Ready(Err(error)) => break Err(error.kind()),
            // It had a turn of deliveries.
            Poll::Pending => {}
        }
    };
    let taken = std::mem::take(&mut *taken.lock());
    (over, taken)
}

struct Pieces<'a>(&'a [u8], usize);

impl AsyncRead for Pieces<'_> {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        let piece = self.1.min(buffer.len());
        Poll::Ready(io::Read::read(&mut self.0, &mut buffer[..piece]))
    }
}

//! Deliveries, taken out of a connection's stream before lapin reads them.
//!
//! lapin (4.12) takes a delivery apart on its own thread, puts it together again, and hands it on through a queue to a
//! task, which wakes the subscriber's. Here it is read where it lies, with all that came in the same read, and handed over at
//! once (`benches/README.md` has what that gains). What lapin is left with is what it waits for: answers,
//! cancellations, the end.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::{fmt, io};

use bytes::Bytes;
use lapin::BasicProperties;
use lapin::protocol::basic::parse_properties;
use parking_lot::Mutex;

/// Classes and methods (AMQP 0-9-1, 1.2): basic.deliver; channel.open-ok, channel.close and channel.close-ok.
const DELIVER: [u8; 4] = [0, 60, 0, 60];
const OPEN_OK: [u8; 4] = [0, 20, 0, 11];
const CLOSE: [u8; 4] = [0, 20, 0, 40];
const CLOSE_OK: [u8; 4] = [0, 20, 0, 41];

/// What a body is given room for before any of it has come.
const ROOM: u64 = 1 << 20;

/// A message as the server delivered it.
#[derive(Debug, PartialEq)]
pub(crate) struct Delivered {
    pub(crate) tag: u64,
    /// Whether it was delivered before.
    pub(crate) redelivered: bool,
    pub(crate) routing_key: String,
    /// None if they are no grammar.
    pub(crate) properties: Option<BasicProperties>,
    pub(crate) body: Bytes,
}

/// Takes a channel's deliveries, in their order. It is called on the connection's thread, which waits for it.
pub(crate) type Take = Arc<dyn Fn(Vec<Delivered>) + Send + Sync>;

/// Who takes the deliveries of which channel of a connection.
#[derive(Clone, Default)]
pub(crate) struct Intakes(Arc<Mutex<BTreeMap<u16, Take>>>);

impl Intakes {
    /// The channel's deliveries go to `take`, and not to lapin, until it is closed.
    pub(crate) fn add(&self, channel: u16, take: Take) {
        self.0.lock().insert(channel, take);
    }
}

impl fmt::Debug for Intakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.lock().keys()).finish()
    }
}

/// The deliveries in a connection's stream.
#[derive(Debug)]
pub(crate) struct Intake {
    intakes: Intakes,
    /// Of these more is to come: one of a channel, and mostly one in all.
    begun: Vec<Begun>,
    /// These are whole, and not handed over yet.
    whole: Vec<(u16, Delivered)>,
}

/// A delivery of which the method has come, and not all of the rest.
#[derive(Debug)]
struct Begun {
    channel: u16,
    delivered: Delivered,
    /// How long the body is, once that is known; and as much of it as has come.
    size: Option<u64>,
    body: Vec<u8>,
}

impl Intake {
    pub(crate) fn new(intakes: Intakes) -> Self {
        Self { intakes, begun: Vec::new(), whole: Vec::new() }
    }

    /// Whether a method begins a delivery that somebody takes here.
    pub(crate) fn takes(&self, channel: u16, method: &[u8]) -> bool {
        method.starts_with(&DELIVER) && self.intakes.0.lock().contains_key(&channel)
    }

    /// Whether the header or the body of a delivery is still to come on this channel.
    pub(crate) fn has_begun(&self, channel: u16) -> bool {
        self.begun.iter().any(|begun| begun.channel == channel)
    }

    /// A delivery begins.
    ///
    /// # Errors
    ///
    /// It is no grammar.
    pub(crate) fn begin(&mut self, channel: u16, method: &[u8]) -> io::Result<()> {
        let delivered = deliver(method).ok_or_else(|| violation("a delivery that cannot be read"))?;
        if self.has_begun(channel) {
            return Err(violation("a delivery within another"));
        }
        self.begun.push(Begun { channel, delivered, size: None, body: Vec::new() });
        Ok(())
    }

    /// The header of a delivery that has begun.
    ///
    /// # Errors
    ///
    /// It is none that a delivery has.
    pub(crate) fn header(&mut self, channel: u16, header: &[u8]) -> io::Result<()> {
        let Some(begun) = self.begun.iter_mut().find(|begun| begun.channel == channel) else { return Ok(()) };
        // Class, weight and size come before the properties (4.2.6.1).
        let Some((&[0, 60, _, _, ref size @ ..], properties)) = header.split_first_chunk::<12>() else {
            return Err(violation("a header of no message"));
        };
        let size = u64::from_be_bytes(*size);
        if begun.size.replace(size).is_some() {
            return Err(violation("a second header of one message"));
        }
        begun.delivered.properties = parse_properties(properties).ok().map(|(_, properties)| properties);
        begun.body.reserve_exact(size.min(ROOM) as usize);
        self.finish_if_whole(channel);
        Ok(())
    }

    /// Some of its body.
    ///
    /// # Errors
    ///
    /// It is more than the header tells of.
    pub(crate) fn body(&mut self, channel: u16, part: &[u8]) -> io::Result<()> {
        let Some(begun) = self.begun.iter_mut().find(|begun| begun.channel == channel) else { return Ok(()) };
        begun.body.extend_from_slice(part);
        if begun.size.is_none_or(|size| begun.body.len() as u64 > size) {
            return Err(violation("more of a body than its header tells of"));
        }
        self.finish_if_whole(channel);
        Ok(())
    }

    fn finish_if_whole(&mut self, channel: u16) {
        let is = |begun: &Begun| begun.channel == channel && begun.size == Some(begun.body.len() as u64);
        if let Some(at) = self.begun.iter().position(is) {
            let Begun { mut delivered, body, .. } = self.begun.swap_remove(at);
            delivered.body = Bytes::from(body);
            self.whole.push((channel, delivered));
        }
    }

    /// Another method came: a channel that is closed has no deliveries any more, and its number is the next one's.
    pub(crate) fn watch(&mut self, channel: u16, method: &[u8]) {
        if [OPEN_OK, CLOSE, CLOSE_OK].iter().any(|kind| method.starts_with(kind)) {
            self.hand_over();
            self.begun.retain(|begun| begun.channel != channel);
            self.intakes.0.lock().remove(&channel);
        }
    }

    /// Hands over what has come.
    pub(crate) fn hand_over(&mut self) {
        if self.whole.is_empty() {
            return;
        }
        // A batch is as large as the channel's part, so that nothing moves once it is in it.
        let runs = self.whole.chunk_by(|(one, _), (next, _)| one == next);
        let runs: Vec<_> = runs.filter_map(|run| Some((run.first()?.0, run.len()))).collect();
        let mut whole = self.whole.drain(..).map(|(_, delivered)| delivered);
        for (channel, length) in runs {
            let batch = whole.by_ref().take(length).collect();
            // It runs without the lock, which others wait for.
            let take = self.intakes.0.lock().get(&channel).cloned();
            if let Some(take) = take {
                take(batch);
            }
        }
    }
}

/// A basic.deliver (1.8.3.13): consumer, tag, whether it came before, exchange, routing key.
fn deliver(method: &[u8]) -> Option<Delivered> {
    let (_consumer, rest) = short_string(method.strip_prefix(&DELIVER)?)?;
    let (tag, rest) = rest.split_first_chunk()?;
    let (redelivered, rest) = rest.split_first()?;
    let (_exchange, rest) = short_string(rest)?;
    let (routing_key, _) = short_string(rest)?;
    Some(Delivered {
        tag: u64::from_be_bytes(*tag),
        redelivered: redelivered & 1 == 1,
        routing_key: str::from_utf8(routing_key).ok()?.to_owned(),
        properties: None,
        body: Bytes::new(),
    })
}

fn short_string(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_first()?;
    rest.split_at_checked(usize::from(*length))
}

pub(crate) fn violation(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the server sent {what}"))
}

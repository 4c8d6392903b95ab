//! Publishes for which there is no room: they wait for it, in the order of the calls.
//!
//! Until there is they are their callers': whoever gives one up frees what it holds at once.

use std::collections::BTreeMap;
use std::sync::Arc;

use broker_core::{Error, Operation, Publish};
use tokio::time::Instant;

use super::{Entry, Writer};

/// The line, the first of which is the next to be let in.
#[derive(Default)]
pub(super) struct Line {
    number: u64,
    waiting: BTreeMap<u64, Entry>,
}

impl Line {
    /// Adds one at the end; its place.
    pub(super) fn push(&mut self, entry: Entry) -> u64 {
        self.number += 1;
        self.waiting.insert(self.number, entry);
        self.number
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    pub(super) fn pop(&mut self) -> Option<Entry> {
        self.waiting.pop_first().map(|(_, entry)| entry)
    }

    /// All of it; the numbers go on, since who is in it may yet leave it.
    pub(super) fn take(&mut self) -> Self {
        Self { number: self.number, waiting: std::mem::take(&mut self.waiting) }
    }

    /// The first, if its time is over.
    pub(super) fn pop_late(&mut self, now: Instant) -> Option<Entry> {
        self.next_deadline().filter(|deadline| *deadline <= now).and_then(|_| self.pop())
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.waiting.values().next().map(|entry| entry.deadline)
    }

    fn remove(&mut self, place: u64) -> Option<Entry> {
        self.waiting.remove(&place)
    }
}

/// `publish`, which has this place in the line.
pub(super) fn in_line(writer: &Arc<Writer>, place: u64, publish: Publish) -> Publish {
    let place = Place { writer: Arc::clone(writer), place };
    Operation::boxed(async move {
        let _place = place;
        publish.await
    })
}

/// Dropping it leaves the line.
struct Place {
    writer: Arc<Writer>,
    place: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        let left = self.writer.queue.lock().beyond.remove(self.place);
        if let Some(entry) = left {
            self.writer.turn_away(&entry, Error::closed("the publish was given up"));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use broker_core::{BrokerUrl, ErrorKind, Message, Receipt};
    use futures_util::FutureExt;
    use tokio_util::sync::CancellationToken;

    use super::super::task::Task;
    use super::super::{BESIDE, Envelope, Route};
    use super::*;
    use crate::AmqpOptions;
    use crate::link::Link;
    use crate::wire::Travel;

    /// With room for two; nobody sends what it takes.
    fn writer(parameters: &str) -> Arc<Writer> {
        let url = BrokerUrl::parse(&format!("amqp://nobody{parameters}")).unwrap();
        let options = Arc::new(AmqpOptions::from_url(url).unwrap());
        let stop = CancellationToken::new();
        let link = || Arc::new(Link::new("test", Arc::clone(&options), stop.clone()));
        let mut writer = Writer::new(Arc::clone(&options), link(), link(), stop.clone());
        writer.max_pending_bytes = 2 * BESIDE;
        Arc::new(writer)
    }

    fn submit(writer: &Arc<Writer>, body: &'static str) -> Publish {
        let route = Route::Topic("a".parse().unwrap());
        let message = Message::new(body);
        writer.submit(Envelope { route, message, travel: Travel::default(), require_route: false })
    }

    fn next(writer: &Writer) -> Option<(Entry, String)> {
        let entry = writer.next()?;
        let body = String::from_utf8(entry.envelope.message.payload().to_vec()).unwrap();
        Some((entry, body))
    }

    #[test]
    fn what_finds_no_room_waits_for_it_in_order() {
        let writer = writer("");
        let mut publishes: Vec<_> = ["1", "2", "3", "4", "5"].map(|body| Some(submit(&writer, body))).into();
        let (first, body) = next(&writer).unwrap();
        assert_eq!(body, "1");
        assert_eq!(next(&writer).unwrap().1, "2");
        assert!(next(&writer).is_none(), "there is no room");
        assert_eq!(writer.pending(), 5);
        // Given up before there is: its memory is free, and its place.
        drop(publishes[3].take());
        assert_eq!(writer.pending(), 4);
        writer.finish(&first, Ok(Receipt::new(first.envelope.message.id().clone())));
        // Who comes now comes after those that wait.
        publishes.push(Some(submit(&writer, "6")));
        let (third, body) = next(&writer).unwrap();
        assert_eq!(body, "3");
        assert!(next(&writer).is_none());
        assert!(writer.confirms.take(third.ticket));
        writer.finish(&third, Ok(Receipt::new(third.envelope.message.id().clone())));
        assert!(publishes[2].take().unwrap().now_or_never().unwrap().is_ok());
        assert_eq!(next(&writer).unwrap().1, "5");
        assert_eq!(writer.pending(), 3);
    }

    #[tokio::test]
    async fn what_finds_no_room_in_time_says_what_is_full() {
        let writer = writer("?publish_timeout=1ms");
        let mut publishes = ["1", "2", "3"].map(|body| submit(&writer, body));
        tokio::time::sleep(Duration::from_millis(5)).await;
        Task::new(Arc::clone(&writer)).expire();
        let mut error = |index: usize| (&mut publishes[index]).now_or_never().unwrap().unwrap_err();
        assert_eq!(error(0).kind(), ErrorKind::Timeout);
        let full = error(2);
        assert_eq!(full.kind(), ErrorKind::Unavailable);
        assert!(full.is_retryable() && full.message().contains("no room"), "{full}");
        assert_eq!(writer.pending(), 0);
    }
}

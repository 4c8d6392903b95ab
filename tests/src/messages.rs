//! Messages to send, and how they are compared with what arrives.

use std::collections::BTreeMap;

use broker_core::{Message, MessageId, Received};

use crate::{Attempt, Failed, ensure};

/// Messages whose payloads are their numbers, from 0.
pub fn numbered(count: usize) -> Vec<Message> {
    (0..count).map(|number| Message::new(number.to_string())).collect()
}

/// A message as a failure shows it.
pub fn shown(message: &Message) -> String {
    let payload: String = String::from_utf8_lossy(message.payload()).chars().take(20).collect();
    format!("message {} ({payload:?})", message.id())
}

/// Checks that exactly `messages` were received, each once, in any order.
///
/// # Errors
///
/// Saying what is missing, double or strange.
pub fn same_set<'a>(messages: &[Message], received: impl IntoIterator<Item = &'a Received>) -> Attempt {
    let mut wanted: BTreeMap<String, i64> = messages.iter().map(|message| (message.id().to_string(), 1)).collect();
    for one in received {
        *wanted.entry(one.message().id().to_string()).or_insert(0) -= 1;
    }
    let count = |what: fn(i64) -> bool| wanted.values().filter(|rest| what(**rest)).count();
    let (missing, more) = (count(|rest| rest > 0), count(|rest| rest < 0));
    ensure!(missing == 0 && more == 0, "{missing} of {} messages are missing, {more} came too often", messages.len());
    Ok(())
}

/// Checks that a message arrived as it was sent: everything a receiver can see.
///
/// # Errors
///
/// Naming what differs.
pub fn same_message(sent: &Message, received: &Message) -> Attempt {
    let what = shown(sent);
    ensure!(sent.id() == received.id(), "{what} arrived with id {}", received.id());
    ensure!(sent.payload() == received.payload(), "{what} arrived with another payload");
    ensure!(sent.is_tombstone() == received.is_tombstone(), "{what}: tombstone and empty payload were confused");
    ensure!(sent.key() == received.key(), "{what} has key {:?} and arrived with {:?}", sent.key(), received.key());
    ensure!(
        sent.content_type() == received.content_type(),
        "{what} has content type {:?} and arrived with {:?}",
        sent.content_type(),
        received.content_type()
    );
    ensure!(
        sent.timestamp() == received.timestamp(),
        "{what} is of {} and arrived as of {}",
        sent.timestamp(),
        received.timestamp()
    );
    for (has, sent, received) in [
        ("delivery time", sent.deliver_at(), received.deliver_at()),
        ("expiry", sent.expires_at(), received.expires_at()),
    ] {
        ensure!(sent == received, "{what} has {has} {sent:?} and arrived with {received:?}");
    }
    ensure!(
        sent.dedup_key() == received.dedup_key(),
        "{what} has deduplication key {:?} and arrived with {:?}",
        sent.dedup_key(),
        received.dedup_key()
    );
    same_headers(sent, received)
}

/// Checks the headers: the same names, and under each the same values in order.
fn same_headers(sent: &Message, received: &Message) -> Attempt {
    let by_name = |message: &Message| {
        let mut all: BTreeMap<String, Vec<bytes::Bytes>> = BTreeMap::new();
        for (name, value) in message.headers().iter() {
            all.entry(name.as_str().to_owned()).or_default().push(value.clone());
        }
        all
    };
    let (wanted, have) = (by_name(sent), by_name(received));
    for (name, values) in &wanted {
        let arrived = have.get(name);
        ensure!(arrived == Some(values), "{}: header {name:?} is {values:?} and arrived as {arrived:?}", shown(sent));
    }
    let strange = have.keys().find(|name| !wanted.contains_key(*name));
    ensure!(strange.is_none(), "{}: header {strange:?} was added", shown(sent));
    Ok(())
}

/// Finds a message among those sent.
///
/// # Errors
///
/// If it was not.
pub fn sent<'a>(messages: &'a [Message], id: &MessageId) -> Attempt<&'a Message> {
    messages
        .iter()
        .find(|message| message.id() == id)
        .ok_or_else(|| Failed(format!("message {id} was received and never published")))
}

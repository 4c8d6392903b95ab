//! Doubles that hand out the wrong thing, or to the wrong one.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use broker_core::{
    Backlog, Broker, BrokerExt, DeadLetter, Error, Group, GroupName, Headers, Message, MessageId, Overflow, Settlement,
    Subscribe, Subscription, Timestamp, TopicFilter,
};
use bytes::Bytes;
use parking_lot::Mutex;

use super::{Defect, Double};

/// A receiver sees messages through `change`.
fn seen(change: fn(Message) -> Message) -> Defect {
    Defect::default().message(Box::new(move |message| change(message.clone())))
}

/// Headers through `change`.
fn seen_headers(change: fn(&str, &Bytes) -> Option<Bytes>) -> Defect {
    Defect::default().message(Box::new(move |message| {
        let mut headers = Headers::new();
        for (name, value) in message.headers().iter() {
            if let Some(value) = change(name.as_str(), value) {
                headers.push(name.clone(), value);
            }
        }
        message.clone().with_headers(headers)
    }))
}

/// A receiver sees a message through `change` whenever it comes again.
fn seen_again(change: fn(Message) -> Message) -> Defect {
    let known = Mutex::new(HashSet::new());
    Defect::default().message(Box::new(move |message| {
        let first = known.lock().insert(message.id().clone());
        if first { message.clone() } else { change(message.clone()) }
    }))
}

/// The message without what cannot be taken away from one: key, content type, tombstone.
fn rebuilt(message: &Message, key: bool, content_type: bool) -> Message {
    let mut copy = Message::new(message.payload().clone())
        .with_id(message.id().clone())
        .with_timestamp(message.timestamp())
        .with_headers(message.headers().clone());
    if let Some(own) = message.key().filter(|_| key) {
        copy = copy.with_key(own.clone());
    }
    match message.content_type().filter(|_| content_type) {
        Some(own) => copy.clone().with_content_type(own).unwrap_or(copy),
        None => copy,
    }
}

fn lossy(bytes: &Bytes) -> Bytes {
    String::from_utf8_lossy(bytes).into_owned().into()
}

type Subscribing = broker_core::BoxFuture<'static, broker_core::Result<Subscription>>;

fn subscribe(broker: Arc<dyn Broker>, filter: TopicFilter, options: Subscribe) -> Subscribing {
    Box::pin(async move { broker.subscribe(&filter, options).await })
}

/// A subscription that never sees anything: to a topic nobody publishes to.
fn subscribe_nowhere(broker: Arc<dyn Broker>, filter: &TopicFilter, options: Subscribe) -> Subscribing {
    match TopicFilter::new(format!("nowhere.{}", filter.as_str())) {
        Ok(nowhere) => subscribe(broker, nowhere, options),
        Err(error) => Box::pin(std::future::ready(Err(error))),
    }
}

/// The same options under another group's name, or none.
fn regrouped(options: &Subscribe, group: Option<GroupName>) -> Subscribe {
    let other = match group {
        Some(name) => Subscribe::group(name),
        None => Subscribe::new(),
    };
    let other = other.with_options(options.options().clone());
    other.clone().with_max_in_flight(options.max_in_flight()).unwrap_or(other)
}

/// The options with another bound of unsettled deliveries.
fn refitted(options: Subscribe, max_in_flight: usize) -> Subscribe {
    options.clone().with_max_in_flight(max_in_flight).unwrap_or(options)
}

pub(super) const DOUBLES: &[Double] = &[
    // Messages.
    Double::new("takes payloads for text", &[("A2", "arrived with another payload")], || {
        Defect::default().message(Box::new(|message| {
            let mut text = Message::new(lossy(message.payload()))
                .with_id(message.id().clone())
                .with_timestamp(message.timestamp())
                .with_headers(message.headers().clone());
            if let Some(key) = message.key() {
                text = text.with_key(key.clone());
            }
            match message.content_type() {
                Some(own) => text.clone().with_content_type(own).unwrap_or(text),
                None => text,
            }
        }))
    }),
    Double::new("drops the content type", &[("A1", "and arrived with None"), ("A2", "and arrived with None")], || {
        seen(|message| rebuilt(&message, true, false))
    }),
    Double::new("forgets a header", &[("A1", "and arrived as None"), ("A3", "header \"binary\" is")], || {
        seen_headers(|name, value| (name != "number" && name != "binary").then(|| value.clone()))
    }),
    Double::new("takes a header of a message that comes again for its own", &[("C2", "and arrived as None")], || {
        seen_again(|mut message| {
            message.headers_mut().retain(|name, _| !name.as_str().contains("death"));
            message
        })
    }),
    Double::new("gives a message that comes again another delivery time", &[("C2", "has delivery time")], || {
        seen_again(|message| message.with_delay(std::time::Duration::ZERO))
    }),
    Double::new("takes header values for text", &[("A3", "header \"binary\" is")], || {
        seen_headers(|_, value| Some(lossy(value)))
    }),
    Double::new("keeps one of repeated headers", &[("A3", "and arrived as")], || {
        Defect::default().message(Box::new(|message| {
            let mut headers = Headers::new();
            for (name, value) in message.headers().iter() {
                let _ = headers.set(name.as_str(), value.clone());
            }
            message.clone().with_headers(headers)
        }))
    }),
    Double::new("writes header names in lower case", &[("A3", "and arrived as None")], || {
        Defect::default().message(Box::new(|message| {
            let mut headers = Headers::new();
            for (name, value) in message.headers().iter() {
                let _ = headers.append(name.as_str().to_lowercase(), value.clone());
            }
            message.clone().with_headers(headers)
        }))
    }),
    Double::new(
        "gives a message an id of its own",
        &[("A1", "messages are missing"), ("A8", "the receipt names")],
        || seen(|message| message.with_id(MessageId::random())),
    ),
    Double::new("cuts timestamps to seconds", &[("A1", "and arrived as of")], || {
        seen(|message| {
            let cut = message.timestamp().as_millis() / 1000 * 1000;
            message.with_timestamp(Timestamp::from_millis(cut))
        })
    }),
    Double::new("stamps the time of delivery", &[("A8", "is not between")], || {
        seen(|message| {
            let late = message.timestamp().after(std::time::Duration::from_secs(1));
            message.with_timestamp(late)
        })
    }),
    Double::new("merges the absent and the empty key", &[("A11", "has key None and arrived with")], || {
        seen(|message| if message.key().is_none() { message.with_key("") } else { message })
    }),
    Double::new("loses keys", &[("A1", "and arrived with None"), ("A11", "and arrived with None")], || {
        seen(|message| rebuilt(&message, false, true))
    }),
    Double::new(
        "turns a tombstone into an empty payload",
        &[("F5", "tombstone and empty payload were confused")],
        || seen(|message| rebuilt(&message, true, true)),
    ),
    Double::new("drops trace context", &[("G3", "and arrived as None")], || {
        seen_headers(|name, value| (!name.starts_with("trace")).then(|| value.clone()))
    }),
    Double::new("loses the trace of a dead letter", &[("G3", "the dead letter's traceparent is None")], || {
        Defect::default().message(Box::new(|message| {
            let mut message = message.clone();
            if DeadLetter::is_dead(&message) {
                message.headers_mut().remove("traceparent");
            }
            message
        }))
    }),
    Double::new(
        "always says it is the first attempt",
        &[("C8", "says it is attempt"), ("G1", "a retried message came back with another attempt")],
        || Defect::default().attempt(Box::new(|_| 1)),
    ),
    Double::new("counts attempts by two", &[("C8", "says it is attempt")], || {
        Defect::default().attempt(Box::new(|attempt| 2 * attempt - 1))
    }),
    Double::new(
        "hands every thirtieth delivery out twice",
        &[
            ("A1", "messages are missing"),
            ("B1", "messages are missing"),
            ("B2", "an unexpected delivery: message"),
            ("B8", "times for one message"),
        ],
        || {
            let count = AtomicUsize::new(0);
            Defect::default()
                .copies(Box::new(move |_| 1 + usize::from(count.fetch_add(1, Ordering::SeqCst) % 30 == 29)))
        },
    ),
    Double::new(
        "hands dead letters out twice",
        &[
            ("C3", "an unexpected delivery: message"),
            ("C4", "the dead-letter topic: an unexpected delivery: message"),
            ("C9", "messages are missing"),
        ],
        || Defect::default().copies(Box::new(|delivery| 1 + usize::from(DeadLetter::is_dead(delivery.message())))),
    ),
    Double::new("loses the reason of a dead letter", &[("C3", "the dead letter's reason is")], || {
        Defect::default().message(Box::new(|message| {
            let mut message = message.clone();
            if DeadLetter::is_dead(&message) {
                let _ = message.headers_mut().set("broker-dead-reason", "unknown");
            }
            message
        }))
    }),
    // Who gets what.
    Double::new("matches topics by their beginning", &[("A5", "messages are missing")], || {
        Defect::default().subscribe(Box::new(|broker, filter, options| {
            let below =
                filter.topic().and_then(|topic| topic.as_str().rsplit_once('.').map(|(above, _)| format!("{above}.>")));
            match below.map(TopicFilter::new) {
                Some(Ok(wide)) if options.group_name().is_none() => subscribe(broker, wide, options),
                _ => subscribe(broker, filter, options),
            }
        }))
    }),
    Double::new("takes one segment for many", &[("A10", "messages are missing")], || {
        Defect::default().subscribe(Box::new(|broker, filter, options| {
            let wide = filter.as_str().strip_suffix('*').map(|before| TopicFilter::new(format!("{before}>")));
            match wide {
                Some(Ok(wide)) => subscribe(broker, wide, options),
                _ => subscribe(broker, filter, options),
            }
        }))
    }),
    Double::new("has room for 32 subscribers", &[("A7", "received: no delivery within")], || {
        let count = AtomicUsize::new(0);
        Defect::default().subscribe(Box::new(move |broker, filter, options| {
            if count.fetch_add(1, Ordering::SeqCst) >= 32 {
                return subscribe_nowhere(broker, &filter, options);
            }
            subscribe(broker, filter, options)
        }))
    }),
    Double::new(
        "refuses the ninth subscriber at once",
        &[("E12", "subscribing failed: unavailable: too many subscribers")],
        || {
            let count = Arc::new(AtomicUsize::new(0));
            let gone = Arc::clone(&count);
            Defect::default()
                .subscribe(Box::new(move |broker, filter, options| {
                    if count.fetch_add(1, Ordering::SeqCst) >= 8 {
                        return Box::pin(std::future::ready(Err(Error::unavailable("too many subscribers"))));
                    }
                    subscribe(broker, filter, options)
                }))
                .leave(Box::new(move |_, _, _, subscription| {
                    gone.fetch_sub(1, Ordering::SeqCst);
                    drop(subscription);
                }))
        },
    ),
    Double::new(
        "does not fan out to the second group",
        &[
            ("B1", "two groups, another matched count"),
            ("B8", "both handlers running for every message did not end within"),
        ],
        || {
            let first = Mutex::new(BTreeMap::<TopicFilter, GroupName>::new());
            Defect::default().subscribe(Box::new(move |broker, filter, options| {
                let Some(name) = options.group_name() else { return subscribe(broker, filter, options) };
                let known = first.lock().entry(filter.clone()).or_insert_with(|| name.clone()).clone();
                if known == *name {
                    subscribe(broker, filter, options)
                } else {
                    subscribe_nowhere(broker, &filter, options)
                }
            }))
        },
    ),
    Double::new(
        "takes all groups of a filter for one",
        &[
            ("B1", "two groups, another matched count"),
            ("B8", "both handlers running for every message did not end within"),
        ],
        || {
            Defect::default().subscribe(Box::new(|broker, filter, options| {
                let one = GroupName::new("one").ok().filter(|_| options.group_name().is_some());
                let options = regrouped(&options, one);
                subscribe(broker, filter, options)
            }))
        },
    ),
    Double::new(
        "gives every member of a group everything",
        &[("B2", "an unexpected delivery: message"), ("B7", "an unexpected delivery: message")],
        || {
            Defect::default()
                .subscribe(Box::new(|broker, filter, options| subscribe(broker, filter, regrouped(&options, None))))
        },
    ),
    Double::new(
        "gives the first member of a group everything",
        &[("B2", "of the members received nothing"), ("B7", "of the members received nothing")],
        || {
            let joined = Mutex::new(BTreeSet::<Group>::new());
            Defect::default().subscribe(Box::new(move |broker, filter, options| {
                let group = options.group_name().map(|name| Group::new(name.clone(), filter.clone()));
                match group {
                    Some(group) if !joined.lock().insert(group.clone()) => subscribe_nowhere(broker, &filter, options),
                    _ => subscribe(broker, filter, options),
                }
            }))
        },
    ),
    Double::new(
        "shares one copy among all without a group",
        &[("A7", "received: no delivery within"), ("B3", "received: no delivery within")],
        || {
            Defect::default().subscribe(Box::new(|broker, filter, options| {
                let group = options.group_name().cloned().or_else(|| GroupName::new("everybody").ok());
                subscribe(broker, filter, regrouped(&options, group))
            }))
        },
    ),
    Double::new(
        "makes a group when it is joined",
        &[("B4", "an old group was called a new one"), ("D4", "received: no delivery within")],
        || Defect::default().create_group(Box::new(|_, _, _| Box::pin(std::future::ready(Ok(true))))),
    ),
    Double::new("begins at the present, whatever start says", &[("B5", "received: no delivery within")], || {
        Defect::default().settings(Box::new(|settings| settings.start = None))
    }),
    // Order and pressure.
    Double::new(
        "keeps no order",
        &[
            ("D1", "had two messages unsettled at once"),
            ("D2", "was delivered while"),
            ("D5", "while one message waits for its retry"),
        ],
        || Defect::default().settings(Box::new(|settings| settings.ordered = None)),
    ),
    Double::new("puts what is given back behind all others", &[("D7", "overtook")], || {
        let broker = Arc::<Mutex<Option<Arc<dyn Broker>>>>::default();
        let seen = Arc::clone(&broker);
        Defect::default()
            .subscribe(Box::new(move |broker, filter, options| {
                *seen.lock() = Some(Arc::clone(&broker));
                subscribe(broker, filter, options)
            }))
            .settle(Box::new(move |_, _, delivery, settlement| match &*broker.lock() {
                Some(broker) if settlement == Settlement::Release => {
                    // The in-process broker has it at once.
                    drop(broker.publish(delivery.topic(), delivery.message().clone()));
                    delivery.ack()
                }
                _ => delivery.settle(settlement),
            }))
    }),
    Double::new("counts nothing in flight", &[("D3", "unsettled: an unexpected delivery: message")], || {
        Defect::default()
            .subscribe(Box::new(|broker, filter, options| subscribe(broker, filter, refitted(options, 256))))
    }),
    Double::new("counts one too many in flight", &[("D3", "unsettled: an unexpected delivery: message")], || {
        Defect::default().subscribe(Box::new(|broker, filter, options| {
            let more = options.max_in_flight() + 1;
            subscribe(broker, filter, refitted(options, more))
        }))
    }),
    Double::new(
        "stalls everybody for one slow group",
        &[("D4", "with a slow group: publishing did not end within")],
        || {
            Defect::default().settings(Box::new(|settings| {
                settings.backlog = Backlog::default().with_max_messages(10).ok();
            }))
        },
    ),
    Double::new(
        "loses the oldest where it should wait or refuse",
        &[("D6", "overflow wait: publishing to a full group ended, and should have waited")],
        || {
            Defect::default().settings(Box::new(|settings| {
                settings.backlog = settings.backlog.map(|backlog| backlog.with_overflow(Overflow::DropOldest));
            }))
        },
    ),
    Double::new(
        "loses without telling the reader",
        &[("D6", "messages were dropped and the reader told None")],
        || Defect::default().silent(Box::new(|| true)),
    ),
    Double::new("loses without counting", &[("D6", "messages were dropped and")], || {
        Defect::default().status(Box::new(|status| {
            for group in &mut status.groups {
                group.counts.dropped = 0;
            }
        }))
    }),
    Double::new("counts no expiry", &[("F8", "messages expired and")], || {
        Defect::default().status(Box::new(|status| {
            for group in &mut status.groups {
                group.counts.expired = 0;
            }
        }))
    }),
];

//! What things are called on the server.

use broker_core::{Error, Group, Result, TopicFilter};
use lapin::types::ShortString;

use crate::AmqpOptions;

/// A name for the wire.
///
/// # Errors
///
/// [`Invalid`](broker_core::ErrorKind::Invalid) over AMQP's 255 bytes.
pub(crate) fn short(what: &str, name: &str) -> Result<ShortString> {
    ShortString::try_new(name).map_err(|_| {
        let shown: String = name.chars().take(40).collect();
        Error::invalid(format!("{what} {shown:?}… has {} bytes; AMQP names have 255 at most", name.len()))
    })
}

/// The binding of a filter: a last `>` is one segment or more, which a topic exchange writes `*.#`.
pub(crate) fn binding_key(filter: &TopicFilter) -> Result<ShortString> {
    let text = filter.as_str();
    let key = match text.strip_suffix('>') {
        Some(before) => format!("{before}*.#"),
        None => text.to_owned(),
    };
    short("the binding of filter", &key)
}

/// Who makes a group's queue, and so what it is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Made {
    /// We do, durable, and leave its settings beside it.
    ByUs,
    /// Somebody else did.
    Before,
    /// Whoever comes first, by Go Micro's rules: not durable, and gone with its last consumer.
    AsGoMicro,
}

/// The names of one group's things.
#[derive(Clone, Debug)]
pub(crate) struct GroupNames {
    /// The queue: `NAME@FILTER`, unless it was given another name.
    pub(crate) queue: ShortString,
    /// The queue that keeps its dead letters, and the exchange before it, from which they go to the exchange of topics
    /// as well.
    pub(crate) dead: ShortString,
    /// The queue that holds one message: the group's settings.
    pub(crate) settings: ShortString,
    /// The queue that is there while somebody makes the group.
    pub(crate) making: ShortString,
    /// The queue that is there for a while after the group was deleted.
    pub(crate) deleted: ShortString,
    pub(crate) made: Made,
}

impl GroupNames {
    /// One of the queues of an ordered group that has several; no group's name has a slash.
    pub(crate) fn lane(&self, index: usize) -> Result<ShortString> {
        short("an ordered group's queue", &format!("{}/{index}", self.queue))
    }

    /// Whether its queues are those of an ordered group that has several. One may be left of a group that
    /// was half deleted.
    pub(crate) fn has_lanes(&self, queues: &[ShortString]) -> bool {
        queues.first().is_some_and(|first| *first != self.queue)
    }

    pub(crate) fn of(group: &Group, options: &AmqpOptions) -> Result<Self> {
        let name = group.to_string();
        let adopted = options.queues.get(&name);
        let (queue, made) = match adopted {
            Some(queue) => (queue.as_str(), Made::Before),
            None if options.go_micro => (group.name.as_str(), Made::AsGoMicro),
            None => (name.as_str(), Made::ByUs),
        };
        let what = format!("group {name}: its queue");
        Ok(Self {
            queue: short(&what, queue)?,
            dead: short(&what, &format!("broker.dead:{queue}"))?,
            settings: short(&what, &format!("broker.settings:{queue}"))?,
            making: short(&what, &format!("broker.making:{queue}"))?,
            deleted: short(&what, &format!("broker.deleted:{queue}"))?,
            made,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_become_bindings() {
        for (filter, key) in [("a.b", "a.b"), ("a.*", "a.*"), ("a.>", "a.*.#"), (">", "*.#"), ("*.b.>", "*.b.*.#")] {
            assert_eq!(binding_key(&TopicFilter::new(filter).unwrap()).unwrap().as_str(), key);
        }
    }

    #[test]
    fn a_name_amqp_cannot_carry_is_refused() {
        let group: Group = format!("{}@{}", "g".repeat(128), "t".repeat(200)).parse().unwrap();
        let options = AmqpOptions::from_url(broker_core::BrokerUrl::parse("amqp://h").unwrap()).unwrap();
        let error = GroupNames::of(&group, &options).unwrap_err();
        assert_eq!(error.kind(), broker_core::ErrorKind::Invalid);
        assert!(error.message().contains("255"), "{error}");
    }
}

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

/// The names of one group's things.
#[derive(Clone, Debug)]
pub(crate) struct GroupNames {
    /// The queue: `NAME@FILTER`, unless it was given another name.
    pub(crate) queue: ShortString,
    /// The queue that keeps its dead letters.
    pub(crate) dead: ShortString,
    /// The routing key that reaches that queue and no other.
    pub(crate) dead_key: ShortString,
    /// The queue that holds one message: the group's settings.
    pub(crate) settings: ShortString,
    /// Whether the queue is somebody else's.
    pub(crate) adopted: bool,
}

impl GroupNames {
    pub(crate) fn of(group: &Group, options: &AmqpOptions) -> Result<Self> {
        let name = group.to_string();
        let adopted = options.queues.get(&name);
        let queue = adopted.unwrap_or(&name);
        let what = format!("group {name}: its queue");
        Ok(Self {
            queue: short(&what, queue)?,
            dead: short(&what, &format!("broker.dead:{queue}"))?,
            // In a binding `*` and `#` would be wildcards; neither stand-in is in a name's grammar.
            dead_key: short(&what, &format!("broker-dead.{}", queue.replace('*', "+").replace('#', "~")))?,
            settings: short(&what, &format!("broker.settings:{queue}"))?,
            adopted: adopted.is_some(),
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

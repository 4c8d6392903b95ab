//! Who shares a backlog.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::topic::check_segments;
use crate::{Error, Result, TopicFilter};

const MAX_GROUP_BYTES: usize = 128;

/// The name of a group: a topic's grammar, 128 bytes at most.
///
/// ```
/// use broker_core::GroupName;
///
/// assert_eq!(GroupName::new("billing")?.as_str(), "billing");
/// assert!(GroupName::new("billing@eu").is_err());
/// # Ok::<(), broker_core::Error>(())
/// ```
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GroupName(Arc<str>);

impl GroupName {
    /// Parses a name.
    ///
    /// # Errors
    ///
    /// [`Invalid`](crate::ErrorKind::Invalid), naming it and what is allowed.
    pub fn new(name: impl AsRef<str>) -> Result<Self> {
        check_segments("group name", name.as_ref(), MAX_GROUP_BYTES)?;
        Ok(Self(name.as_ref().into()))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for GroupName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for GroupName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GroupName({})", self.0)
    }
}

impl FromStr for GroupName {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::new(name)
    }
}

impl TryFrom<&str> for GroupName {
    type Error = Error;

    fn try_from(name: &str) -> Result<Self> {
        Self::new(name)
    }
}

crate::text::serde_as_text!(GroupName);

/// A group: the pair of a name and a filter. Its members share one backlog; every other group has
/// a copy of its own, and the same name on another filter is another group.
///
/// A group lives, with members or without, until
/// [`Broker::delete_group`](crate::Broker::delete_group). It is written `NAME@FILTER`, which is
/// also what Kafka's `group.id` and RabbitMQ's queue are called.
///
/// ```
/// use broker_core::Group;
///
/// let group: Group = "billing@orders.>".parse()?;
/// assert_eq!(group.name.as_str(), "billing");
/// assert_eq!(group.filter.as_str(), "orders.>");
/// assert_eq!(group.to_string(), "billing@orders.>");
/// # Ok::<(), broker_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Group {
    /// What the members call themselves.
    pub name: GroupName,
    /// The topics they share.
    pub filter: TopicFilter,
}

impl Group {
    /// The group `name` on `filter`.
    pub fn new(name: GroupName, filter: TopicFilter) -> Self {
        Self { name, filter }
    }
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.name, self.filter)
    }
}

impl FromStr for Group {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (name, filter) = text.split_once('@').ok_or_else(|| {
            Error::invalid(format!("group {text:?}: it is written NAME@FILTER, as in billing@orders.>"))
        })?;
        Ok(Self::new(name.parse()?, filter.parse()?))
    }
}

crate::text::serde_as_text!(Group);

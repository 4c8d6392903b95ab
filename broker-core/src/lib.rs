#![doc = include_str!("../README.md")]

// The contract, in the order a reader needs it.
mod broker;
mod ext;

mod filter;
mod group;
mod headers;
mod message;
mod topic;

mod operation;
mod publisher;
mod receipt;

mod delivery;
mod handler;
mod retry;
mod subscribe;
mod subscription;

mod capabilities;
mod connect;
mod dead_letter;
mod error;
mod status;

// The in-process broker.
mod memory;

// What adapters share.
mod confirms;
mod text;
mod time;

pub use broker::Broker;
pub use capabilities::{Capabilities, Support};
pub use confirms::Confirms;
pub use connect::{BrokerUrl, Connector, Connectors};
pub use dead_letter::DeadLetter;
pub use delivery::{Deliveries, Delivery, Failure, Received, Settlement};
pub use error::{Error, ErrorKind, Result};
pub use ext::BrokerExt;
pub use filter::TopicFilter;
pub use group::{Group, GroupName};
pub use handler::{Handling, IntoSettlement};
pub use headers::{HeaderName, Headers};
pub use memory::{MemoryBroker, MemoryOptions, Retention};
pub use message::{Message, MessageId};
pub use operation::{BoxFuture, Confirm, Operation, Publish, PublishBatch, Settle};
pub use publisher::{Producer, Publisher, PublisherOptions};
pub use receipt::Receipt;
pub use retry::RetryPolicy;
pub use status::{Counts, DrainReport, GroupStatus, State, Status, SubscriptionStatus};
pub use subscribe::{Backlog, GroupOptions, GroupSettings, Overflow, StartAt, Subscribe};
pub use subscription::{Consumer, Gap, Subscription};
pub use time::{Timestamp, duration_text, format_duration, parse_duration};
pub use topic::Topic;

//! What Kafka can do.

use broker_core::{Capabilities, Support};

use crate::KafkaConfig;

/// What a broker with this configuration can keep; the README says where the limits are.
///
/// Without `partitions` the server decides how many a new topic has, one unless it was told
/// otherwise; so one is what can be promised.
///
/// ```
/// use broker_core::{BrokerUrl, Support};
/// use broker_kafka::{KafkaConfig, capabilities};
///
/// let can = capabilities(&KafkaConfig::from_url(BrokerUrl::parse("kafka://host?partitions=12")?)?);
/// assert!(can.durable && can.tombstones == Support::Full);
/// assert_eq!(can.max_active_members, Some(12));
/// # Ok::<(), broker_core::Error>(())
/// ```
pub fn capabilities(config: &KafkaConfig) -> Capabilities {
    let mut can = Capabilities::all();
    can.durable = true;
    can.delay = Support::None;
    can.expiry = Support::Limited;
    can.deduplication = Support::None;
    can.require_route = Support::None;
    can.matched = false;
    can.overflow_wait = Support::None;
    can.overflow_reject = Support::None;
    can.overflow_drop_oldest = Support::None;
    can.dead_letters = Support::Limited;
    can.max_active_members = Some(config.partitions.unwrap_or(1));
    can
}

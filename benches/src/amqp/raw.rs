//! Raw lapin, publishing as its user writes it: each `basic_publish` awaited, then its confirm, so many
//! of them outstanding.

use std::collections::VecDeque;
use std::sync::Arc;

use broker_amqp::lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use broker_amqp::lapin::types::{AMQPValue, FieldTable, ShortString};
use broker_amqp::lapin::{BasicProperties, Channel, Confirmation, Connection, PublisherConfirm};
use bytes::Bytes;
use futures_util::future::try_join_all;

use super::scene::connect;
use super::{Load, Scene, timed};
use crate::Result;
use crate::sample::Sample;

/// A channel with confirms, and what every message carries.
pub(super) struct Publisher {
    _connection: Connection,
    channel: Channel,
    properties: BasicProperties,
    exchange: ShortString,
    key: ShortString,
    body: Bytes,
}

impl Publisher {
    /// To the exchange of the scene.
    pub(super) async fn open(scene: &Scene) -> Result<Self> {
        Self::open_to(scene, scene.exchange(), scene.topic.as_str()).await
    }

    pub(super) async fn open_to(scene: &Scene, exchange: &str, key: &str) -> Result<Self> {
        let (connection, channel) = connect(&scene.url).await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        Ok(Self {
            _connection: connection,
            channel,
            properties: properties(scene.load),
            exchange: exchange.into(),
            key: key.into(),
            body: scene.load.body(),
        })
    }

    async fn send(&self) -> Result<PublisherConfirm> {
        let options = BasicPublishOptions { mandatory: true, immediate: false };
        let (exchange, key) = (self.exchange.clone(), self.key.clone());
        Ok(self.channel.basic_publish(exchange, key, options, &self.body, self.properties.clone()).await?)
    }

    pub(super) async fn publish_one(&self) -> Result<()> {
        confirmed(self.send().await?.await?)
    }

    /// Hands so many at a time to lapin, which costs it less than one by one.
    pub(super) async fn publish_joined(&self, messages: u64, window: usize, joined: usize) -> Result<()> {
        let mut confirms = VecDeque::with_capacity(window);
        let mut left = usize::try_from(messages)?;
        while left > 0 {
            let many = joined.min(left);
            left -= many;
            while confirms.len() + many > window
                && let Some(confirm) = confirms.pop_front()
            {
                confirmed(confirm.await?)?;
            }
            confirms.extend(try_join_all((0..many).map(|_| self.send())).await?);
        }
        for confirm in confirms {
            confirmed(confirm.await?)?;
        }
        Ok(())
    }

    async fn publish(&self, messages: u64, window: usize) -> Result<()> {
        let mut confirms = VecDeque::with_capacity(window);
        for _ in 0..messages {
            if confirms.len() == window
                && let Some(confirm) = confirms.pop_front()
            {
                confirmed(confirm.await?)?;
            }
            confirms.push_back(self.send().await?);
        }
        for confirm in confirms {
            confirmed(confirm.await?)?;
        }
        Ok(())
    }
}

fn confirmed(confirmation: Confirmation) -> Result<()> {
    match confirmation {
        Confirmation::Ack(None) => Ok(()),
        other => Err(format!("a message was not taken: {other:?}").into()),
    }
}

/// What the adapter writes for a message with nothing but a payload.
fn properties(load: Load) -> BasicProperties {
    let mut headers = FieldTable::default();
    headers.insert("x-broker-timestamp".into(), AMQPValue::LongLongInt(1_700_000_000_000));
    BasicProperties::default()
        .with_message_id("0190a5e0-7a3b-7000-8000-000000000001".into())
        .with_delivery_mode(if load.is_persistent() { 2 } else { 1 })
        .with_timestamp(1_700_000_000)
        .with_headers(headers)
}

/// A round.
pub(super) async fn publish(raw: Arc<Publisher>, scene: Arc<Scene>, messages: u64, window: usize) -> Result<Sample> {
    scene.purge().await?;
    timed(messages, raw.publish(messages, window)).await
}

/// A round that hands half a window to lapin at a time, at most 64 messages.
pub(super) async fn publish_joined(
    raw: Arc<Publisher>,
    scene: Arc<Scene>,
    messages: u64,
    window: usize,
) -> Result<Sample> {
    scene.purge().await?;
    timed(messages, raw.publish_joined(messages, window, (window / 2).min(64))).await
}

//! A channel that may be dropped at any time.

use std::ops::Deref;

use broker_core::Result;
use lapin::options::{BasicConsumeOptions, BasicQosOptions};
use lapin::types::{FieldTable, ShortString};
use lapin::{Channel, Consumer};
use parking_lot::Mutex;
use tokio::runtime::Handle;

use crate::error::from_lapin;
use crate::intake::Take;
use crate::link::Live;

/// A channel of one's own; dropped, it is closed when the server has answered all that was asked on it.
///
/// The server answers a mistake by closing the channel, and lapin (4.12) loses the connection, with every other channel on
/// it, where both ends close one at once: it takes the answer to its own close for one to a channel that is none. So
/// none is closed while an answer is due.
pub(crate) struct OwnChannel {
    channel: Channel,
    live: Live,
    /// They end with the channel: lapin cancels a consumer that is dropped, and the server would give the queue to the
    /// next while this channel still holds some of its messages.
    consumers: Mutex<Vec<Consumer>>,
}

impl OwnChannel {
    pub(crate) fn new(channel: Channel, live: Live) -> Self {
        Self { channel, live, consumers: Mutex::new(Vec::new()) }
    }

    /// Its deliveries go to `take` from now on, for whichever consumer they are.
    pub(crate) fn deliver_to(&self, take: Take) {
        self.live.intakes.add(self.channel.id(), take);
    }

    /// Consumes a queue until it is cancelled, or the channel is closed. What is told of it is when that is; its deliveries
    /// are [`taken`](Self::deliver_to) before.
    pub(crate) async fn consume(&self, queue: &ShortString) -> Result<Consumer> {
        let (tag, none) = (ShortString::default(), FieldTable::default());
        let consuming = self.channel.basic_consume(queue.clone(), tag, BasicConsumeOptions::default(), none);
        let consumer = consuming.await.map_err(from_lapin)?;
        self.consumers.lock().push(consumer.clone());
        Ok(consumer)
    }
}

impl Deref for OwnChannel {
    type Target = Channel;

    fn deref(&self) -> &Channel {
        &self.channel
    }
}

impl Drop for OwnChannel {
    fn drop(&mut self) {
        if !self.channel.status().connected() {
            return;
        }
        // Without a runtime there is no server to wait for either.
        let Ok(runtime) = Handle::try_current() else { return };
        let (channel, live) = (self.channel.clone(), self.live.clone());
        let consumers = std::mem::take(self.consumers.get_mut());
        runtime.spawn(async move {
            // It is answered after all that was asked before, unless one of those closes the channel.
            match channel.basic_qos(0, BasicQosOptions::default()).await {
                // That it may have been lost meanwhile changes nothing.
                Ok(()) => drop(channel.close(200, "OK".into()).await),
                Err(_) if live.is_up() => live.wear(),
                Err(_) => {}
            }
            drop(consumers);
        });
    }
}

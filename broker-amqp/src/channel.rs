//! A channel that may be dropped at any time.

use std::ops::Deref;

use lapin::Channel;
use lapin::options::BasicQosOptions;
use tokio::runtime::Handle;

use crate::link::Live;

/// A channel of one's own; dropped, it is closed when the server has answered all that was asked on it.
///
/// The server answers a mistake by closing the channel, and lapin (4.12) loses the connection, with every other channel on
/// it, where both ends close one at once: it takes the answer to its own close for one to a channel that is none. So
/// none is closed while an answer is due.
pub(crate) struct OwnChannel {
    channel: Channel,
    live: Live,
}

impl OwnChannel {
    pub(crate) fn new(channel: Channel, live: Live) -> Self {
        Self { channel, live }
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
        runtime.spawn(async move {
            // It is answered after all that was asked before, unless one of those closes the channel.
            match channel.basic_qos(0, BasicQosOptions::default()).await {
                // That it may have been lost meanwhile changes nothing.
                Ok(()) => drop(channel.close(200, "OK".into()).await),
                Err(_) if live.is_up() => live.wear(),
                Err(_) => {}
            }
        });
    }
}

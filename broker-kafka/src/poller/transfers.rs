//! Messages that go to other topics: dead letters, and retries that wait there.

use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::time::Instant;

use crossbeam_channel::Sender;

use super::{AGAIN, Poller};
use crate::record::Travel;
use crate::state::TransferKind;

impl Poller {
    pub(super) fn transfer(&mut self) {
        let now = Instant::now();
        let mut fresh = self.member.state(|state| state.take_transfers());
        if now >= self.try_again {
            fresh.append(&mut self.refused);
        }
        for transfer in fresh {
            let topic = self.publishing.topic(&transfer.topic);
            let retried = match &transfer.kind {
                TransferKind::Dead(_) => None,
                TransferKind::Retry(retried) => Some(retried.clone()),
            };
            let travel = Travel { for_group: transfer.kept_for.clone(), retried };
            let publish = self.publishing.publish_late(&topic, transfer.copy.clone(), travel);
            self.moving.push((transfer, publish));
        }
        if self.moving.is_empty() {
            return;
        }
        let waker = Waker::from(Arc::new(Rouse(self.rouse.clone())));
        let mut cx = Context::from_waker(&waker);
        for (transfer, mut publish) in std::mem::take(&mut self.moving) {
            match std::pin::Pin::new(&mut publish).poll(&mut cx) {
                Poll::Pending => self.moving.push((transfer, publish)),
                Poll::Ready(result) => {
                    if let Some(transfer) = self.member.transferred(transfer, result.map(drop)) {
                        self.refused.push(transfer);
                        self.try_again = now + AGAIN;
                    }
                }
            }
        }
    }
}

/// Rouses the polling thread when a message has arrived where it was sent.
struct Rouse(Sender<()>);

impl Wake for Rouse {
    fn wake(self: Arc<Self>) {
        let _ = self.0.try_send(());
    }
}

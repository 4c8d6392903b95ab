//! What the broker says of its groups, for who cannot wait long for it: a scrape has seconds, and a broker that hangs
//! takes as long as its own timeouts.

use std::sync::Arc;
use std::time::Duration;

use broker_core::{Broker, Status};
use tokio::sync::{Mutex, watch};
use tokio::time::{Instant, timeout};

/// How long the broker is waited for.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long what it said last is told where it takes longer; then there is nothing to tell.
const STALE: Duration = Duration::from_secs(60);

/// What the broker said last.
#[derive(Debug, Default)]
pub(crate) struct Told {
    last: watch::Sender<Option<(Instant, Arc<Status>)>>,
    /// Held while it is asked.
    asking: Arc<Mutex<()>>,
}

impl Told {
    /// Asks the broker, once for all who ask here meanwhile, and waits for a moment. It is not interrupted: what it says
    /// later is there for the next who asks, so that one that is always slow is late and not silent.
    pub(crate) async fn soon(&self, broker: &Arc<dyn Broker>) -> Option<Arc<Status>> {
        let mut answer = self.last.subscribe();
        if let Ok(asking) = Arc::clone(&self.asking).try_lock_owned() {
            let (broker, last) = (Arc::clone(broker), self.last.clone());
            tokio::spawn(async move {
                // One that never answers is asked again.
                let said = timeout(STALE, broker.status()).await.ok().and_then(Result::ok);
                // Before it is told: who comes in between asks anew, and waits for nothing that was told before.
                drop(asking);
                last.send_replace(said.map(|status| (Instant::now(), Arc::new(status))));
            });
        }
        // What comes too late changes nothing here.
        let _ = timeout(PATIENCE, answer.changed()).await;
        let last = answer.borrow();
        last.as_ref().filter(|(when, _)| when.elapsed() < STALE).map(|(_, status)| Arc::clone(status))
    }
}

//! What an adapter's author writes to run the suite: how to make a broker of their kind, and what of
//! its server the tests can control.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use broker_core::{BoxFuture, Broker, Connectors, Result, Topic};

/// Makes brokers of one kind for one check, all onto the same server.
///
/// A [`Suite`](crate::Suite) makes one harness per check. Only [`name`](Self::name) and
/// [`open`](Self::open) must be written; the rest says what else can be brought about, and a check
/// that needs what is missing reports "no control" instead of passing in silence.
///
/// ```
/// use std::sync::Arc;
/// use broker_core::{Broker, Connectors, Result};
/// use broker_tests::{Harness, Place};
///
/// #[derive(Debug)]
/// struct InProcess(String);
///
/// impl Harness for InProcess {
///     fn name(&self) -> String {
///         "memory:".to_owned()
///     }
///
///     fn open(&self) -> Result<Arc<dyn Broker>> {
///         Connectors::new().open(&format!("memory:{}", self.0))
///     }
///
///     fn place(&self) -> Place {
///         Place::InProcess
///     }
/// }
/// # InProcess("example".into()).open().unwrap();
/// ```
pub trait Harness: fmt::Debug + Send + Sync {
    /// What the broker is called in the table, as in `"memory:"`.
    fn name(&self) -> String;

    /// A new handle onto the server, with a connection of its own. Does no I/O. In-process, every
    /// handle is the same broker.
    ///
    /// # Errors
    ///
    /// What opening says.
    fn open(&self) -> Result<Arc<dyn Broker>>;

    /// Where the broker lives, and so what outlives a `close`.
    fn place(&self) -> Place {
        Place::Server
    }

    /// How long the checks wait.
    fn timing(&self) -> Timing {
        Timing::default()
    }

    /// A handle onto a broker whose topics retain history, where that has to be asked for.
    ///
    /// # Errors
    ///
    /// What opening says.
    fn retaining(&self) -> Result<Arc<dyn Broker>> {
        self.open()
    }

    /// Makes `topic` exist, where topics must.
    ///
    /// # Errors
    ///
    /// What the server says.
    fn prepare<'a>(&'a self, topic: &'a Topic) -> BoxFuture<'a, Result<()>> {
        let _ = topic;
        Box::pin(std::future::ready(Ok(())))
    }

    /// A way to the server that can be cut, if there is one.
    ///
    /// # Errors
    ///
    /// What setting it up says.
    fn link(&self) -> BoxFuture<'_, Result<Option<Arc<dyn Link>>>> {
        Box::pin(std::future::ready(Ok(None)))
    }

    /// A handle whose server is not there, with a short connect timeout; `None` if this cannot be
    /// (in-process).
    fn unreachable(&self) -> Option<Result<Arc<dyn Broker>>> {
        None
    }

    /// A handle opened with a credential that must never be seen again; `None` if brokers of this
    /// kind have none.
    fn secret(&self) -> Option<Secret> {
        None
    }

    /// Puts bytes on `topic` that are no message of ours, past the broker's own publishing; `None`
    /// if that cannot be done. The result tells whether the server took them.
    fn inject<'a>(&'a self, topic: &'a Topic) -> BoxFuture<'a, Option<Result<()>>> {
        let _ = topic;
        Box::pin(std::future::ready(None))
    }

    /// Whether the adapter's raw client can be reached through `broker`; `None` if it has none.
    fn raw_client<'a>(&'a self, broker: &'a dyn Broker) -> BoxFuture<'a, Option<bool>> {
        let _ = broker;
        Box::pin(std::future::ready(None))
    }
}

/// Where a broker lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In this process: `close` ends it, and what stayed is gone.
    InProcess,
    /// A server elsewhere: `close` ends a connection, and groups and their messages stay.
    Server,
}

/// How long the checks wait. None of it is a measurement: a slow broker passes, a stuck one does not.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// For what must happen.
    pub patience: Duration,
    /// To see that nothing happens.
    pub quiet: Duration,
    /// After how long an unsettled delivery of a gone member may come back at the latest (a lease, a
    /// session); what must not come back is waited for this long as well where it is short.
    pub lease: Duration,
    /// For a whole check, after which it is called stuck.
    pub guard: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            patience: Duration::from_secs(30),
            quiet: Duration::from_millis(300),
            lease: Duration::from_secs(30),
            guard: Duration::from_secs(300),
        }
    }
}

impl Timing {
    /// For a delivery, which may be one that a gone member or a lost connection held.
    pub fn arrival(&self) -> Duration {
        self.patience + self.lease
    }

    /// For a broker in this process.
    pub fn in_process() -> Self {
        Self { quiet: Duration::from_millis(100), lease: Duration::ZERO, ..Self::default() }
    }
}

/// A way to the server that a check can cut and mend. Dropping it leaves it mended or gone.
pub trait Link: fmt::Debug + Send + Sync {
    /// A new handle that reaches the server through this link alone.
    ///
    /// # Errors
    ///
    /// What opening says.
    fn open(&self) -> Result<Arc<dyn Broker>>;

    /// Connections made through it so far; `None` if that is not known.
    fn connections(&self) -> Option<u64>;

    /// Breaks every connection; new ones succeed.
    fn cut(&self) -> BoxFuture<'_, ()>;

    /// Breaks every connection and refuses new ones.
    fn down(&self) -> BoxFuture<'_, ()>;

    /// Keeps connections and takes new ones, and lets no byte through in either direction.
    fn stall(&self) -> BoxFuture<'_, ()>;

    /// Mends it.
    fn up(&self) -> BoxFuture<'_, ()>;

    /// Restarts the server, and tells whether it really did: what it keeps, it keeps, and what was
    /// in its memory is gone. Where the server itself cannot be restarted, what its clients see of a
    /// restart, and false: the connections break, nobody listens, it is back.
    ///
    /// # Errors
    ///
    /// If it did not come back.
    fn restart(&self) -> BoxFuture<'_, Result<bool>> {
        Box::pin(async move {
            self.down().await;
            tokio::time::sleep(Duration::from_millis(100)).await;
            self.up().await;
            Ok(false)
        })
    }
}

/// A credential, and what opening a broker with it gave.
#[derive(Debug)]
pub struct Secret {
    /// The text that must not be seen.
    pub text: String,
    /// The handle, or the error.
    pub opened: Result<Arc<dyn Broker>>,
}

/// The in-process broker: every harness is a broker of its own.
#[derive(Debug)]
pub struct InProcess {
    name: String,
    /// Query parameters of its URL.
    parameters: Option<String>,
}

impl InProcess {
    /// A new broker under a name nobody else has.
    pub fn new() -> Self {
        Self::with_parameters(None)
    }

    /// With query parameters, as in `"retain=100"`.
    pub fn with_parameters(parameters: Option<String>) -> Self {
        Self { name: format!("suite-{}", crate::scene::unique()), parameters }
    }

    fn open_as(&self, suffix: &str, parameters: Option<&str>) -> Result<Arc<dyn Broker>> {
        let query = parameters.map(|parameters| format!("?{parameters}")).unwrap_or_default();
        Connectors::new().open(&format!("memory:{}{suffix}{query}", self.name))
    }
}

impl Default for InProcess {
    fn default() -> Self {
        Self::new()
    }
}

impl Harness for InProcess {
    fn name(&self) -> String {
        "memory:".to_owned()
    }

    fn open(&self) -> Result<Arc<dyn Broker>> {
        self.open_as("", self.parameters.as_deref())
    }

    fn place(&self) -> Place {
        Place::InProcess
    }

    fn timing(&self) -> Timing {
        Timing::in_process()
    }

    fn retaining(&self) -> Result<Arc<dyn Broker>> {
        self.open_as("-retaining", Some("retain=1000"))
    }

    fn secret(&self) -> Option<Secret> {
        let text = "hunter2-suite".to_owned();
        let opened = Connectors::new().open(&format!("memory://user:{text}@{}", self.name));
        Some(Secret { text, opened })
    }
}

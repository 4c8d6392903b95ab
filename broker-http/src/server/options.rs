//! How a server is set up.

use std::path::{Path, PathBuf};

use crate::Limits;
use crate::push::{Guard, PushClient};

/// How a [`Server`](crate::Server) is set up.
///
/// ```
/// use broker_http::ServerOptions;
///
/// let options = ServerOptions::new().with_development(true).with_state("subscriptions.json");
/// assert!(options.is_development());
/// ```
#[derive(Clone, Debug, Default)]
pub struct ServerOptions {
    development: bool,
    allowed_origins: Vec<String>,
    limits: Limits,
    state: Option<PathBuf>,
    guard: Guard,
}

impl ServerOptions {
    /// The defaults: no development mode, no web page allowed, nothing kept.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets development mode: endpoints on this machine may be pushed to, and requests for another
    /// host or from a web page elsewhere are refused.
    #[must_use]
    pub fn with_development(mut self, development: bool) -> Self {
        self.development = development;
        self
    }

    /// Sets the origins, as in `https://app.example.com`, whose web pages may use the server.
    #[must_use]
    pub fn with_allowed_origins(mut self, origins: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.allowed_origins = origins.into_iter().map(Into::into).collect();
        self
    }

    /// Sets what is taken from outside at most.
    #[must_use]
    pub fn with_limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Keeps subscriptions in this file.
    #[must_use]
    pub fn with_state(mut self, path: impl Into<PathBuf>) -> Self {
        self.state = Some(path.into());
        self
    }

    /// Sets which addresses may be pushed to.
    #[must_use]
    pub fn with_guard(mut self, guard: Guard) -> Self {
        self.guard = guard;
        self
    }

    /// Whether development mode is on.
    pub fn is_development(&self) -> bool {
        self.development
    }

    /// The origins whose web pages may use the server.
    pub fn allowed_origins(&self) -> &[String] {
        &self.allowed_origins
    }

    /// What is taken from outside at most.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The file subscriptions are kept in.
    pub fn state(&self) -> Option<&Path> {
        self.state.as_deref()
    }

    pub(crate) fn push_client(&self) -> PushClient {
        PushClient::new(self.guard.clone().with_development(self.development))
    }
}

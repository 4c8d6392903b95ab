//! How a server is set up.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use broker_core::{Error, GroupName, Result};
use http::HeaderValue;

use super::access::Access;
use super::topics::Topics;
use crate::push::{Guard, PushClient, PushTls};
use crate::traces::Traces;
use crate::{Limits, SubscriptionSpec};

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
    webhook_origin: Option<HeaderValue>,
    webhook_callback: Option<String>,
    access: Arc<Access>,
    push_tls: PushTls,
    subscriptions: BTreeMap<GroupName, SubscriptionSpec>,
    topics: Topics,
    traces: Traces,
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

    /// Asks every endpoint whether it wants pushes from `origin` (this server's name, as in
    /// `broker.example.com`) before a subscription is made or replaced: the `OPTIONS` handshake of
    /// CloudEvents' web hooks. An endpoint that does not consent is refused; a rate it allows is a
    /// `rate_limit`. Off unless it is set.
    ///
    /// # Errors
    ///
    /// [`Invalid`](broker_core::ErrorKind::Invalid) for what is no host's name.
    ///
    /// ```
    /// use broker_http::ServerOptions;
    ///
    /// let options = ServerOptions::new().with_webhook_origin("broker.example.com")?;
    /// assert_eq!(options.webhook_origin(), Some("broker.example.com"));
    /// assert!(ServerOptions::new().with_webhook_origin("a b").is_err());
    /// # Ok::<(), broker_core::Error>(())
    /// ```
    pub fn with_webhook_origin(mut self, origin: &str) -> Result<Self> {
        let is_name = !origin.is_empty()
            && origin.len() <= 255
            && origin.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._:".contains(&byte));
        let value = HeaderValue::from_str(origin).ok().filter(|_| is_name);
        let invalid = || Error::invalid("webhook origin: it is this server's name, as in broker.example.com");
        self.webhook_origin = Some(value.ok_or_else(invalid)?);
        Ok(self)
    }

    /// The name by which endpoints are asked whether they want pushes, if they are.
    pub fn webhook_origin(&self) -> Option<&str> {
        self.webhook_origin.as_ref().and_then(|origin| origin.to_str().ok())
    }

    /// Lets endpoints that are asked for their consent give it later, by a request to a URL below
    /// `base`, which is how they reach this server, as in `https://broker.example.com`: such a
    /// subscription is answered 202, and made when permission comes. Off unless it is set.
    ///
    /// # Errors
    ///
    /// [`Invalid`](broker_core::ErrorKind::Invalid) for what is no URL of `http` or `https`, or has more
    /// than a path.
    ///
    /// ```
    /// use broker_http::ServerOptions;
    ///
    /// let options = ServerOptions::new().with_webhook_callback("https://broker.example.com/")?;
    /// assert_eq!(options.webhook_callback(), Some("https://broker.example.com"));
    /// assert!(ServerOptions::new().with_webhook_callback("broker.example.com").is_err());
    /// # Ok::<(), broker_core::Error>(())
    /// ```
    pub fn with_webhook_callback(mut self, base: &str) -> Result<Self> {
        let url = url::Url::parse(base).ok().filter(|url| {
            let plain = url.username().is_empty() && url.password().is_none();
            ["http", "https"].contains(&url.scheme()) && plain && url.query().is_none() && url.fragment().is_none()
        });
        let invalid = || {
            Error::invalid(
                "webhook callback: it is the URL at which endpoints reach this server, as in https://broker.example.com",
            )
        };
        self.webhook_callback = Some(url.ok_or_else(invalid)?.as_str().trim_end_matches('/').to_owned());
        Ok(self)
    }

    /// Below what URL endpoints may consent later, if they may.
    pub fn webhook_callback(&self) -> Option<&str> {
        self.webhook_callback.as_deref()
    }

    pub(crate) fn origin(&self) -> Option<&HeaderValue> {
        self.webhook_origin.as_ref()
    }

    /// Sets who may do what. [`Server::set_access`](crate::Server::set_access) changes it later.
    #[must_use]
    pub fn with_access(mut self, access: Access) -> Self {
        self.access = Arc::new(access);
        self
    }

    /// Sets whom pushes trust and what they show, where a subscription does not say.
    ///
    /// # Errors
    ///
    /// As [`PushTls::check`].
    pub fn with_push_tls(mut self, tls: PushTls) -> Result<Self> {
        tls.check()?;
        self.push_tls = tls;
        Ok(self)
    }

    /// Declares subscriptions: they stand from the start, are what is said here, and can be neither
    /// replaced nor deleted over the interface.
    /// [`Server::set_subscriptions`](crate::Server::set_subscriptions) changes them later.
    #[must_use]
    pub fn with_subscriptions(mut self, subscriptions: BTreeMap<GroupName, SubscriptionSpec>) -> Self {
        self.subscriptions = subscriptions;
        self
    }

    /// Declares topics: bounds for some, and whether there are any others.
    /// [`Server::set_topics`](crate::Server::set_topics) changes them later.
    #[must_use]
    pub fn with_topics(mut self, topics: Topics) -> Self {
        self.topics = topics;
        self
    }

    /// Tells of every publish and push here: one trace from the publisher to the endpoint.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> broker_core::Result<()> {
    /// use broker_http::{OtlpOptions, ServerOptions, Traces};
    ///
    /// let traces = Traces::otlp(OtlpOptions::new("http://127.0.0.1:4318")?)?;
    /// let options = ServerOptions::new().with_traces(traces);
    /// # let _ = options; Ok(()) }
    /// ```
    #[cfg(feature = "otlp")]
    #[must_use]
    pub fn with_traces(mut self, traces: Traces) -> Self {
        self.traces = traces;
        self
    }

    pub(crate) fn traces(&self) -> &Traces {
        &self.traces
    }

    pub(crate) fn subscriptions(&self) -> &BTreeMap<GroupName, SubscriptionSpec> {
        &self.subscriptions
    }

    pub(crate) fn topics(&self) -> &Topics {
        &self.topics
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

    pub(crate) fn access(&self) -> Arc<Access> {
        Arc::clone(&self.access)
    }

    pub(crate) fn push_client(&self) -> PushClient {
        let client = PushClient::new(Guard::new());
        #[cfg(feature = "otlp")]
        let client = client.with_traces(self.traces.clone());
        self.instruct(&client);
        client
    }

    /// Has pushes go where these options say, and trust whom they say.
    pub(crate) fn instruct(&self, client: &PushClient) {
        client.set(self.guard.clone().with_development(self.development), self.push_tls.clone());
    }
}

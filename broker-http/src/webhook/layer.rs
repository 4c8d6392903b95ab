//! Verification before a service.

use std::pin::Pin;
use std::task::{Context, Poll};

use axum::BoxError;
use axum::body::Body;
use axum::response::IntoResponse;
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use tower::{Layer, Service};

use super::replay::Known;
use super::verifier::Verifier;
use crate::push::consent::REQUEST_ORIGIN;

/// Puts [`Verify`] before a service.
///
/// ```
/// use broker_http::webhook::{Verifier, VerifyLayer};
/// use tower::{Layer, service_fn};
///
/// let service = service_fn(async |request: http::Request<axum::body::Body>| {
///     let _ = request;
///     Ok::<_, std::convert::Infallible>(http::Response::new(axum::body::Body::empty()))
/// });
/// let service = VerifyLayer::new(Verifier::new("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")?).layer(service);
/// # let _ = service;
/// # Ok::<(), broker_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct VerifyLayer(Verifier);

impl VerifyLayer {
    /// Verifies by `verifier`.
    pub fn new(verifier: Verifier) -> Self {
        Self(verifier)
    }
}

impl<S> Layer<S> for VerifyLayer {
    type Service = Verify<S>;

    fn layer(&self, inner: S) -> Verify<S> {
        Verify { inner, verifier: self.0.clone() }
    }
}

/// Lets verified pushes through, with a body that has been read, and answers the others itself.
///
/// What the service answered 2xx is done: the same push again, word for word, is answered 204 without
/// it. While it is at work the same push is 409, and after another answer it is as if it had never
/// come. A broker that asks whether its pushes are wanted is answered too, see [`Verifier::consent`].
#[derive(Clone, Debug)]
pub struct Verify<S> {
    inner: S,
    verifier: Verifier,
}

/// In the extensions of a request: it is verified, and who did it sees the answer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Verified;

impl<S, B, R> Service<Request<B>> for Verify<S>
where
    S: Service<Request<Body>, Response = Response<R>> + Clone + Send + 'static,
    S::Future: Send,
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
    R: http_body::Body<Data = Bytes> + Send + 'static,
    R::Error: Into<BoxError>,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        // The one that is ready does the work.
        let ready = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, ready);
        let verifier = self.verifier.clone();
        Box::pin(async move {
            let (mut parts, body) = request.into_parts();
            if parts.method == Method::OPTIONS && parts.headers.contains_key(REQUEST_ORIGIN) {
                return Ok(verifier.consent(&parts.headers));
            }
            let (body, claim) = match verifier.take(&parts.headers, body).await {
                Ok((body, Known::New(claim))) => (body, claim),
                Ok((_, Known::Done)) => return Ok(StatusCode::NO_CONTENT.into_response()),
                Ok((_, Known::Taken)) => return Ok(super::Refused::repeated().into_response()),
                Err(refused) => return Ok(refused.into_response()),
            };
            parts.extensions.insert(Verified);
            let response = inner.call(Request::from_parts(parts, Body::from(body))).await?;
            if response.status().is_success() {
                claim.done();
            }
            Ok(response.map(Body::new))
        })
    }
}

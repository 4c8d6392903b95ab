//! Receiving pushes in a Rust service: is a push from whom it should be, is it fresh, was it here
//! before?
//!
//! A [`Verifier`] has the keys. As axum's state it makes [`Pushed`] an extractor that verifies:
//!
//! ```
//! # fn main() -> broker_core::Result<()> {
//! use axum::{Router, routing::post};
//! use broker_http::webhook::{Pushed, Verifier};
//!
//! let app: Router = Router::new()
//!     .route("/hook", post(async |Pushed(push): Pushed| println!("{:?}", push.message)))
//!     .with_state(Verifier::new("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")?);
//! # let _ = app; Ok(()) }
//! ```
//!
//! As a [`VerifyLayer`] it stands before any service of tower's, whatever that does with the request:
//!
//! ```
//! # fn main() -> broker_core::Result<()> {
//! use axum::{Json, Router, routing::post};
//! use broker_http::webhook::{Verifier, VerifyLayer};
//!
//! let verifier = Verifier::new("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")?;
//! let app: Router = Router::new()
//!     .route("/hook", post(async |Json(order): Json<serde_json::Value>| println!("{order}")))
//!     .layer(VerifyLayer::new(verifier));
//! # let _ = app; Ok(()) }
//! ```
//!
//! Both answer what is not verified with 401, which our engine retries late: a key that was forgotten
//! in one place costs no message. Any sender that signs by Standard Webhooks is understood; [`Pushed`]
//! also wants the message to be in one of the modes of a push.
//!
//! Standard Webhooks signs id, time and body. In binary and raw mode everything else of an event is in
//! HTTP headers, which a signature does not cover: where an attacker could change them on the way (no
//! TLS), use the structured mode.

mod extract;
mod keys;
mod layer;
mod refused;
mod replay;
mod verifier;

pub use extract::{Pushed, PushedBatch};
pub use layer::{Verify, VerifyLayer};
pub use refused::Refused;
pub use verifier::Verifier;

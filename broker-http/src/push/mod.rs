//! The push engine: takes the deliveries of one subscription and POSTs them to its endpoint, over
//! any broker.
//!
//! Three mechanisms, never blurred: a *message* has retries, which are its group's; an *endpoint*
//! has a window of requests in flight, a rate limit and a breaker; a *subscription* has a backlog,
//! which is the broker's. Their decisions are functions of events and time, each in a file of its
//! own (`verdict`, `window`, `breaker`, `rate`, put together in `core`); `engine` and `lane` move
//! them, `connection`, `dial` and `guard` are the way to the endpoint, `encode` and `sign` make the
//! requests.
//!
//! An ordered group needs nothing here: the broker hands out one message of a key at a time.

mod attempts;
mod breaker;
mod client;
mod connection;
pub(crate) mod consent;
mod core;
mod dial;
mod encode;
mod engine;
mod guard;
mod handle;
mod lane;
mod rate;
mod resend;
mod shared;
mod sign;
mod special;
mod target;
mod timer;
mod trust;
mod verdict;
mod wakers;
mod window;

#[cfg(fuzzing)]
pub(crate) mod fuzzing;

pub use attempts::Attempt;
pub use client::{PushClient, Resolve};
pub use guard::{Allowed, Guard};
pub use handle::{Push, PushObserver, PushOptions, PushState, PushStatus};
pub use trust::PushTls;

// What traces tell of.
pub(crate) use target::Target;
#[cfg_attr(not(feature = "otlp"), allow(unused_imports, reason = "spans tell the decision"))]
pub(crate) use verdict::{Decision, Outcome, Verdict};

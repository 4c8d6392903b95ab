//! The conformance suite: what every broker must show, run unchanged against each of them.
//!
//! A check defends one line of the contract, by its letter and number. Checks are plain async
//! functions over `&dyn Broker`, one file per letter in [`suite`], registered in one table,
//! [`CHECKS`]. An adapter's author writes a [`Harness`] and runs a [`Suite`]:
//!
//! ```
//! use std::sync::Arc;
//! use broker_tests::{InProcess, Suite};
//!
//! # #[tokio::main] async fn main() {
//! let suite = Suite::new("memory:", || Arc::new(InProcess::new())).only(["A1", "B"]);
//! let reports = suite.run(|report| println!("{report}")).await;
//! assert!(reports.iter().all(|report| !report.is_failure()));
//! # }
//! ```
//!
//! Every check is itself proven by a broker that is wrong in one way, a *double*, which it must
//! catch: [`doubles`].
//!
//! # Settling twice
//!
//! That a delivery cannot be settled twice is the compiler's to keep (C4):
//!
//! ```compile_fail
//! async fn twice(delivery: broker_core::Delivery) {
//!     delivery.ack().await.ok();
//!     delivery.ack().await.ok();
//! }
//! ```

// Running the suite.
mod column;
mod harness;
mod patience;
mod report;
mod runner;

pub mod url;

// What checks are made of.
mod inbox;
mod messages;
mod proxy;
mod scene;
pub mod suite;
mod verdict;

// What proves them.
pub mod doubles;
mod wrapper;

pub use column::{from_json, keep_column};
pub use harness::{Harness, InProcess, Link, Place, Secret, Timing};
pub use inbox::Inbox;
pub use messages::{numbered, same_message, same_set, sent, shown};
pub use proxy::{Fault, Proxy};
pub use report::{Outcome, Report, json, markdown, summary};
pub use runner::{Form, Suite};
pub use scene::{Scene, quick_retry};
pub use suite::{CHECKS, Check};
pub use verdict::{Attempt, Failed, PASSED, Shown, Verdict, refused};
pub use wrapper::Wrapper;

/// The guide's code compiles.
#[cfg(doctest)]
#[doc = include_str!("../WRITING_AN_ADAPTER.md")]
#[derive(Debug)]
pub struct Guide;

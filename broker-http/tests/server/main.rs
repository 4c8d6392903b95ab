//! The HTTP interface, row by row, through real sockets.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

mod support;

mod access;
mod attacks;
mod carried;
mod ends;
mod http2;
mod idempotency;
mod lifecycle;
mod limits;
mod metrics;
mod optional;
mod owners;
mod pages;
mod places;
mod publish;
mod pull;
mod readers;
mod rights;
mod socket;
mod stream;
mod subscriptions;
mod tls;

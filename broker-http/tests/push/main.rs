//! Pushes to scripted endpoints over real sockets.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "these are tests")]

mod addresses;
mod batch;
mod connections;
mod dead_letters;
mod endpoint;
mod frames;
mod h2c;
mod support;
mod tls;
mod verdicts;

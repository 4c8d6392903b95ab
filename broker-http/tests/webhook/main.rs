//! A Rust service that receives pushes: by the extractor, and behind the tower layer.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

mod consent;
mod pushes;
mod standing;
mod support;
mod verify;

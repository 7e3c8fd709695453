//! `scripts/install.sh` on copies of this machine: releases that were tampered with, distributions, users, one prompt.
//!
//! The copies need root; where they cannot be made the tests say so and pass, and with `CI=true` they fail. What needs a
//! service manager is in `tests/e2e/install.rs`.

#![allow(clippy::unwrap_used)] // a test says what it expects by panicking

#[path = "../common/mod.rs"]
mod common;

mod cut;
mod fixture;
mod machines;
mod prompt;
mod releases;
mod sandbox;
mod undo;
mod users;

//! End to end: the real packages on booted hosts with a real systemd, bus, polkit and journal.
//!
//! They need root, and the packages that `scripts/package.sh` makes (in `target/packages`, or where `OPENGATEWAY_PACKAGES`
//! says). Where they cannot run they say so and pass; with `CI=true` they fail. A few hosts boot at a time, whatever the
//! number of threads. What they measure they print: `cargo test --test e2e -- --nocapture`.

#![allow(clippy::unwrap_used)] // a test says what it expects by panicking

#[path = "../common/mod.rs"]
mod common;

mod install;
mod lab;
mod package;
mod packages;
mod releases;

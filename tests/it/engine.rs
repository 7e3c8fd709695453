//! The models of a machine and their engines: the real owner task and the real supervision, with a child that misbehaves
//! in every way it knows (`engine/mock.rs`), and with the real engine where it was built.

mod crash;
mod daemon;
mod files;
mod lab;
mod life;
mod mock;
pub mod real;

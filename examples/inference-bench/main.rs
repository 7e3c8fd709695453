//! What `benches/inference` measures the OpenAI endpoint with.
//!
//! ```text
//! stub ADDR                        an OpenAI server that computes nothing; `stub.rs` tells its models
//! load NAME=URL …                  asks each in turn, N at a time on kept connections; times and requests a second
//! tokens NAME=URL … --model M      asks each in turn for long answers; tokens a second
//! ```
//!
//! A URL ends in `/v1`. All print one JSON object; the stub prints `{"ev":"ready"}` and serves on.

mod client;
mod load;
mod stub;
mod tokens;

use std::net::SocketAddr;

use clap::{Parser, Subcommand};

type Failed = Box<dyn std::error::Error + Send + Sync>;

#[derive(Debug, Parser)]
struct Arguments {
    #[command(subcommand)]
    role: Role,
}

#[derive(Debug, Subcommand)]
enum Role {
    Stub { address: SocketAddr },
    Load(load::Plan),
    Tokens(tokens::Plan),
}

/// A contestant: its name, and where it listens.
#[derive(Debug, Clone)]
struct Target {
    name: String,
    host: String,
}

impl std::str::FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, url) = text.split_once('=').ok_or("not NAME=URL")?;
        let host = url.strip_prefix("http://").and_then(|rest| rest.strip_suffix("/v1")).ok_or("not http://HOST:PORT/v1")?;
        Ok(Self { name: name.to_owned(), host: host.to_owned() })
    }
}

fn main() {
    let arguments = Arguments::parse();
    // One thread each: on a small machine two of them would take the CPU from whoever is measured.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    // A task, as in a daemon: waking the outermost future costs two system calls more.
    let outcome = runtime.block_on(async {
        let running = tokio::spawn(async move {
            match arguments.role {
                Role::Stub { address } => stub::serve(address).await,
                Role::Load(plan) => load::run(&plan).await,
                Role::Tokens(plan) => tokens::run(&plan).await,
            }
        });
        running.await?
    });
    if let Err(error) = outcome {
        println!("{}", serde_json::json!({ "ev": "error", "error": error.to_string() }));
        std::process::exit(1);
    }
}

//! Writes the manual pages: `cargo run --example man-pages -- packaging/man`.
//!
//! They are checked in, so that packaging needs no build and a change of them is reviewed like any other;
//! `tests/it/man.rs` fails while they are not what this program writes.

mod pages;

use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    let Some(directory) = std::env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("usage: man-pages DIRECTORY");
        return ExitCode::from(2);
    };
    for (name, text) in pages::all() {
        let path = directory.join(name);
        if let Err(error) = std::fs::create_dir_all(&directory).and_then(|()| std::fs::write(&path, text)) {
            eprintln!("man-pages: {}: {error}", path.display());
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

//! Puts llama.cpp's libraries and CPU kernels where the built program looks for them.
//!
//! The program finds its libraries by `$ORIGIN`, never by a path of the machine that built it: in `../lib/opengateway` where
//! it is installed, beside it (the kernels in `ggml/`) in the build tree.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::{env, fs, io};

/// Folder beside the built program for the kernels.
const KERNELS: &str = "ggml";
/// Kernels that must not be chosen. Those for AMX end with SIGILL when GCC 12 compiled them: its `_tile_loadconfig` tells the
/// compiler of the first 8 bytes of the 64 that it reads, so the shapes of the tiles are thrown away. A processor with AMX takes
/// those for AVX-512 instead.
const BROKEN: &[&str] = &["libggml-cpu-sapphirerapids.so"];

fn main() -> io::Result<()> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=OPENGATEWAY_COMMIT");
    // RPATH rather than RUNPATH: it also holds for what the libraries themselves need.
    println!("cargo::rustc-link-arg-bins=-Wl,--disable-new-dtags,-rpath,$ORIGIN/../lib/opengateway:$ORIGIN");
    // Examples lie in a folder below the program.
    println!("cargo::rustc-link-arg-examples=-Wl,--disable-new-dtags,-rpath,$ORIGIN/..");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    // <target>/release/build/opengateway-engine-<hash>/out
    let beside_program = out.ancestors().nth(3).expect("OUT_DIR lies in the target directory");
    let llama = |key: &str| env::var_os(format!("DEP_LLAMA_{key}")).map(PathBuf::from);
    if let Some(root) = llama("ROOT") {
        // Beside the program, its tests and its examples.
        for program in ["", "deps", "examples"] {
            for folder in ["lib", "lib64"] {
                place(&root.join(folder), &beside_program.join(program), is_library)?;
            }
        }
    }
    if let Some(kernels) = llama("BACKENDS_DIR") {
        place(&kernels, &beside_program.join(KERNELS), |name| !BROKEN.contains(&name))?;
    }
    Ok(())
}

/// The libraries as the program asks for them: `libllama.so.0`, not `libllama.so` or `libllama.so.0.6.0`.
fn is_library(name: &str) -> bool {
    // Without the feature "common" nothing of ours asks for llama-common.
    !name.contains("llama-common") && name.split_once(".so.").is_some_and(|(_, version)| !version.contains('.'))
}

fn place(from: &Path, to: &Path, wanted: impl Fn(&str) -> bool) -> io::Result<()> {
    let Ok(entries) = fs::read_dir(from) else { return Ok(()) };
    fs::create_dir_all(to)?;
    for unwanted in BROKEN.iter().map(|name| to.join(name)).filter(|path| path.exists()) {
        fs::remove_file(unwanted)?;
    }
    for entry in entries {
        let path = entry?.path();
        let Some(name) = path.file_name().and_then(OsStr::to_str).filter(|name| wanted(name)) else { continue };
        let target = to.join(name);
        if fs::symlink_metadata(&target).is_ok() {
            fs::remove_file(&target)?;
        }
        // The link would be relative to another folder: the file itself.
        let file = fs::canonicalize(&path)?;
        fs::hard_link(&file, &target).or_else(|_| fs::copy(&file, &target).map(drop))?;
    }
    Ok(())
}

//! No instruction that the processor does not have, shown with qemu's models of old and of newer ones.
//!
//! qemu refuses the calls that make the sandbox, so what runs in it is `engine-bench --reference`: the same libraries, kernels
//! and choice of kernels, without the child around them.

use std::path::Path;
use std::process::Command;

use crate::client::{demo, skipped};

#[test]
fn old_processors_get_kernels_that_they_can_run() {
    let program = Path::new(env!("CARGO_BIN_EXE_opengateway-engine")).with_file_name("examples").join("engine-bench");
    if !program.exists() {
        return skipped("engine-bench is not built; run cargo test without --test");
    }
    if Command::new("qemu-x86_64").arg("--version").output().is_err() {
        return skipped("qemu-x86_64 is missing; install qemu-user");
    }
    // 2003: what every x86-64 has. 2008: SSE4.2. 2011: AVX. 2013: AVX2.
    for processor in ["qemu64", "Nehalem", "SandyBridge", "Haswell"] {
        let output =
            Command::new("qemu-x86_64").args(["-cpu", processor]).arg(&program).arg(demo()).arg("--reference").output().unwrap();
        let (told, failed) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{processor}: {} {failed}", output.status);
        let told: serde_json::Value = serde_json::from_str(&told).unwrap();
        assert_eq!(told["text"], "4", "{processor}");
    }
}

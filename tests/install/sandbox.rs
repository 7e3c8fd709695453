//! Copies of this machine whose changes are thrown away, and what happened in them. `sandbox.sh` makes them.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use tempfile::TempDir;

use crate::common::node::skipped;
use crate::fixture;

/// Makes commands that record how they were called in /run/calls, and do what the rest of the line says.
const STUB: &str =
    "stub() { printf '#!/bin/sh\\necho \"%s $*\" >>/run/calls\\n%s\\n' \"$1\" \"${2:-}\" >/stubs/$1; chmod 755 /stubs/$1; }\n";

/// What a script left.
#[derive(Debug)]
pub struct Ran {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
    /// Lines of a listing of the disk that are there after the script and were not before, and the other way round.
    pub changes: BTreeSet<String>,
}

/// A copy of this machine that was prepared and not used yet.
#[derive(Debug)]
pub struct Sandbox {
    case: TempDir,
}

impl Sandbox {
    /// `setup` prepares the copy. `None`, said aloud, where only root could do it.
    pub fn new(setup: &str) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            skipped("only root can try installations in a copy of this machine");
            return None;
        }
        let case = tempfile::tempdir().unwrap();
        fs::write(case.path().join("setup.sh"), format!("{STUB}{setup}\n")).unwrap();
        Some(Self { case })
    }

    /// A directory of this machine that the copy sees as /case.
    pub fn case(&self) -> &Path {
        self.case.path()
    }

    /// Runs a script of bash as root. `None`, said aloud, where this machine allows no such copy.
    pub fn run(&self, script: &str) -> Option<Ran> {
        fs::write(self.case().join("script.sh"), script).unwrap();
        let mut command = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/install/sandbox.sh"));
        let output = command.arg(self.case()).arg(fixture::directory()).stdin(Stdio::null()).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
        let code = output.status.code().expect("it exits by itself");
        if code == 77 {
            skipped(stdout.trim());
            return None;
        }
        let lines = |name: &str| -> BTreeSet<String> {
            fs::read_to_string(self.case().join(name)).unwrap_or_default().lines().map(str::to_owned).collect()
        };
        let changes = lines("before").symmetric_difference(&lines("after")).cloned().collect();
        Some(Ran { code, stdout, stderr, changes })
    }
}

/// Prepares a copy, runs a script in it.
pub fn run(setup: &str, script: &str) -> Option<Ran> {
    Sandbox::new(setup)?.run(script)
}

impl Ran {
    /// It succeeded.
    #[track_caller]
    pub fn ok(&self) -> &Self {
        assert_eq!(self.code, 0, "{}{}", self.stdout, self.stderr);
        self
    }

    /// It failed, and said this.
    #[track_caller]
    pub fn failed(&self, said: &str) -> &Self {
        assert!(self.code != 0 && self.stderr.contains(said), "{}: {}{}", self.code, self.stdout, self.stderr);
        self
    }

    /// The disk is as it was.
    #[track_caller]
    pub fn changed_nothing(&self) -> &Self {
        assert!(self.changes.is_empty(), "{:#?}\n{}", self.changes, self.stderr);
        self
    }
}

//! Releases that are not what was signed.

use std::fs;
use std::path::Path;

use crate::fixture;
use crate::sandbox::{Ran, Sandbox, run};

/// Nothing here has apt: the tarball is what is installed.
const ARCH: &str = "rm -f /etc/os-release; echo ID=arch >/etc/os-release";

/// A small generator: the places differ, and a run can be repeated.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap() % limit
    }
}

/// A copy of the release, to be spoilt.
fn copy_release(to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(fixture::directory().join("release")).unwrap().flatten() {
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

fn flip(file: &Path, random: &mut Random) {
    let mut bytes = fs::read(file).unwrap();
    let at = random.below(bytes.len());
    bytes[at] ^= 1 << random.below(8);
    fs::write(file, bytes).unwrap();
}

#[test]
fn a_wrong_byte_anywhere_is_refused_and_changes_nothing() {
    let Some(sandbox) = Sandbox::new(ARCH) else { return };
    let tarball = format!("opengateway-0.1.0-linux-{}.tar.gz", std::env::consts::ARCH);
    let mut random = Random(20);
    for number in 0..100 {
        let release = sandbox.case().join(format!("release-{number}"));
        copy_release(&release);
        let file = [tarball.as_str(), "SHA256SUMS", "SHA256SUMS.sig"][number % 3];
        flip(&release.join(file), &mut random);
    }
    // The installer is the good one: that is what it is for.
    let script = "for number in $(seq 0 99); do
        if OPENGATEWAY_RELEASE=/case/release-$number bash /fixture/release/install.sh --no-start </dev/null 2>/run/said; then
            echo \"$number was taken\" >&2; exit 1
        fi
        grep -qE 'signature|SHA-256' /run/said || { cat /run/said >&2; exit 1; }
    done";
    let Some(ran) = sandbox.run(script) else { return };
    ran.ok().changed_nothing();
}

fn install(release: &str, environment: &str) -> Option<Ran> {
    run(ARCH, &format!("OPENGATEWAY_RELEASE={release} {environment} bash /fixture/release/install.sh --no-start"))
}

#[test]
fn a_file_that_is_missing_is_named_and_changes_nothing() {
    for file in ["SHA256SUMS", "SHA256SUMS.sig", "opengateway-0.1.0-linux-*.tar.gz"] {
        let script = format!(
            "cp -r /fixture/release /run/release; rm /run/release/{file}
             OPENGATEWAY_RELEASE=/run/release bash /fixture/release/install.sh"
        );
        let Some(ran) = run(ARCH, &script) else { return };
        ran.failed("could not be fetched").changed_nothing();
    }
}

#[test]
fn a_list_without_an_end_is_not_read_to_it() {
    for (place, said) in [("", "is larger than 1048576 bytes"), ("file://", "could not be fetched")] {
        for file in ["SHA256SUMS", "SHA256SUMS.sig"] {
            let script = format!(
                "cp -r /fixture/release /run/release; truncate -s 2M /run/release/{file}
                 OPENGATEWAY_RELEASE={place}/run/release bash /fixture/release/install.sh --no-start"
            );
            let Some(ran) = run(ARCH, &script) else { return };
            ran.failed(said).changed_nothing();
        }
    }
}

#[test]
fn a_signature_by_another_key_is_refused() {
    let script = "cp -r /fixture/release /run/release; cd /run/release; rm SHA256SUMS.sig
        cp /fixture/other-key /run/other-key; chmod 600 /run/other-key
        ssh-keygen -q -Y sign -n opengateway-release -f /run/other-key SHA256SUMS
        OPENGATEWAY_RELEASE=/run/release bash /fixture/release/install.sh";
    let Some(ran) = run(ARCH, script) else { return };
    ran.failed("the signature of SHA256SUMS is wrong").changed_nothing();
}

#[test]
fn a_signature_for_something_else_is_refused() {
    let script = "cp -r /fixture/release /run/release; cd /run/release; rm SHA256SUMS.sig
        cp /fixture/key /run/key; chmod 600 /run/key
        ssh-keygen -q -Y sign -n file -f /run/key SHA256SUMS
        OPENGATEWAY_RELEASE=/run/release bash /fixture/release/install.sh";
    let Some(ran) = run(ARCH, script) else { return };
    ran.failed("the signature of SHA256SUMS is wrong").changed_nothing();
}

#[test]
fn a_script_without_a_key_downloads_nothing() {
    let keyless = format!(
        "{}\ncd /; bash /run/install.sh",
        "sed \"s/^release_key=.*/release_key=''/\" /fixture/release/install.sh >/run/install.sh"
    );
    let Some(ran) = run(ARCH, &keyless) else { return };
    ran.failed("no release key").changed_nothing();
    let key = "OPENGATEWAY_RELEASE=/fixture/release OPENGATEWAY_RELEASE_KEY=\"$(cat /fixture/key.pub)\"";
    let Some(ran) = run(ARCH, &format!("{}; {key} bash /run/install.sh --no-start", keyless.lines().next().unwrap())) else {
        return;
    };
    ran.ok();
}

#[test]
fn an_older_release_is_not_taken_without_asking() {
    let script = "export OPENGATEWAY_RELEASE=/fixture/newer; bash /fixture/release/install.sh --no-start 2>/dev/null
        export OPENGATEWAY_RELEASE=/fixture/release
        bash /fixture/release/install.sh --no-start && exit 1
        grep -q '^# version 0.2.0' /usr/share/opengateway/install-manifest
        bash /fixture/release/install.sh --no-start --allow-downgrade
        grep -q '^# version 0.1.0' /usr/share/opengateway/install-manifest";
    let Some(ran) = run(ARCH, script) else { return };
    assert!(ran.ok().stderr.contains("this release is the older 0.1.0"), "{}", ran.stderr);
}

#[test]
fn a_url_works_as_a_folder_does() {
    for url in ["file:///fixture/release", "http://127.0.0.1:8000"] {
        let script = format!(
            "cd /fixture/release; python3 -m http.server --bind 127.0.0.1 8000 >/dev/null 2>&1 & cd /
             for _ in $(seq 100); do curl -fso /dev/null http://127.0.0.1:8000/RELEASE && break; sleep 0.1; done
             curl -fsSL {url}/install.sh | OPENGATEWAY_RELEASE={url} bash -s -- --no-start"
        );
        let Some(ran) = run(ARCH, &script) else { return };
        assert!(ran.ok().stderr.contains("signature and SHA-256 are right"), "{}", ran.stderr);
        assert!(ran.changes.iter().any(|line| line.contains("usr/bin/opengatewayd")), "{:#?}", ran.changes);
    }
    let Some(ran) = install("http://127.0.0.1:9/nothing", "") else { return };
    ran.failed("could not be fetched").changed_nothing();
}

//! Distributions, processors, what is beside OpenGateway, and what can go wrong while files are put.

use crate::sandbox::{Ran, run};

const INSTALL: &str = "OPENGATEWAY_RELEASE=/fixture/release bash /fixture/release/install.sh --no-start";

/// Package managers that install what they are given, and record it.
const MANAGERS: &str = r#"
    programs='tar -xzf /fixture/release/opengateway-0.1.0-linux-*.tar.gz -C / --strip-components=1 --wildcards "*/usr/bin/*"'
    stub apt-get "case \"\$*\" in *' install '*) $programs ;; esac"
    stub dnf "$programs"
    stub zypper "$programs"
    stub dpkg-query 'case "$*" in *opengateway*) exit 1 ;; esac'
    stub dpkg-deb 'echo 0.1.0-1'
    stub rpm 'case "$*" in *-qp*) echo 0.1.0-1 ;; *-qa*) ;; *) exit 1 ;; esac'
"#;

fn on(os_release: &str, more: &str, script: &str) -> Option<Ran> {
    let setup = format!("{MANAGERS}\nrm -f /etc/os-release; printf '{os_release}' >/etc/os-release\n{more}");
    run(&setup, &format!("trap 'cat /run/calls 2>/dev/null || true' EXIT\n{script}"))
}

#[test]
fn each_distribution_gets_what_it_installs_with() {
    let deb = "apt-get -y -q --no-install-recommends";
    let dnf = "dnf -y -q --setopt=localpkg_gpgcheck=0 install /tmp/";
    let zypper = "zypper --non-interactive install --allow-unsigned-rpm /tmp/";
    for (os_release, wanted, ending) in [
        ("ID=debian\\n", deb, ".deb"),
        ("ID=ubuntu\\nID_LIKE=debian\\n", deb, ".deb"),
        ("ID=linuxmint\\nID_LIKE=\"ubuntu debian\"\\n", deb, ".deb"),
        ("ID=fedora\\n", dnf, ".rpm"),
        ("ID=\"rocky\"\\nID_LIKE=\"rhel centos fedora\"\\n", dnf, ".rpm"),
        ("ID=\"opensuse-leap\"\\nID_LIKE=\"suse opensuse\"\\n", zypper, ".rpm"),
        ("ID=\"sles\"\\nID_LIKE=\"suse\"\\n", zypper, ".rpm"),
    ] {
        let Some(ran) = on(os_release, "", INSTALL) else { return };
        let calls = &ran.ok().stdout;
        let call = calls.lines().find(|line| line.starts_with(wanted) && line.contains("install"));
        assert!(call.is_some_and(|call| call.ends_with(ending)), "{os_release}: {calls}");
    }
}

#[test]
fn any_other_system_gets_the_tarball() {
    for (os_release, more) in
        [("ID=arch\\n", ""), ("", ""), ("ID=fedora\\n", "rm /stubs/dnf; for f in /usr/bin/dnf /usr/bin/dnf-3; do rm -f $f; done")]
    {
        let Some(ran) = on(os_release, more, &format!("{INSTALL}; test -e /usr/share/opengateway/install-manifest")) else {
            return;
        };
        let calls = &ran.ok().stdout;
        assert!(!calls.contains("install"), "{os_release}: {calls}");
    }
}

#[test]
fn a_machine_that_cannot_run_it_is_told_so_before_anything_happens() {
    for (machine, said) in [("aarch64", "musl"), ("riscv64", "this is riscv64")] {
        // On arm64 the other way round.
        let machine = if machine == std::env::consts::ARCH { "x86_64" } else { machine };
        let Some(ran) =
            on("ID=debian\\n", &format!("stub uname 'case $1 in -m) echo {machine} ;; *) echo Linux ;; esac'"), INSTALL)
        else {
            return;
        };
        ran.failed(said).changed_nothing();
    }
}

#[test]
fn a_package_that_does_not_install_leaves_nothing() {
    let broken = "stub apt-get 'case \"$*\" in *purge*) rm -f /usr/bin/ogctl ;; *) : >/usr/bin/ogctl; echo unmet dependency; exit 100 ;; esac'";
    let Some(ran) = on("ID=debian\\n", broken, INSTALL) else { return };
    ran.failed("apt could not install").changed_nothing();
    assert!(ran.stderr.contains("unmet dependency") && ran.stderr.contains("taking back"), "{}", ran.stderr);
}

#[test]
fn files_that_cannot_be_put_are_all_taken_back() {
    let full = "mkdir -p /usr/share/doc; : >/usr/share/doc/opengateway";
    let Some(ran) = on("ID=arch\\n", full, INSTALL) else { return };
    ran.failed("taking back").changed_nothing();
}

#[test]
fn files_of_somebody_else_are_not_overwritten() {
    let Some(ran) = on("ID=arch\\n", "echo mine >/usr/bin/ogctl", INSTALL) else { return };
    ran.failed("/usr/bin/ogctl is there").changed_nothing();
}

#[test]
fn the_tarball_installs_once_upgrades_and_goes_without_a_trace() {
    let script = "
        export OPENGATEWAY_RELEASE=/fixture/release
        installer=/fixture/release/install.sh
        list() { find /usr /etc -xdev -newer /run/start -type f -exec sha256sum {} + | sort; }
        touch /run/start
        NODE_NAME=NodeA bash $installer --no-start
        list >/run/first; bash $installer --no-start; list >/run/second
        diff /run/first /run/second
        echo '# mine' >>/etc/opengateway/opengatewayd.toml
        OPENGATEWAY_RELEASE=/fixture/newer bash $installer --no-start
        grep -q '^# version 0.2.0' /usr/share/opengateway/install-manifest
        grep -q '^# mine' /etc/opengateway/opengatewayd.toml
        grep -qx 'NODE_NAME=\"NodeA\"' /etc/default/opengatewayd
        test -x /usr/bin/opengatewayd
        bash $installer --uninstall";
    let Some(ran) = on("ID=arch\\n", "rm -f /stubs/*", script) else { return };
    // The files of users and groups were written anew, with the same users and groups in them.
    let left: Vec<_> = ran
        .ok()
        .changes
        .iter()
        .filter(|line| {
            !["etc/passwd", "etc/group", "etc/shadow", "etc/gshadow", "etc/.pwd.lock"].iter().any(|file| line.contains(file))
        })
        .collect();
    assert!(left.is_empty(), "{left:#?}\n{}", ran.stderr);
}

#[test]
fn model_servers_beside_it_are_told_and_nothing_of_python_is_installed() {
    // One that lists models, and one that is something else.
    let server =
        "mkdir -p /run/www/v1 /run/other/v1 && echo '{\"data\": []}' >/run/www/v1/models && echo '{}' >/run/other/v1/models
        python3 -m http.server --bind 127.0.0.1 --directory /run/other 8000 >/dev/null 2>&1 &
        python3 -m http.server --bind 127.0.0.1 --directory /run/www 11434 >/dev/null 2>&1 &
        for _ in $(seq 100); do curl -fso /dev/null http://127.0.0.1:11434/v1/models && break; sleep 0.1; done";
    let more = "stub nvidia-smi; stub pip; stub pip3";
    let Some(ran) = on("ID=debian\\n", more, &format!("{server}\n{INSTALL}")) else { return };
    let said = &ran.ok().stderr;
    assert!(said.contains("Ollama: answers at http://127.0.0.1:11434/v1. A node that serves offers its models too"), "{said}");
    for other in ["EXO", "llama-server", "vLLM", "LM Studio"] {
        assert!(said.contains(&format!("{other}: not seen")), "{other}: {said}");
    }
    assert!(said.contains("nvidia-smi is there"), "{said}");
    assert!(!ran.stdout.contains("pip"), "{}", ran.stdout);
}

#[test]
fn a_missing_ssh_keygen_is_installed_or_asked_for() {
    let more = "rm /usr/bin/ssh-keygen; stub apt-get 'cp /fixture/programs/ogctl /usr/bin/ssh-keygen'";
    let Some(ran) = on("ID=debian\\n", more, INSTALL) else { return };
    // What it got here is no ssh-keygen, so that it goes no further.
    assert!(ran.stdout.contains("install openssh-client"), "{}", ran.stdout);
    ran.failed("signature");
    let Some(ran) = on("ID=arch\\n", "rm /usr/bin/ssh-keygen", INSTALL) else { return };
    ran.failed("ssh-keygen is missing").changed_nothing();
}

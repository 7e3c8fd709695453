# `just` lists the recipes. The scripts are what runs, here and elsewhere; a recipe only names it.

_list:
    @just --list --unsorted

# every ring of tests: what must pass before a change is taken
check:
    scripts/test.sh

# unit tests and the tests in one process or on private buses; or the rings named: just test unit
test *rings="unit it":
    scripts/test.sh {{ rings }}

# the engine: built as a release builds it; or just engine test, just engine clippy --all-targets
engine *arguments:
    scripts/engine.sh {{ arguments }}

# nodes in network namespaces of their own (needs root)
netns:
    scripts/test.sh netns

# the packages, install.sh and booted hosts (needs root): what users install
packages:
    scripts/test.sh packages install e2e

# the service on booted hosts in figures (needs root and target/packages)
bench-host:
    scripts/bench-host.sh --packages target/packages

# format the sources
fmt:
    cargo fmt

# formatting and clippy, warnings are errors
lint:
    scripts/test.sh lint

# licences, versions, advisories (needs cargo-deny)
deny:
    cargo deny --locked check

# the documentation of the crate, private items too
doc:
    RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps --document-private-items

# the manual pages in packaging/man, from docs/man, the command lines and dbus/*.xml
man:
    cargo run --locked --example man-pages -- packaging/man

# three nodes, one cluster, one prompt, on this machine
demo:
    scripts/demo.sh

# measurements; arguments go to the script
bench *args:
    scripts/bench.sh {{ args }}

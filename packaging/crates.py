"""The crates that a release is linked with, as cargo tells."""
import functools
import json
import pathlib
import re
import subprocess

ROOT = pathlib.Path(__file__).resolve().parent.parent


@functools.cache
def metadata(target):
    command = ["cargo", "metadata", "--format-version", "1", "--locked", "--filter-platform", target]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)


def package():
    """Name and version of ours, without asking cargo."""
    head = (ROOT / "Cargo.toml").read_text(encoding="utf-8").split("\n[", 2)[0]
    return dict(re.findall(r'^(\w[\w-]*) = "(.*)"$', head, re.MULTILINE))


def linked(target):
    """(our package, the crates whose code is in the programs, sorted by name and version)

    Those of builds and tests are left out, and procedural macros, which run while compiling. `cargo tree` is asked because
    the features that `cargo metadata` assumes are those of everything at once.
    """
    tree = subprocess.run(
        ["cargo", "tree", "--locked", "--target", target, "--edges", "normal,no-proc-macro", "--prefix", "none",
         "--format", "{p}"],
        cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True,
    ).stdout
    names = {tuple(line.split()[:2]) for line in tree.splitlines() if line}
    known = {(one["name"], "v" + one["version"]): one for one in metadata(target)["packages"]}
    ours = next(name for name in names if name[0] == "opengateway")
    return known[ours], [known[name] for name in sorted(names - {ours})]


def licence(crate):
    """The SPDX expression; old crates write "/" for OR."""
    return (crate["license"] or f"see {crate['license_file']}").replace("/", " OR ").replace("  OR  ", " OR ")


def licence_files(crate):
    """Licence texts and notices, those of code that the crate contains too."""
    folder = pathlib.Path(crate["manifest_path"]).parent
    name = re.compile(r"(LICEN[CS]E|COPYING|COPYRIGHT|NOTICE|UNLICENSE)", re.IGNORECASE)
    return sorted(path for path in folder.iterdir() if path.is_file() and name.match(path.name))

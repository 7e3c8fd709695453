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
    text = (ROOT / "Cargo.toml").read_text(encoding="utf-8")
    section = text.partition("\n[package]\n")[2].partition("\n[")[0]
    return dict(re.findall(r'^(\w[\w-]*) = "(.*)"$', section, re.MULTILINE))


def linked(target, engine):
    """(our packages, the crates of others whose code is in the programs, both sorted by name and version)

    Those of builds and tests are left out, and procedural macros, which run while compiling. `cargo tree` is asked because
    the features that `cargo metadata` assumes are those of everything at once.
    """
    names = set()
    for package in ["opengateway"] + ["opengateway-engine"] * engine:
        tree = subprocess.run(
            ["cargo", "tree", "--locked", "--package", package, "--target", target, "--edges", "normal,no-proc-macro",
             "--prefix", "none", "--format", "{p}"],
            cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True,
        ).stdout
        names |= {tuple(line.split()[:2]) for line in tree.splitlines() if line}
    known = {(one["name"], "v" + one["version"]): one for one in metadata(target)["packages"]}
    found = [known[name] for name in sorted(names)]
    ours = set(metadata(target)["workspace_members"])
    return [one for one in found if one["id"] in ours], [one for one in found if one["id"] not in ours]


@functools.cache
def llama(target):
    """What the engine has besides crates: llama.cpp and ggml, as the crate llama-cpp-sys-2 brings them."""
    crate = next(one for one in metadata(target)["packages"] if one["name"] == "llama-cpp-sys-2")
    folder = pathlib.Path(crate["manifest_path"]).parent
    source = json.loads((folder / ".cargo_vcs_info.json").read_text(encoding="utf-8"))

    def version(file, prefix):
        found = dict(re.findall(rf"set\({prefix}_VERSION_(MAJOR|MINOR|PATCH) (\d+)\)", (folder / file).read_text(encoding="utf-8")))
        return ".".join(found[part] for part in ("MAJOR", "MINOR", "PATCH"))

    return {
        "folder": folder / "llama.cpp",
        "crate": f"pkg:cargo/{crate['name']}@{crate['version']}",
        "llama.cpp": version("llama.cpp/CMakeLists.txt", "LLAMA"),
        "ggml": version("llama.cpp/ggml/CMakeLists.txt", "GGML"),
        "vcs": f"{crate['repository']}/tree/{source['git']['sha1']}/{source['path_in_vcs']}",
    }


def llama_licences(target):
    """(name, text) of what is compiled into the engine's libraries."""
    folder = llama(target)["folder"]
    yield f"llama.cpp {llama(target)['llama.cpp']}, ggml {llama(target)['ggml']} (LICENSE)", (folder / "LICENSE").read_text(encoding="utf-8")
    # Code of others that says so at its head.
    file = folder / "ggml/src/ggml-cpu/llamafile/sgemm.cpp"
    head = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("//"):
            break
        head.append(line.removeprefix("//").strip())
    yield f"ggml: {file.name}, of llamafile", "\n".join(head).strip()


def licence(crate):
    """The SPDX expression; old crates write "/" for OR."""
    return (crate["license"] or f"see {crate['license_file']}").replace("/", " OR ").replace("  OR  ", " OR ")


def licence_files(crate):
    """Licence texts and notices, those of code that the crate contains too."""
    folder = pathlib.Path(crate["manifest_path"]).parent
    name = re.compile(r"(LICEN[CS]E|COPYING|COPYRIGHT|NOTICE|UNLICENSE)", re.IGNORECASE)
    return sorted(path for path in folder.iterdir() if path.is_file() and name.match(path.name))

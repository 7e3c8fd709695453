#!/usr/bin/env python3
"""The bill of materials of a release: CycloneDX 1.5, with every crate that the programs are linked with, and llama.cpp.

    sbom.py TARGET[+engine]...    Rust target triples; what all of them have is listed. "+engine": with opengateway-engine

SOURCE_DATE_EPOCH is the date that it bears.
"""
import datetime
import json
import os
import sys
import tomllib
import uuid

import crates


def component(crate, checksums):
    purl = f"pkg:cargo/{crate['name']}@{crate['version']}"
    found = {
        "type": "library",
        "bom-ref": purl,
        "name": crate["name"],
        "version": crate["version"],
        "scope": "required",
        "licenses": [{"expression": crates.licence(crate)}],
        "purl": purl,
    }
    if checksum := checksums.get((crate["name"], crate["version"])):
        found["hashes"] = [{"alg": "SHA-256", "content": checksum}]
    if crate["description"]:
        found["description"] = " ".join(crate["description"].split())
    if crate["repository"]:
        found["externalReferences"] = [{"type": "vcs", "url": crate["repository"]}]
    return found


def llama(target):
    """The C++ in the engine. Its crate does not say which commit it is of; the crate's own commit does."""
    about = crates.llama(target)
    found = []
    for name in ("llama.cpp", "ggml"):
        purl = f"pkg:github/ggml-org/{name}@{about[name]}"
        found.append({
            "type": "library", "bom-ref": purl, "name": name, "version": about[name], "scope": "required", "purl": purl,
            "licenses": [{"expression": "MIT"}], "externalReferences": [{"type": "vcs", "url": about["vcs"]}],
        })
    return found


def dependencies(targets, refs):
    """What uses what, among the packages of `refs` (id of cargo → bom-ref)."""
    uses = {}
    for target in targets:
        for node in crates.metadata(target)["resolve"]["nodes"]:
            if node["id"] in refs:
                edges = [edge["pkg"] for edge in node["deps"] if any(kind["kind"] is None for kind in edge["dep_kinds"])]
                uses.setdefault(refs[node["id"]], set()).update(refs[edge] for edge in edges if edge in refs)
    return [{"ref": ref, "dependsOn": sorted(used)} for ref, used in sorted(uses.items())]


def main():
    wanted = [argument.partition("+")[::2] for argument in sys.argv[1:]]
    if not wanted or any(engine not in ("", "engine") for _, engine in wanted):
        sys.exit(__doc__)
    lock = tomllib.loads((crates.ROOT / "Cargo.lock").read_text(encoding="utf-8"))
    checksums = {(one["name"], one["version"]): one.get("checksum") for one in lock["package"]}
    linked, ours, with_engine = {}, {}, [target for target, engine in wanted if engine]
    for target, engine in wanted:
        members, found = crates.linked(target, bool(engine))
        ours.update((crate["id"], crate) for crate in members)
        linked.update((crate["id"], crate) for crate in found)
    product = component(next(one for one in ours.values() if one["name"] == "opengateway"), checksums) | {"type": "application"}
    parts = [one for one in ours.values() if one["name"] != "opengateway"]
    components = [component(crate, checksums) for crate in [*parts, *linked.values()]]
    components += llama(with_engine[0]) if with_engine else []
    components.sort(key=lambda one: one["bom-ref"])
    refs = {crate["id"]: f"pkg:cargo/{crate['name']}@{crate['version']}" for crate in [*ours.values(), *linked.values()]}
    when = datetime.datetime.fromtimestamp(int(os.environ["SOURCE_DATE_EPOCH"]), datetime.timezone.utc)
    bom = {
        "$schema": "http://cyclonedx.org/schema/bom-1.5.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"timestamp": f"{when:%Y-%m-%dT%H:%M:%SZ}", "component": product},
        "components": components,
        "dependencies": dependencies([target for target, _ in wanted], refs),
    }
    if with_engine:
        llama_cpp, ggml = (one["bom-ref"] for one in llama(with_engine[0]))
        crate = next(one for one in bom["dependencies"] if one["ref"] == crates.llama(with_engine[0])["crate"])
        crate["dependsOn"] = sorted([*crate["dependsOn"], llama_cpp])
        bom["dependencies"] += [{"ref": llama_cpp, "dependsOn": [ggml]}, {"ref": ggml, "dependsOn": []}]
    # The same contents have the same number.
    bom["serialNumber"] = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(bom, sort_keys=True)).urn
    json.dump(bom, sys.stdout, indent=1, sort_keys=True)
    print()


if __name__ == "__main__":
    main()

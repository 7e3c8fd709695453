#!/usr/bin/env python3
"""The bill of materials of a release: CycloneDX 1.5, with every crate that the programs are linked with.

    sbom.py TARGET...    Rust target triples; the crates of all of them are listed

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
    targets = sys.argv[1:]
    if not targets:
        sys.exit(__doc__)
    lock = tomllib.loads((crates.ROOT / "Cargo.lock").read_text(encoding="utf-8"))
    checksums = {(one["name"], one["version"]): one.get("checksum") for one in lock["package"]}
    linked = {}
    for target in targets:
        ours, found = crates.linked(target)
        linked.update((crate["id"], crate) for crate in found)
    product = component(ours, checksums) | {"type": "application"}
    components = sorted((component(crate, checksums) for crate in linked.values()), key=lambda one: one["bom-ref"])
    refs = {crate["id"]: f"pkg:cargo/{crate['name']}@{crate['version']}" for crate in [ours, *linked.values()]}
    when = datetime.datetime.fromtimestamp(int(os.environ["SOURCE_DATE_EPOCH"]), datetime.timezone.utc)
    bom = {
        "$schema": "http://cyclonedx.org/schema/bom-1.5.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"timestamp": f"{when:%Y-%m-%dT%H:%M:%SZ}", "component": product},
        "components": components,
        "dependencies": dependencies(targets, refs),
    }
    # The same contents have the same number.
    bom["serialNumber"] = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(bom, sort_keys=True)).urn
    json.dump(bom, sys.stdout, indent=1, sort_keys=True)
    print()


if __name__ == "__main__":
    main()

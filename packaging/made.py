#!/usr/bin/env python3
"""Makes the documents of the packages from what the repository already says.

    made.py copyright TARGET [engine]    DEP-5, with the crates that the programs are linked with
    made.py licenses TARGET [engine]     the licence texts of those crates
    made.py changelog deb|rpm REVISION   CHANGELOG.md as Debian and RPM want it

TARGET is a Rust target triple; with "engine" opengateway-engine is one of the programs. SOURCE_DATE_EPOCH is the date of a version that CHANGELOG.md does not date.
"""
import datetime
import email.utils
import hashlib
import os
import pathlib
import re
import sys
import textwrap

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import crates  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent
MAINTAINER = "OpenGateway maintainers <opengateway@users.noreply.github.com>"

COPYRIGHT = """\
Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: OpenGateway
Upstream-Contact: {maintainer}
Source: {repository}
Comment:
 The programs are statically linked with the Rust crates below, each under the
 licence beside it. Their licence texts and notices are in
 /usr/share/doc/opengateway/third-party-licenses.gz.
 .
{crates}
{engine}
Files: *
Copyright: {year} The OpenGateway authors
License: Apache-2.0
{engine_licence}
License: Apache-2.0
 On Debian systems, the complete text of the Apache License, Version 2.0, can be
 found in /usr/share/common-licenses/Apache-2.0.
"""


def source_date():
    """The time that everything made here bears."""
    return datetime.datetime.fromtimestamp(int(os.environ["SOURCE_DATE_EPOCH"]), datetime.timezone.utc)


ENGINE = """ .
 The engine's libraries are llama.cpp {llama} and ggml {ggml}, under the MIT licence.
"""
ENGINE_LICENCE = """
Files: usr/lib/opengateway/*
Copyright: 2023-2026 The ggml authors
           2024 Mozilla Foundation
License: Expat

License: Expat
{text}
"""


def copyright_file(target, engine):
    _, linked = crates.linked(target, engine)
    lines = "\n".join(f"  {crate['name']} {crate['version']}: {crates.licence(crate)}" for crate in linked)
    about = licence = ""
    if engine:
        about = ENGINE.format(llama=crates.llama(target)["llama.cpp"], ggml=crates.llama(target)["ggml"])
        text = next(crates.llama_licences(target))[1].split("\n\n", 2)[2].strip()
        licence = ENGINE_LICENCE.format(text="\n".join(f" {line}" if line.strip() else " ." for line in text.splitlines()))
    return COPYRIGHT.format(
        maintainer=MAINTAINER, repository=crates.package()["repository"], year=source_date().year, crates=lines, engine=about,
        engine_licence=licence,
    )


def licenses(target, engine):
    """Each text once, under the names of the crates that have it; then the crates that bring none."""
    texts, without = {}, []
    for name, text in crates.llama_licences(target) if engine else ():
        texts[name] = (text, [name])
    for crate in crates.linked(target, engine)[1]:
        name = f"{crate['name']} {crate['version']}"
        files = crates.licence_files(crate)
        for path in files:
            text = path.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n").strip()
            digest = hashlib.sha256(" ".join(text.split()).encode()).hexdigest()
            texts.setdefault(digest, (text, []))[1].append(f"{name} ({path.name})")
        if not files:
            people = ", ".join(crate["authors"]) or "its authors"
            without.append(f"{name}: {crates.licence(crate)}; by {people}; {crate['repository'] or ''}".rstrip("; "))
    rule = "=" * 80
    entries = sorted(texts.values(), key=lambda entry: entry[1])
    entries.append(("These crates bring no text of their own. The texts of the licences they name are above.", without))
    return "".join(f"{rule}\n" + "\n".join(sorted(names)) + f"\n{rule}\n\n{text}\n\n" for text, names in entries)


def versions():
    """(version, date or None, [(heading, [point])]) of CHANGELOG.md, the newest first."""
    found = []
    for line in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", line):
            found.append((heading[1], heading[2], [("", [])]))
        elif not found:
            continue
        elif line.startswith("### "):
            found[-1][2].append((line[4:], []))
        elif line.startswith("- "):
            found[-1][2][-1][1].append(line[2:])
        elif line.startswith("  ") and found[-1][2][-1][1]:
            found[-1][2][-1][1][-1] += " " + line.strip()
        elif line.strip() and not line.startswith("["):
            found[-1][2][-1][1].append(line.strip())
    return found


def changelog(form, revision):
    current = crates.package()["version"]
    out = []
    for version, date, sections in versions():
        when = datetime.datetime.fromisoformat(f"{date}T12:00:00+00:00") if date else source_date()
        full = f"{current if version == 'Unreleased' else version}-{revision if not out else 1}"
        points = [(heading, point) for heading, points in sections for point in points]
        if form == "rpm":
            out.append(f"* {when:%a %b %d %Y} {MAINTAINER} - {full}")
            out += [wrapped(f"{heading}: {point}" if heading else point, "- ") for heading, point in points]
            out.append("")
            continue
        out += [f"opengateway ({full}) unstable; urgency=medium", ""]
        before = ""
        for heading, point in points:
            if heading != before:
                out += ([] if out[-1] == "" else [""]) + [f"  [ {heading} ]"]
                before = heading
            out.append(wrapped(point, "  * "))
        out += ["", f" -- {MAINTAINER}  {email.utils.format_datetime(when)}", ""]
    return "\n".join(out)


def wrapped(text, bullet):
    # A macro of rpm's would be expanded in a changelog too.
    return textwrap.fill(
        text.replace("%", "%%") if bullet == "- " else text, 78, initial_indent=bullet,
        subsequent_indent=" " * len(bullet), break_long_words=False, break_on_hyphens=False,
    )


def main():
    match sys.argv[1:]:
        case ["copyright", target, *engine] if engine in ([], ["engine"]):
            text = copyright_file(target, bool(engine))
        case ["licenses", target, *engine] if engine in ([], ["engine"]):
            text = licenses(target, bool(engine))
        case ["changelog", ("deb" | "rpm") as form, revision]:
            text = changelog(form, revision)
        case _:
            sys.exit(__doc__)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()

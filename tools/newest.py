# SPDX-License-Identifier: Apache-2.0
"""Try the newest series on vLLM's newest release: which groups apply.

    python -m tools.newest [VERSION]

Reads the files that the patches touch from the package index, in parts. Writes
build/new-release.md where UPSTREAM.toml does not list the release, else nothing.
"""

import sys
import tempfile
from pathlib import Path

import requests
from packaging.utils import parse_wheel_filename
from pypi_simple import NoSuchProjectError, PyPISimple

from tools.download import TIMEOUT_S, configured_index
from tools.errors import DoesNotApply, ForkError
from tools.groups import with_fix
from tools.peek import sources
from tools.series import Patch, apply_patch, choose, groups_of, read_series
from tools.series import touched_files as touched
from tools.upstream import ROOT, releases, series_folders

REPORT = ROOT / "build/new-release.md"


def newest_release() -> str:
    """The newest release of vllm on the package index, no candidate. Raises
    ForkError."""
    try:
        with PyPISimple(configured_index()) as index:
            packages = index.get_project_page("vllm", timeout=TIMEOUT_S).packages
    except (NoSuchProjectError, requests.RequestException) as error:
        raise ForkError(
            f"vllm: cannot ask the package index for its releases: {error}\n"
            "Check the network, or name a release: python -m tools.newest VERSION"
        ) from None
    versions = {
        parse_wheel_filename(package.filename)[1]
        for package in packages
        if package.package_type == "wheel" and not package.is_yanked
    }
    finals = [each for each in versions if not each.is_prerelease and not each.local]
    if not finals:
        raise ForkError(
            "vllm: the package index has no release of it. Name one: "
            "python -m tools.newest VERSION"
        )
    return str(max(finals))


def failures(patches: list[Patch], files: dict[str, bytes]) -> dict[str, str]:
    """Patch number -> what git says, of those that do not apply one after the other. A
    patch that does not apply is left out, and the next is tried."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name, data in files.items():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            if data:
                (tree / name).write_bytes(data)
        for patch in patches:
            try:
                apply_patch(patch.path, tree)
            except DoesNotApply as error:
                lines = str(error).splitlines()
                where = [line for line in lines if "patch failed" in line]
                found[patch.number] = (where or lines)[0]
    return found


def report(version: str, series: Path) -> str:
    """Markdown: each group of the series, and which of its patches do not apply."""
    patches = read_series(series)
    files = sources(version, touched(patches))
    rows: list[str] = []
    reasons: dict[str, str] = {}
    for group in groups_of(patches):
        chosen = choose(patches, with_fix(patches, [group]))
        failed = failures(chosen, files)
        reasons |= failed
        numbers = ", ".join(failed)
        whole = f"yes, all {len(chosen)}"
        said = f"no: {numbers} of {len(chosen)}" if failed else whole
        rows.append(f"| `{group}` | {said} |")
    lines = [
        f"vLLM {version} is out, and UPSTREAM.toml does not list it. These groups of "
        f"`patches/{series.name}` apply to it, each with the patches that it needs:",
        "",
        "| group | applies |",
        "|---|---|",
        *rows,
        "",
        *(f"- {number}: `{reason}`" for number, reason in sorted(reasons.items())),
        "",
        "That a patch applies does not mean that it is right: "
        "docs/maintain/new-release.md has the next steps.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    REPORT.unlink(missing_ok=True)
    try:
        version = sys.argv[1] if sys.argv[1:] else newest_release()
        if version in releases():
            print(f"vLLM {version} is in UPSTREAM.toml: nothing to do.")
            return
        text = report(version, series_folders()[-1])
    except ForkError as error:
        sys.exit(f"error: {error}")
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(text)
    print(text)


if __name__ == "__main__":
    main()

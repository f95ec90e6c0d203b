# SPDX-License-Identifier: Apache-2.0
"""Show that the tests see each patch of `fix` and `correct`: build the fork without it
and what depends on it, and expect exactly the tests marked
`needs_patch("<its number>")` to fail."""

import argparse
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from rich.console import Console

from tools.build import build_wheel
from tools.errors import DoesNotApply, ForkError
from tools.series import Patch, dependants, read_series
from tools.upstream import ROOT, release

MUTANTS = ROOT / "build/mutants"
# What these groups do for an answer, named tests show.
GROUPS = ("fix", "correct")
# What tests say that a CPU without AVX-512 cannot run; others show the patch there.
NO_INT8_OPS = "needs vLLM's INT8 kernels"


def install_without(*numbers: str) -> Path:
    """Build the fork without these patches and those that depend on them, into a folder
    to put on PYTHONPATH."""
    return install(build_wheel(MUTANTS / "dist", numbers), "without", *numbers)


def install_only(*numbers: str) -> Path:
    """Build the fork with these patches alone and those they depend on, likewise."""
    wheel = build_wheel(MUTANTS / "dist", only=numbers)
    return install(wheel, "only", *numbers)


def install(wheel: Path, *names: str) -> Path:
    """Install a wheel alone, into a folder to put on PYTHONPATH."""
    folder = MUTANTS / "-".join(names)
    shutil.rmtree(folder, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--no-compile", "--target", folder, wheel], check=True)
    return folder


def install_mutant(series: Sequence[Patch], number: str) -> tuple[Path, list[str]]:
    """Build the fork without a patch, those that depend on it, and those whose text
    needs its own. Returns the folder, and what went with the patch."""
    left_out = [number]
    while True:
        gone = dependants(series, left_out)
        try:
            package = install_without(*left_out, *sorted(gone))
        except DoesNotApply as error:
            if error.name[:4] in left_out:
                raise
            left_out.append(error.name[:4])
            continue
        return package, sorted({*gone, *left_out} - {number})


def marked_files() -> list[str]:
    """Files with marked tests: others may import what a build without a patch lacks."""
    files = (ROOT / "tests").rglob("test_*.py")
    return sorted(str(f) for f in files if "mark.needs_patch(" in f.read_text())


def run_tests(package: Path) -> tuple[set[str], dict[str, set[str]]]:
    """Run the marked tests against the package at `package`.

    Returns the tests that failed, and the tests that name each patch.
    """
    report = package.with_suffix(".xml")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "needs_patch"]
    command += ["-n", "auto", "--maxprocesses=4", "--tb=short", f"--junitxml={report}"]
    report.unlink(missing_ok=True)
    env = os.environ | {"PYTHONPATH": str(package)}
    command += marked_files()
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if not report.exists():
        raise ForkError(f"pytest did not run:\n{run.stdout}{run.stderr}")
    failed: set[str] = set()
    marked: dict[str, set[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        skipped = case.find("skipped")
        if skipped is not None and NO_INT8_OPS in skipped.get("message", ""):
            continue
        for wrong in ("error", "skipped"):
            if (found := case.find(wrong)) is not None:
                raise ForkError(
                    f"{name} neither passed nor failed: {found.get('message')}: "
                    f"{(found.text or '')[-2000:]}"
                )
        if case.find("failure") is not None:
            failed.add(name)
        for prop in case.iter("property"):
            if prop.get("name") == "needs_patch":
                marked.setdefault(prop.get("value", ""), set()).add(name)
    return failed, marked


def judge(
    number: str, gone: Collection[str], failed: set[str], marked: dict[str, set[str]]
) -> str:
    """What a build without the patch shows; `gone` went with it, as they need it.

    Raises ForkError where not exactly the patch's tests failed. Of those that are
    marked for what is gone either is right.
    """
    expected = marked.get(number, set())
    either = set().union(*(marked.get(other, set()) for other in gone)) - expected
    found = failed - either
    if not expected or found != expected:
        raise ForkError(
            f"without {number}: expected to fail, and passed: "
            f"{sorted(expected - found) or 'none'}; failed all the same: "
            f"{sorted(found - expected) or 'none'}"
            + ("" if expected else "; no test is marked for it")
        )
    others = len(set().union(*marked.values()) - expected - either)
    went = f" and {', '.join(sorted(gone))}, which need it" if gone else ""
    return (
        f"without {number}{went}: its {len(expected)} tests fail, the {others} of the "
        "other patches pass"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=GROUPS)
    parser.add_argument("--patches", nargs="+", default=[], metavar="0008")
    args = parser.parse_args()
    console = Console()
    plain: dict[str, Any] = dict(highlight=False, markup=False, soft_wrap=True)
    try:
        series = read_series(release(os.environ.get("VLLM_BASE_VERSION")).series)
        for patch in series:
            if patch.group not in args.groups:
                continue
            if args.patches and patch.number not in args.patches:
                continue
            package, gone = install_mutant(series, patch.number)
            failed, marked = run_tests(package)
            counts = Counter(name.partition("[")[0] for name in failed)
            for name, count in sorted(counts.items()):
                console.print(f"  {name}: {count} failed", **plain)
            said = judge(patch.number, gone, failed, marked)
            console.print(said, **plain)
            shutil.rmtree(package)
    except ForkError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

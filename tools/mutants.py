# SPDX-License-Identifier: Apache-2.0
"""Show that the tests see each edit: build the fork without it, and expect exactly the
tests marked `needs_patch("<its number>")` to fail."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from rich.console import Console

from tools.build import build_wheel
from tools.errors import ForkError
from tools.fix import PROBES
from tools.upstream import ROOT

MUTANTS = ROOT / "build/mutants"


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


def run_tests(package: Path) -> tuple[set[str], dict[str, set[str]]]:
    """Run the marked tests against the package at `package`.

    Returns the tests that failed, and the tests that name each patch.
    """
    report = package.with_suffix(".xml")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "needs_patch"]
    command += ["-n", "auto", "--maxprocesses=4", "--tb=no", f"--junitxml={report}"]
    report.unlink(missing_ok=True)
    env = os.environ | {"PYTHONPATH": str(package)}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if not report.exists():
        raise ForkError(f"pytest did not run:\n{run.stdout}{run.stderr}")
    failed: set[str] = set()
    marked: dict[str, set[str]] = {number: set() for number in PROBES}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        if case.find("error") is not None or case.find("skipped") is not None:
            raise ForkError(f"{name} neither passed nor failed; see {report}")
        if case.find("failure") is not None:
            failed.add(name)
        for prop in case.iter("property"):
            if prop.get("name") == "needs_patch":
                marked[prop.get("value", "")].add(name)
    return failed, marked


def main() -> None:
    console = Console()
    try:
        for number in PROBES:
            failed, marked = run_tests(install_without(number))
            expected = marked[number]
            for name in sorted(failed):
                console.print(f"  {name} failed", highlight=False, soft_wrap=True)
            if not expected or failed != expected:
                raise ForkError(
                    f"without {number}: expected to fail, and passed: "
                    f"{sorted(expected - failed) or 'none'}; failed all the same: "
                    f"{sorted(failed - expected) or 'none'}."
                )
            others = len(set().union(*marked.values()) - expected)
            console.print(
                f"without {number}: its {len(failed)} tests fail, the {others} of the "
                "other patches pass"
            )
    except ForkError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

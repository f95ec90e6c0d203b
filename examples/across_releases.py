# SPDX-License-Identifier: Apache-2.0
"""Ask forks of several vLLM releases the same exports: all answer right, and alike.

    python -m examples.across_releases RESULTS.json [PYTHON ...]

Each PYTHON belongs to an environment with one fork in it, as `make
VLLM_BASE_VERSION=0.32.0 install` makes .venv-0.32.0/bin/python; without any, the
installed fork is asked. Forks of the group `fix` alone have stand-ins on a CPU:
examples/ask_fix_alone.py. RESULTS gets `{"device", "date", "questions", "rows":
[{"version", "layout", "exact_match", "same_as_first"}]}`; exits with 1 where an answer
is wrong, or another one than the first fork's.
"""

import argparse
import datetime
import json
import subprocess
import sys
from pathlib import Path

from packaging.version import Version

from examples import fix_alone
from examples.compare_builds import (
    EXPORTS,
    QUESTIONS,
    Answers,
    ask,
    device_name,
    make_prompts,
)
from tests.fixtures import addition
from tools.groups import FIX
from tools.series import groups_of, read_series
from tools.upstream import release

ASK_VERSION = "import importlib.metadata as m; print(m.version('vllm'))"


def version_of(python: str) -> Version:
    """Of the fork in an environment."""
    command = [python, "-c", ASK_VERSION]
    said = subprocess.run(command, capture_output=True, text=True)
    if said.returncode or "+" not in said.stdout:
        found = said.stdout.strip() or said.stderr.strip().splitlines()[-1:]
        sys.exit(f"error: {python}: expected an environment with a fork, found {found}")
    return Version(said.stdout.strip())


def answers_of(python: str, version: Version) -> dict[str, Answers]:
    """By layout."""
    groups = groups_of(read_series(release(version.public).series))
    script = fix_alone.SCRIPT if groups == [FIX] else None
    found = {}
    prompts = make_prompts()
    for layout, answers in ask(
        str(version), EXPORTS, prompts, None, script, python=python
    ):
        if error := answers.get("error"):
            sys.exit(f"error: {version}, {layout}: {error}")
        found[layout] = answers
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("results", type=Path, metavar="RESULTS.json")
    parser.add_argument("pythons", nargs="*", metavar="PYTHON")
    args = parser.parse_args()
    rows = []
    first: dict[str, Answers] = {}
    for python in args.pythons or [sys.executable]:
        version = version_of(python)
        found = answers_of(python, version)
        first = first or found
        for layout, answers in found.items():
            row = {
                "version": str(version),
                "layout": layout,
                "exact_match": addition.exact_match(QUESTIONS, answers["texts"]),
                "same_as_first": answers["texts"] == first[layout]["texts"],
            }
            rows.append(row)
            print(row, flush=True)
    told = {
        "device": device_name(),
        "date": datetime.date.today().isoformat(),
        "questions": len(QUESTIONS),
        "rows": rows,
    }
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(told, indent=1) + "\n")
    wrong = [r for r in rows if r["exact_match"] != 1 or not r["same_as_first"]]
    if wrong:
        sys.exit(f"error: {wrong}")


if __name__ == "__main__":
    main()

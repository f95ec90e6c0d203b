# SPDX-License-Identifier: Apache-2.0
"""Build the fork with `fix` and each other group, for a CPU and the default release:
each build imports all that it brings, loads an export and answers with a token.

Without the group `cpu` a CPU applies no INT8 experts, so that those builds are asked a
dense export. Names of groups as arguments: these alone.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

from tools.build import build_wheel
from tools.errors import ForkError
from tools.groups import CPU, FIX, VARIABLE
from tools.mutants import MUTANTS, install
from tools.series import groups_of, read_series
from tools.upstream import ROOT, release

EXPERTS = ROOT / "tests/fixtures/step3p5-tiny/int8-3key"
DENSE = ROOT / "build/dense-int8"


def make_dense() -> Path:
    """A small Llama with random INT8 layers, as amd-quark exports it."""
    from tests.fixtures.families import BY_NAME, make_export

    return make_export(BY_NAME["llama"], "by-name").write(DENSE)


def check_group(group: str) -> tuple[Path, dict[str, object]]:
    """The export that a build of `fix` and a group loaded, and what it said. Raises
    ForkError."""
    os.environ["VLLM_TARGET_DEVICE"] = CPU
    os.environ[VARIABLE] = group
    folder = install(build_wheel(MUTANTS / "dist"), *dict.fromkeys([FIX, group]))
    export = EXPERTS if group == CPU else make_dense()
    env = os.environ | {
        "PYTHONPATH": str(folder),
        "CUDA_VISIBLE_DEVICES": "",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "tools.try_build", str(folder), str(export)]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if run.returncode:
        raise ForkError(
            f"the build of {FIX} and {group} does not load {export}:\n{run.stderr}"
        )
    [said] = [line for line in run.stdout.splitlines() if line.startswith("{")]
    return export, json.loads(said)


def main() -> None:
    console = Console()
    try:
        every = groups_of(read_series(release().series))
        for group in sys.argv[1:] or every:
            if group not in every:
                raise ForkError(f"{group}: no such group; expected {', '.join(every)}.")
            started = time.monotonic()
            export, said = check_group(group)
            console.print(
                f"{FIX} and {group}: imports {said['imported']} modules, loads "
                f"{export.name}, answers {said['tokens']}: "
                f"{time.monotonic() - started:.0f} s",
                soft_wrap=True,
            )
    except ForkError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

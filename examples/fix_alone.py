# SPDX-License-Identifier: Apache-2.0
"""Ask a build of the group `fix` alone the exports of tests/fixtures/cells.py.

    python -m examples.fix_alone [--fork FOLDER] [--stock FOLDER] [CELL ...]

For the releases of patches/v0.19, which have no other group. FOLDER holds a build, to
be put on PYTHONPATH: the fork is the installed vLLM without one, and stock is not asked
without one. Run it with the Python of an environment that has the release's torch
(2.10.0 for 0.18.0 to 0.19.1) and what the tests need, on a CPU or a GPU:

    VLLM_BASE_VERSION=0.19.1 VLLM_TARGET_DEVICE=cuda make wheel
    pip install --no-deps --target build/fork dist/vllm-0.19.1+quark2-*.whl
    python -m examples.fix_alone --fork build/fork

On a CPU examples/ask_fix_alone.py applies the experts. Prints a line an export, writes
build/fix-alone.json, and exits with 1 where the fork does not what `fix` is there for.
"""

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any

from examples.compare_builds import QUESTIONS, ROOT, ask, device_name, make_prompts
from examples.matrix import judge, parse_cells, references
from tests.fixtures.cells import BASE

WORK, JSON = ROOT / "build/fix-alone", ROOT / "build/fix-alone.json"
SCRIPT = ROOT / "examples/ask_fix_alone.py"

# What the group `fix` is there for; of other exports the group `correct` sees to some.
TO_BE_RIGHT = (
    BASE,
    "int8-3key",
    "weight-per-tensor",
    "3key-weight-per-tensor",
    "weight-per-tensor-act-static",
    "act-asymmetric",
    "shared-quantized",
    "dense-quantized",
    "attention-excluded",
    "scales-bfloat16",
    "scales-float16",
    "sharded",
    f"qwen2-moe-tiny-{BASE}",
)
# These kernels cannot read them, or the checkpoint lacks what they are to read.
TO_BE_REFUSED = (
    "act-static",
    "act-per-tensor",
    "act-static-without-scales",
    "act-static-asymmetric",
    "weight-asymmetric",
    "scale-missing",
)


def line(name: str, found: dict[str, Any]) -> str:
    if "error" in found:
        return f"{name}: {found['outcome']}: {found['error'][:300]}"
    share = found.get("exact_match")
    right = "" if share is None else f"{share * len(QUESTIONS):.0f} of {len(QUESTIONS)}"
    difference = found["mean_abs_dlogprob"]
    told = "not finite" if difference is None else f"{difference:.3f}"
    overlap = f"top 20 {found['overlap20']:.3f}"
    figures = ", ".join(filter(None, (right, overlap, f"|d logprob| {told}")))
    return f"{name}: {found['outcome']}: {figures}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--fork", type=Path, metavar="FOLDER")
    args = parse_cells(parser)
    prompts = make_prompts()
    by_model = references(prompts)
    folders = {name: cell.write(WORK / name) for name, cell in args.chosen.items()}
    builds = {"stock": args.stock} if args.stock else {}
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for build, package in {**builds, "fork": args.fork}.items():
        found[build] = {}
        for name, answers in ask(f"fix-{build}", folders, prompts, package, SCRIPT):
            found[build][name] = judge(answers, by_model[args.chosen[name].model])
            print(build, line(name, found[build][name]), flush=True)
    head = {"device": device_name(), "date": datetime.date.today().isoformat()}
    JSON.write_text(json.dumps({**head, "outcomes": found}, indent=1) + "\n")
    expected = dict.fromkeys(TO_BE_RIGHT, "right")
    expected |= dict.fromkeys(TO_BE_REFUSED, "refused")
    wrong = [
        f"{name} is {each['outcome']}, not {expected[name]}"
        for name, each in found["fork"].items()
        if each["outcome"] != expected.get(name, each["outcome"])
    ]
    if wrong:
        sys.exit(f"error: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()

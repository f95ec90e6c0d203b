# SPDX-License-Identifier: Apache-2.0
"""Peak memory and time of loading a 2 GB Quark INT8 export on a CPU.

    python -m benchmarks.benchmark_load_int8 [RESULTS.json]

Writes random Step-3.5 exports in both layouts to build/load, shard by shard, and loads
each with the engine's own loader, a process a load: with the fork, and with a build
that lacks the checks of checkpoints, in turns. The files are in the page cache.

RESULTS gets `{"device", "date", "rows": [{"layout", "build", "checkpoint_mib",
"shard_mib", "baseline_mib", "peak_mib", "seconds", "cpu_seconds", "runs"}],
"us_a_tensor": {build: number}}`: medians; shard_mib is of the largest shard;
baseline_mib is VmHWM when all is imported and the process groups are there; peak_mib is
VmHWM when the model is loaded. us_a_tensor is what loading takes for each tensor of an
expert where there is next to nothing to copy, which shows once a GPU copies fast. Exits
1 where the peak is above baseline + checkpoint + one shard, or the checks cost 3 % or
more.
"""

import dataclasses
import datetime
import importlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.serving.checkpoint import Widths, write_checkpoint
from benchmarks.serving.report import save

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build/load"
RUNS = 9
SHARD_BYTES = 400 << 20
CHECKS = "vllm/model_executor/layers/quantization/quark/load_checks/loading.py"
MAX_COST = 0.03
# Sizes of a Step-3.5-Flash layer, but for the number of experts; positions take next
# to no memory.
WIDTHS = Widths(
    5, vocab=4096, dense_width=1280, experts=28, sliding_heads=64, context=1024
)
# As many experts as Step-3.5-Flash has, of next to no size.
SMALL = Widths(
    layers=5,
    hidden=64,
    vocab=512,
    dense_width=64,
    expert_width=32,
    heads=4,
    sliding_heads=8,
    kv_heads=2,
    head_dim=16,
)
LAYOUTS = {"per_expert": False, "3key": True}
Figures = dict[str, float]


def write_exports() -> None:
    """Both layouts below WORK, unless they are there."""
    for layout, stacked in LAYOUTS.items():
        write_checkpoint(
            WORK / layout, dataclasses.replace(WIDTHS, stacked=stacked), SHARD_BYTES
        )


def peak_mib() -> float:
    """Of this process alone: getrusage would count what started it."""
    status = Path("/proc/self/status").read_text()
    [kib] = re.findall(r"^VmHWM:\s+(\d+) kB", status, re.M)
    return int(kib) / 1024


@contextmanager
def loader(folder: Path) -> Iterator[tuple[Any, Any]]:
    """The engine's loader of the export, and its settings."""
    from vllm.config import (
        LoadConfig,
        ModelConfig,
        VllmConfig,
        set_current_vllm_config,
    )
    from vllm.model_executor.model_loader import get_model_loader

    vllm_config = VllmConfig(
        model_config=ModelConfig(
            model=str(folder), skip_tokenizer_init=True, dtype="bfloat16"
        ),
        load_config=LoadConfig(use_tqdm_on_load=False),
    )
    with set_current_vllm_config(vllm_config):
        yield get_model_loader(vllm_config.load_config), vllm_config


def load_small(folder: Path) -> Figures:
    """Load the small export in this process, again and again."""
    from vllm.model_executor.model_loader.utils import initialize_model

    times = []
    with loader(folder) as (one, vllm_config):
        model = initialize_model(vllm_config)
        for _ in range(RUNS):
            started = time.perf_counter()
            one.load_weights(model, vllm_config.model_config)
            times.append(time.perf_counter() - started)
    # Weight and scale of three projections.
    tensors = (SMALL.layers - 1) * SMALL.experts * 3 * 2
    return {"us_a_tensor": statistics.median(times) / tensors * 1e6}


def load(folder: Path) -> Figures:
    """Load the export in this process, as the engine's worker does."""
    baseline = peak_mib()
    started, cpu_started = time.perf_counter(), time.process_time()
    with loader(folder) as (one, vllm_config):
        model = one.load_model(vllm_config, vllm_config.model_config)
    seconds = time.perf_counter() - started
    cpu_seconds = time.process_time() - cpu_started
    del model
    return {
        "baseline_mib": baseline,
        "peak_mib": peak_mib(),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
    }


def load_here(folder: Path) -> Figures:
    """Load once all is imported and the process groups are there."""
    from tests.process_groups import start_process_groups

    # What the engine's worker has imported before it loads.
    importlib.import_module("vllm.v1.worker.cpu_worker")
    importlib.import_module("vllm.model_executor.models.step3p5")
    importlib.import_module("torch._dynamo")
    with tempfile.TemporaryDirectory() as scratch:
        start_process_groups(Path(scratch) / "store")
        return load_small(folder) if folder.name == "small" else load(folder)


def load_with(folder: Path, package: Path | None) -> Figures:
    """Load in a process of its own, with the build in `package`."""
    env = dict(os.environ, CUDA_VISIBLE_DEVICES="", VLLM_LOGGING_LEVEL="ERROR")
    if package:
        env["PYTHONPATH"] = str(package)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.benchmark_load_int8", "--load", folder],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"error: loading {folder} failed:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def patch_of_checks() -> str:
    """Number of the patch that brings the checks."""
    [patch] = [
        path
        for path in (ROOT / "patches/v0.20").rglob("*.patch")
        if f"Overlay: {CHECKS}\n" in path.read_text()
    ]
    return patch.name.partition("-")[0]


def medians(folder: Path, builds: dict[str, Path | None]) -> dict[str, Figures]:
    """Of each build, of loads in turns, after one that fills the page cache."""
    load_with(folder, None)
    runs: dict[str, list[Figures]] = {build: [] for build in builds}
    for number in range(RUNS):
        # Who comes second meets what the first one left.
        for build in list(builds)[:: -1 if number % 2 else 1]:
            runs[build].append(load_with(folder, builds[build]))
    return {
        build: {
            name: round(statistics.median(run[name] for run in found), 2)
            for name in found[0]
        }
        for build, found in runs.items()
    }


def rows_of(folder: Path, builds: dict[str, Path | None]) -> list[dict[str, Any]]:
    """A row a build."""
    sizes = [file.stat().st_size / 2**20 for file in folder.glob("*.safetensors")]
    head = {
        "layout": folder.name,
        "checkpoint_mib": math.ceil(sum(sizes)),
        "shard_mib": math.ceil(max(sizes)),
    }
    found = medians(folder, builds)
    return [head | {"build": b} | found[b] | {"runs": RUNS} for b in builds]


def judge(rows: list[dict[str, Any]]) -> list[str]:
    """What is above its bar."""
    problems = []
    for row in rows:
        above = row["peak_mib"] - row["baseline_mib"]
        if above > row["checkpoint_mib"] + row["shard_mib"]:
            problems.append(f"{row['layout']}, {row['build']}: peak {above:.0f} MiB")
    seconds = {(row["layout"], row["build"]): row["cpu_seconds"] for row in rows}
    for layout in {row["layout"] for row in rows}:
        cost = seconds[layout, "fork"] / seconds[layout, "without checks"] - 1
        if cost >= MAX_COST:
            problems.append(f"{layout}: the checks cost {cost:.1%}")
    return problems


def show(result: dict[str, Any]) -> None:
    table = Table(*result["rows"][0])
    for row in result["rows"]:
        cells = (f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values())
        table.add_row(*cells)
    head = (f"{name} {value}" for name, value in result.items() if name != "rows")
    Console(width=140).print(*head, table, sep="\n", highlight=False)


def main() -> None:
    if sys.argv[1:2] == ["--load"]:
        print(json.dumps(load_here(Path(sys.argv[2]))))
        return
    from examples.compare_builds import device_name
    from tools.mutants import install_without

    builds = {"fork": None, "without checks": install_without(patch_of_checks())}
    write_exports()
    write_checkpoint(WORK / "small", SMALL)
    rows = [row for layout in LAYOUTS for row in rows_of(WORK / layout, builds)]
    small = medians(WORK / "small", builds)
    result = {
        "device": device_name(),
        "date": datetime.date.today().isoformat(),
        "rows": rows,
        "us_a_tensor": {b: round(of["us_a_tensor"], 1) for b, of in small.items()},
    }
    show(result)
    if sys.argv[1:]:
        save(Path(sys.argv[1]), result)
    if problems := judge(rows):
        sys.exit("error: " + "; ".join(problems))


if __name__ == "__main__":
    main()

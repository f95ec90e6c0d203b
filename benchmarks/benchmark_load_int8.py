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
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.serving.checkpoint import Widths, write_checkpoint

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build/load"
RUNS = 9
SHARD_BYTES = 400 << 20
CHECKS = "vllm/model_executor/layers/quantization/quark/load_checks/loading.py"
MAX_COST = 0.03
# Sizes of a Step-3.5-Flash layer, but for the number of experts.
# Whose positions take next to no memory.
WIDTHS = Widths(
    layers=5,
    vocab=4096,
    dense_width=1280,
    experts=28,
    sliding_heads=64,
    context=1024,
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


def write_exports() -> None:
    """Both layouts below WORK, unless they are there."""
    for layout, stacked in LAYOUTS.items():
        write_checkpoint(
            WORK / layout, dataclasses.replace(WIDTHS, stacked=stacked), SHARD_BYTES
        )


def peak_mib() -> float:
    [line] = [
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    ]
    return int(line.split()[1]) / 1024


def engine_config(folder: Path) -> Any:
    from vllm.config import LoadConfig, ModelConfig, VllmConfig

    return VllmConfig(
        model_config=ModelConfig(
            model=str(folder), skip_tokenizer_init=True, dtype="bfloat16"
        ),
        load_config=LoadConfig(use_tqdm_on_load=False),
    )


def load_small(folder: Path) -> dict[str, float]:
    """Load the small export in this process, again and again."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model

    from tests.process_groups import start_process_groups

    vllm_config = engine_config(folder)
    loader = get_model_loader(vllm_config.load_config)
    times = []
    with (
        tempfile.TemporaryDirectory() as scratch,
        set_current_vllm_config(vllm_config),
    ):
        start_process_groups(Path(scratch) / "store")
        model = initialize_model(vllm_config)
        for _ in range(RUNS):
            started = time.perf_counter()
            loader.load_weights(model, vllm_config.model_config)
            times.append(time.perf_counter() - started)
    # Weight and scale of three projections.
    tensors = (SMALL.layers - 1) * SMALL.experts * 3 * 2
    return {"us_a_tensor": statistics.median(times) / tensors * 1e6}


def load(folder: Path) -> dict[str, float]:
    """Load the export in this process, as the engine's worker does."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model_loader

    from tests.process_groups import start_process_groups

    # What the engine's worker has imported before it loads.
    importlib.import_module("vllm.v1.worker.cpu_worker")
    importlib.import_module("vllm.model_executor.models.step3p5")
    importlib.import_module("torch._dynamo")

    with tempfile.TemporaryDirectory() as scratch:
        start_process_groups(Path(scratch) / "store")
        baseline = peak_mib()
        started, cpu_started = time.perf_counter(), time.process_time()
        vllm_config = engine_config(folder)
        with set_current_vllm_config(vllm_config):
            loader = get_model_loader(vllm_config.load_config)
            model = loader.load_model(vllm_config, vllm_config.model_config)
        seconds = time.perf_counter() - started
        cpu_seconds = time.process_time() - cpu_started
        del model
    return {
        "baseline_mib": baseline,
        "peak_mib": peak_mib(),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
    }


def load_with(
    folder: Path, package: Path | None, what: str = "--load"
) -> dict[str, float]:
    """`load`, or `load_small`, in a process of its own, with the build in `package`."""
    env = dict(os.environ, CUDA_VISIBLE_DEVICES="", VLLM_LOGGING_LEVEL="ERROR")
    if package:
        env["PYTHONPATH"] = str(package)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.benchmark_load_int8", what, folder],
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


def load_in_turns(
    folder: Path, builds: dict[str, Path | None], what: str = "--load"
) -> dict[str, list[dict[str, float]]]:
    """What `load_with` says of each build."""
    runs: dict[str, list[dict[str, float]]] = {build: [] for build in builds}
    for number in range(RUNS):
        # Who comes second meets what the first one left.
        for build in list(builds)[:: -1 if number % 2 else 1]:
            runs[build].append(load_with(folder, builds[build], what))
    return runs


def medians(folder: Path, builds: dict[str, Path | None]) -> list[dict[str, Any]]:
    """A row a build of loads in turns, after one that fills the page cache."""
    load_with(folder, None)
    runs = load_in_turns(folder, builds)
    sizes = [file.stat().st_size / 2**20 for file in folder.glob("*.safetensors")]
    head = {
        "layout": folder.name,
        "checkpoint_mib": math.ceil(sum(sizes)),
        "shard_mib": math.ceil(max(sizes)),
    }
    return [
        head
        | {"build": build}
        | {
            name: round(statistics.median(run[name] for run in found), 2)
            for name in found[0]
        }
        | {"runs": len(found)}
        for build, found in runs.items()
    ]


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


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=140).print(table)


def main() -> None:
    if sys.argv[1:2] == ["--load"]:
        print(json.dumps(load(Path(sys.argv[2]))))
        return
    if sys.argv[1:2] == ["--load-small"]:
        print(json.dumps(load_small(Path(sys.argv[2]))))
        return
    from examples.compare_builds import device_name
    from tools.mutants import install_without

    builds = {"fork": None, "without checks": install_without(patch_of_checks())}
    write_exports()
    rows = []
    for layout in LAYOUTS:
        rows += medians(WORK / layout, builds)
        show(rows)
    write_checkpoint(WORK / "small", SMALL)
    small = load_in_turns(WORK / "small", builds, "--load-small")
    us = {
        build: round(statistics.median(run["us_a_tensor"] for run in runs), 1)
        for build, runs in small.items()
    }
    print("microseconds for each tensor of an expert:", us)
    if sys.argv[1:]:
        date = datetime.date.today().isoformat()
        head = {"device": device_name(), "date": date}
        text = json.dumps({**head, "rows": rows, "us_a_tensor": us}, indent=1)
        Path(sys.argv[1]).write_text(text + "\n")
    if problems := judge(rows):
        sys.exit("error: " + "; ".join(problems))


if __name__ == "__main__":
    main()

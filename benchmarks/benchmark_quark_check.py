# SPDX-License-Identifier: Apache-2.0
"""Time and memory of `vllm quark-check` on a checkpoint of 200 GB and 100,000 tensors.

    python benchmarks/benchmark_quark_check.py [--repeat 5] [--json FILE]

The checkpoint is synthetic: shards of true headers whose data is a hole in a sparse
file. Each figure is of a whole process, from its start to its end, which reads headers
that the operating system has in memory.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
COMMAND = ROOT / "vllm/model_executor/layers/quantization/quark/quark_check"
CONFIG = ROOT / "tests/fixtures/step3p5-tiny/int8-per-expert/config.json"
# Step-3.5-Flash's widths and depth, with as many experts as make 100,000 tensors.
LAYERS, DENSE, EXPERTS, HIDDEN, WIDTH = 45, 3, 397, 4096, 1024
NUM_SHARDS = 50


def tensors() -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> dtype and shape."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}

    def int8(name: str, rows: int, columns: int) -> None:
        found[f"{name}.weight"] = "I8", (rows, columns)
        found[f"{name}.weight_scale"] = "F32", (rows,)

    def floats(name: str, *shape: int) -> None:
        found[f"{name}.weight"] = "BF16", shape

    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for name, rows in ("q_proj", 8192), ("k_proj", 1024), ("v_proj", 1024):
            int8(f"{prefix}.self_attn.{name}", rows, HIDDEN)
        int8(f"{prefix}.self_attn.o_proj", HIDDEN, 8192)
        floats(f"{prefix}.input_layernorm", HIDDEN)
        parts = [(f"{prefix}.mlp", 4 * WIDTH)]
        if layer >= DENSE:
            floats(f"{prefix}.moe.gate", EXPERTS, HIDDEN)
            parts = [(f"{prefix}.share_expert", WIDTH)]
            for expert in range(EXPERTS):
                routed = f"{prefix}.moe.experts.{expert}"
                int8(f"{routed}.gate_proj", WIDTH, HIDDEN)
                int8(f"{routed}.up_proj", WIDTH, HIDDEN)
                int8(f"{routed}.down_proj", HIDDEN, WIDTH)
        for name, width in parts:
            floats(f"{name}.gate_proj", width, HIDDEN)
            floats(f"{name}.up_proj", width, HIDDEN)
            floats(f"{name}.down_proj", HIDDEN, width)
    floats("model.embed_tokens", 128_896, HIDDEN)
    floats("lm_head", 128_896, HIDDEN)
    return found


def write(folder: Path) -> dict[str, int]:
    """The checkpoint; returns its number of tensors, bytes and bytes on disk."""
    every = list(tensors().items())
    exclude = [
        name.removesuffix(".weight")
        for name, (dtype, shape) in every
        if dtype == "BF16" and len(shape) == 2 and "embed_tokens" not in name
    ]
    config = json.loads(CONFIG.read_text())
    config |= {"num_hidden_layers": LAYERS, "moe_num_experts": EXPERTS}
    config["quantization_config"]["exclude"] = exclude
    (folder / "config.json").write_text(json.dumps(config))
    places, total = {}, 0
    share = -(-len(every) // NUM_SHARDS)
    for number in range(NUM_SHARDS):
        shard = f"model-{number + 1:05}-of-{NUM_SHARDS:05}.safetensors"
        header: dict[str, Any] = {}
        end = 0
        for name, (dtype, shape) in every[number * share : (number + 1) * share]:
            size = {"I8": 1, "BF16": 2, "F32": 4}[dtype]
            for length in shape:
                size *= length
            header[name] = {
                "dtype": dtype,
                "shape": shape,
                "data_offsets": [end, end + size],
            }
            end += size
            places[name] = shard
        text = json.dumps(header).encode()
        with (folder / shard).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + end)
        total += end
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    on_disk = sum(path.stat().st_blocks * 512 for path in folder.iterdir())
    return {"tensors": len(every), "bytes": total, "bytes_on_disk": on_disk}


def measure(folder: Path, *more: str) -> dict[str, float]:
    """Seconds and peak MiB of one process."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, COMMAND, folder, *more], stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 1:
        sys.exit(f"error: quark-check ended with {process.returncode}, expected 1")
    return {"seconds": seconds, "peak_mib": usage.ru_maxrss / 1024}


def device_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(": ", 1)[1]
    return platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sizes = write(Path(folder))
        rows = []
        for output, more in ("report", []), ("--json", ["--json"]):
            runs = [measure(Path(folder), *more) for _ in range(args.repeat)]
            rows.append(
                {
                    "output": output,
                    "seconds": statistics.median(run["seconds"] for run in runs),
                    "seconds_max": max(run["seconds"] for run in runs),
                    "peak_mib": max(run["peak_mib"] for run in runs),
                }
            )
    table = Table(*rows[0])
    for row in rows:
        cells = (f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values())
        table.add_row(*cells)
    console = Console()
    console.print(
        f"{sizes['tensors']:,} tensors, {sizes['bytes'] / 1e9:.0f} GB in {NUM_SHARDS} "
        f"shards, {sizes['bytes_on_disk'] / 1e6:.0f} MB of them on disk"
    )
    console.print(table)
    if args.json:
        result = {
            "device": device_name(),
            "date": date.today().isoformat(),
            "python": platform.python_version(),
            "repeat": args.repeat,
            **sizes,
            "rows": rows,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

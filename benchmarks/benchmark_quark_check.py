# SPDX-License-Identifier: Apache-2.0
"""Time and memory of `vllm quark-check`.

    python -m benchmarks.benchmark_quark_check [--parts headers data] [--out FOLDER]

- headers: the report on a checkpoint of 200 GB and 100,000 tensors: shards of true
  headers whose data is a hole in a sparse file; into OUT/quark-check-cpu.json
- data: `--deep` and `--fix` on 2 GB exports, those of benchmark_load_int8.py
  (build/load); into OUT/quark-check-deep-cpu.json

Each figure is of a whole process, from its start to its end, as a checkout without vLLM
runs it; files are in the page cache. Seconds are medians, peaks the greatest.
"""

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.benchmark_load_int8 import show, write_exports
from benchmarks.serving.checkpoint import Widths, write_headers
from benchmarks.serving.report import save
from examples.compare_builds import device_name

ROOT = Path(__file__).resolve().parents[1]
QUARK_CHECK = ROOT / "vllm/model_executor/layers/quantization/quark/quark_check"
# Step-3.5-Flash's widths and depth, with as many experts as make 100,000 tensors.
SHARDS = 50
WIDE = Widths(layers=45, experts=378, expert_width=1024, stacked=False)
LAYOUTS = {"per_expert": "one expert a tensor", "3key": "3-key"}
FIXED = ROOT / "build/rewritten-large"
DEEP = {
    "report": [],
    "--deep": ["--deep"],
    "--fix, compressed-tensors": [
        *("--fix", str(FIXED), "--fix-layout", "compressed-tensors"),
    ],
    "--fix, quark (links)": ["--fix", str(FIXED), "--fix-layout", "quark"],
}
Row = dict[str, Any]


def sizes_of(folder: Path) -> dict[str, int]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return {
        "tensors": len(index["weight_map"]),
        "bytes": index["metadata"]["total_size"],
        "bytes_on_disk": sum(file.stat().st_blocks * 512 for file in folder.iterdir()),
    }


# What starts a process counts in its peak: something small does.
START = """
import json, os, subprocess, sys, time
started = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
seconds = time.perf_counter() - started
print(json.dumps([os.waitstatus_to_exitcode(status), seconds, usage.ru_maxrss / 1024]))
"""


def run(folder: Path, arguments: Sequence[str]) -> tuple[float, float]:
    """Seconds and peak MiB of one process."""
    shutil.rmtree(FIXED, ignore_errors=True)
    command = [sys.executable, str(QUARK_CHECK), str(folder), *arguments]
    starter = [sys.executable, "-c", START]
    done = subprocess.run([*starter, *command], capture_output=True, text=True)
    status, seconds, peak_mib = json.loads(done.stdout)
    if status not in (0, 1):
        sys.exit(
            f"error: quark-check {folder} {' '.join(arguments)} ended with {status}:\n"
            f"{done.stderr}"
        )
    return seconds, peak_mib


def measure_headers(repeat: int) -> tuple[str, Row]:
    """The name of the results, and they."""
    with tempfile.TemporaryDirectory() as folder:
        write_headers(Path(folder), WIDE, SHARDS)
        sizes = sizes_of(Path(folder))
        rows = []
        for output, arguments in ("report", []), ("--json", ["--json"]):
            runs = [run(Path(folder), arguments) for _ in range(repeat)]
            rows.append(
                {
                    "output": output,
                    "seconds": statistics.median(seconds for seconds, _ in runs),
                    "seconds_max": max(seconds for seconds, _ in runs),
                    "peak_mib": max(peak for _, peak in runs),
                }
            )
    head = {"python": platform.python_version(), "repeat": repeat, **sizes}
    return "quark-check-cpu.json", {**head, "rows": rows}


def measure_data(repeat: int) -> tuple[str, Row]:
    """The name of the results, and they."""
    rows = []
    write_exports()
    for name, layout in LAYOUTS.items():
        folder = ROOT / "build/load" / name
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        for what, arguments in DEEP.items():
            runs = [run(folder, arguments) for _ in range(repeat)]
            rows.append(
                {
                    "layout": layout,
                    "what": what,
                    "checkpoint_mib": round(size / 2**20),
                    "seconds": round(statistics.median(s for s, _ in runs), 2),
                    "peak_mib": round(max(peak for _, peak in runs)),
                }
            )
    shutil.rmtree(FIXED, ignore_errors=True)
    return "quark-check-deep-cpu.json", {"runs": repeat, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = {"headers": (measure_headers, 5), "data": (measure_data, 3)}
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--repeat", type=int, help="default: 5, of data 3")
    parser.add_argument("--out", type=Path, help="write results there, as docs/results")
    args = parser.parse_args()
    for part in args.parts:
        measure, repeat = parts[part]
        name, result = measure(args.repeat or repeat)
        result = {"device": device_name(), "date": date.today().isoformat(), **result}
        show(result)
        if args.out:
            save(args.out / name, result)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Time and peak memory of `quark-check --deep` and `--fix` on a 2 GB export.

    python benchmarks/benchmark_quark_check_deep.py [RESULTS.json]

Takes the exports of benchmark_load_int8.py (build/load), a process a run, as a checkout
without vLLM does. The files are in the page cache. RESULTS gets `{"device", "date",
"rows": [{"layout", "what", "checkpoint_mib", "seconds", "peak_mib"}]}`: medians of
seconds, the greatest peak (VmHWM).
"""

import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmark_quark_check import COMMAND, device_name
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
# Another process writes them: torch here would count in the peak of what is started.
WRITE = "from benchmark_load_int8 import *; write_export(WORK / {0!r}, {0!r} == '3key')"
LAYOUTS = {"per_expert": "one expert a tensor", "3key": "3-key"}
RUNS = 3
OUT = ROOT / "build/rewritten-large"
WHATS = {
    "report": [],
    "--deep": ["--deep"],
    "--fix, compressed-tensors": [
        *("--fix", str(OUT), "--fix-layout", "compressed-tensors"),
    ],
    "--fix, quark (links)": ["--fix", str(OUT), "--fix-layout", "quark"],
}


def measure(folder: Path, arguments: list[str]) -> tuple[float, float]:
    """Seconds and peak MiB of one process."""
    shutil.rmtree(OUT, ignore_errors=True)
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, COMMAND, folder, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert process.stderr
    said = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 1):
        sys.exit(f"error: quark-check {arguments} ended badly:\n{said}")
    return seconds, usage.ru_maxrss / 1024


def main() -> None:
    rows: list[dict[str, Any]] = []
    for name, layout in LAYOUTS.items():
        command = [sys.executable, "-c", WRITE.format(name)]
        subprocess.run(command, cwd=Path(__file__).parent, check=True)
        folder = ROOT / "build/load" / name
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        for what, arguments in WHATS.items():
            runs = [measure(folder, arguments) for _ in range(RUNS)]
            rows.append(
                {
                    "layout": layout,
                    "what": what,
                    "checkpoint_mib": round(size / 2**20),
                    "seconds": round(statistics.median(run[0] for run in runs), 2),
                    "peak_mib": round(max(run[1] for run in runs)),
                }
            )
    shutil.rmtree(OUT, ignore_errors=True)
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    if len(sys.argv) > 1:
        head = {"device": device_name(), "date": datetime.date.today().isoformat()}
        text = json.dumps({**head, "runs": RUNS, "rows": rows}, indent=1)
        Path(sys.argv[1]).write_text(text + "\n")


if __name__ == "__main__":
    main()

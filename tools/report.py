# SPDX-License-Identifier: Apache-2.0
"""What this fork does on the GPU of this machine: `make report`.

Runs the tests that need a GPU, times the fused MoE's layer at six points and serves a
small random checkpoint, stock beside fork. Writes build/report/report.md, to be put
into an issue, and report.json, to be attached to it. What fails is told with the end of
its log, and the rest goes on. Neither file names this machine, its user or its folders.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from zipfile import ZipFile

from tools.build import base_wheel, get_base
from tools.errors import ForkError
from tools.groups import FIX
from tools.redact import Redact, redact
from tools.repack import RECORD_OF_BUILD, repack
from tools.report_text import markdown
from tools.series import read_series
from tools.upstream import ROOT

OUT = ROOT / "build/report"
# The fork's kernels on every GPU; stock does not know the variable, and says so.
KERNELS = {"VLLM_QUARK_INT8_KERNELS": "on"}
LOG_LINES = 60  # of a step or a test that failed
MOST_FAILURES = 20
LAYER = ["288", "1280", "4096", "8"]  # experts, width, hidden size, experts a token
LAYER_TOKENS = ["1", "16", "256", "1024", "4096", "8192"]
LAYERS = 2  # of the served model: one is dense, one has experts


@dataclass
class Step:
    """One thing that was run. `status` is passed, failed, or not run."""

    name: str
    status: str
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    failures: list[dict[str, str]] = field(default_factory=list)


def run(
    name: str, command: Sequence[str], env: dict[str, str], timeout_s: float, out: Path
) -> tuple[Step, Path]:
    """Run a command, its output in a file; it and its children end with the time."""
    log = out / f"{name}.log"
    started = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | env,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            said = f"ended with status {process.wait(timeout_s)}"
        except subprocess.TimeoutExpired:
            said = f"was ended after {timeout_s:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    step = Step(name, "passed", round(time.monotonic() - started, 1))
    if process.returncode:
        step.status = "failed"
        step.failures.append({"name": f"{name} {said}", "log": tail(log.read_text())})
    return step, log


def tail(text: str) -> str:
    return "\n".join(text.splitlines()[-LOG_LINES:])


def run_tests(out: Path, timeout_s: float = 5400) -> Step:
    """The tests marked `gpu`, with what pytest writes of each."""
    junit = out / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q"]
    step, _ = run("tests", [*command, f"--junitxml={junit}"], {}, timeout_s, out)
    if junit.exists():
        step.counts, failures = read_junit(junit)
        # They say more than the end of pytest's own output.
        step.failures = failures or step.failures
    return step


def read_junit(path: Path) -> tuple[dict[str, int], list[dict[str, str]]]:
    """How many tests passed, failed and were skipped, and the logs of those that
    failed."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures = []
    for case in ElementTree.parse(path).iter("testcase"):
        wrong = [e for kind in ("failure", "error") for e in case.iter(kind)]
        if wrong:
            counts["failed"] += 1
            name = f"{case.get('classname')}::{case.get('name')}"
            failures.append({"name": name, "log": tail(wrong[0].text or "")})
        elif case.find("skipped") is not None:
            counts["skipped"] += 1
        else:
            counts["passed"] += 1
    return counts, failures[:MOST_FAILURES]


def run_layer(out: Path, timeout_s: float = 1800) -> Step:
    """The fused MoE alone, at six numbers of tokens, stock's kernel beside ours."""
    command = [sys.executable, "-m", "benchmarks.kernels.benchmark_int8_moe"]
    options = ["--shape", *LAYER, "--routing", "random", "--tokens", *LAYER_TOKENS]
    step, _ = run(
        "layer", [*command, *options, "--out", str(out)], KERNELS, timeout_s, out
    )
    for row in _rows(out, "int8_moe.json"):
        step.rows.append(
            {
                "what": f"{row['m']} tokens, us",
                "stock": row["stock_us"],
                "fork": row["ours_us"],
                "ratio": _ratio(row["stock_us"], row["ours_us"]),
            }
        )
    return step


def run_serving(out: Path, timeout_s: float = 3600) -> Step:
    """One small model served by stock and by the fork, one after the other."""
    try:
        stock = make_stock(out)
    except ForkError as error:
        failure = {"name": "no stock vLLM to compare with", "log": str(error)}
        return Step("serving", "not run", failures=[failure])
    command = [sys.executable, "-m", "benchmarks.benchmark_serving_int8"]
    options = ["--parts", "serve", "--alone", "--layers", str(LAYERS)]
    options += ["--batches", "1", "32", "--prompt-tokens", "512"]
    options += ["--fork-moe-backend", "quark_int8"]
    where = ["--stock", str(stock), "--work", str(out / "work"), "--out", str(out)]
    step, _ = run("serving", [*command, *options, *where], KERNELS, timeout_s, out)
    for row in _rows(out, "serving_int8_alone.json"):
        stock_value, fork_value = row["stock"], row["fork"]
        if row["better"] == "lower":
            ratio = _ratio(stock_value, fork_value)
        else:
            ratio = _ratio(fork_value, stock_value)
        what = f"{row['metric']}, {row['batch']} requests of {row['prompt_tokens']}"
        step.rows.append(
            {"what": what, "stock": stock_value, "fork": fork_value, "ratio": ratio}
        )
    return step


def _rows(out: Path, name: str) -> list[dict[str, Any]]:
    """What a benchmark has saved, which it does row by row."""
    found = next(out.glob(f"*/{name}"), None)
    return json.loads(found.read_text())["rows"] if found else []


def _ratio(more: float | None, less: float | None) -> float | None:
    return round(more / less, 3) if more and less else None


def make_stock(out: Path) -> Path:
    """Unpack stock vLLM: the base, with the group `fix` where the release lacks that.
    Raises ForkError."""
    wheel = base_wheel()
    path, names = get_base(wheel)
    patches = [p for p in read_series(wheel.release.series) if p.group == FIX]
    version = wheel.version([patches[0].group] if patches else ["stock"])
    built = repack(path, patches, version, out / "dist", names=names)
    folder = out / "stock"
    with ZipFile(built) as archive:
        archive.extractall(folder)
    built.unlink()
    return folder


def about() -> dict[str, Any]:
    """The chip, the driver, versions, and which fork this is."""
    import torch

    gpu = torch.cuda.get_device_properties(0)
    capability = ".".join(map(str, torch.cuda.get_device_capability(0)))
    told: dict[str, Any] = {
        "chip": torch.cuda.get_device_name(0),
        # CUDA's has the chip's name there.
        "architecture": gpu.gcnArchName if torch.version.hip else f"sm {capability}",
        "chips": torch.cuda.device_count(),
        "memory GiB": round(gpu.total_memory / 2**30, 1),
        "driver": _driver(bool(torch.version.hip)),
        "python": sys.version.split()[0],
        "CUDA": torch.version.cuda,
        "HIP": torch.version.hip,
    }
    told["torch"] = torch.__version__  # with its build, which its metadata may lack
    for name in ("triton", "vllm"):
        try:
            told[name] = distribution(name).version
        except PackageNotFoundError:
            told[name] = "not installed"
    told["commit"] = _commit()
    try:
        record = json.loads(distribution("vllm").read_text(RECORD_OF_BUILD) or "{}")
    except PackageNotFoundError:
        record = {}
    told["base"] = record.get("base", {}).get("file", "not known")
    told["groups"] = " ".join(record.get("groups", [])) or "not known"
    told["date"] = time.strftime("%Y-%m-%d")
    return {name: value for name, value in told.items() if value is not None}


def _driver(is_rocm: bool) -> str:
    if is_rocm:
        file = Path("/sys/module/amdgpu/version")
        return file.read_text().strip() if file.exists() else "not known"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return _said(query).partition("\n")[0] or "not known"


def _commit() -> str:
    commit = _said(["git", "rev-parse", "HEAD"])
    changed = _said(["git", "status", "--porcelain"])
    return f"{commit}, with changes" if changed else commit or "not known"


def _said(command: Sequence[str]) -> str:
    """What a command prints; nothing where it is not there or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def write(told: dict[str, Any], steps: Sequence[Step], out: Path, hide: Redact) -> None:
    """Write both files, without what names this machine."""
    report = {"about": told, "steps": [asdict(step) for step in steps]}
    report = hide(report)
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "report.md").write_text(markdown(report))


def make_report(
    out: Path,
    told: dict[str, Any],
    parts: Sequence[Callable[[Path], Step]] = (run_tests, run_layer, run_serving),
) -> bool:
    """Run the parts, write the report after each, and say whether all passed."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    hide = partial(redact, folders=[ROOT, Path(sys.prefix)])
    steps: list[Step] = []
    for part in parts:
        print(f"{part.__name__} ...", flush=True)
        try:
            steps.append(part(out))
        except Exception:
            log = tail(traceback.format_exc())
            failure = {"name": f"{part.__name__} raised", "log": log}
            steps.append(Step(part.__name__, "not run", failures=[failure]))
        write(told, steps, out, hide)
        print(f"{steps[-1].name}: {steps[-1].status}, {steps[-1].seconds:.0f} s")
    print(f"{out / 'report.md'}: put it into an issue, and attach report.json")
    return all(step.status == "passed" for step in steps)


def main() -> None:
    import torch

    if not torch.cuda.is_available():
        sys.exit(
            "error: make report measures a GPU, and torch sees none here. Run it where "
            "`python -c 'import torch; print(torch.cuda.is_available())'` prints True."
        )
    sys.exit(0 if make_report(OUT, about()) else 1)


if __name__ == "__main__":
    main()

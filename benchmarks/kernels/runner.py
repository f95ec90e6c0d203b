# SPDX-License-Identifier: Apache-2.0
"""One runner for the benchmarks of kernels: cases are timed side by side, saved, drawn.

A benchmark gives cases: what a row is of, and what is timed for it, ours and baselines.
Times are medians of replays of CUDA graphs that take turns, so that a busy or a hot
machine slows all alike; on a CPU of the calls themselves. Each row is saved once it is
measured. A baseline that cannot run here is null in the row; a case that fails is left
out, and the command ends with status 1 and says so.
"""

import argparse
import datetime
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import torch

from benchmarks.plots import Line, Panel, draw
from benchmarks.serving.report import save

ROOT = Path(__file__).resolve().parents[2]
REPEAT = 9
# Calls that do the same, each with data of its own where that would stay in the cache.
Calls = Sequence[Callable[[], Any]]
Row = dict[str, Any]


@dataclass(frozen=True)
class Timed:
    """What is timed for a row, by the figure's name; None is null in the row."""

    calls: Mapping[str, Calls | None]
    limit_us: float | None = None


@dataclass(frozen=True)
class Case:
    """A row: its labels, and how to make what is timed."""

    labels: Row
    prepare: Callable[[], Timed]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: `<chip>/<name>.json`, and a plot of the same name.

    Args:
        ours: figures of ours, each with the baseline that it is held against.
        panels: what is drawn of the rows.
        ylabel: of the plot; the chip's name follows.
        log: whether the plot's ordinate is logarithmic.
        has_limit: whether rows have a `limit_us`.
        also: further figures of a row.
    """

    name: str
    ours: Mapping[str, str]
    panels: Callable[[list[Row]], list[Panel]]
    ylabel: str
    log: bool = False
    has_limit: bool = False
    also: Callable[[Row], Row] = lambda row: {}
    noted: set[str] = field(default_factory=set)  # baselines that failed, named once

    def measure(
        self,
        cases: Iterable[Case],
        out: Path | None,
        deadline: float = float("inf"),
        repeat: int = REPEAT,
        **about: Any,
    ) -> None:
        """Time the cases until the deadline of time.monotonic(); save and draw."""
        path = out / chip() / f"{self.name}.json" if out else None
        rows: list[Row] = []
        date = datetime.date.today().isoformat()
        result = {"chip": chip(), "date": date, **about, "rows": rows}
        failed = []
        for case in cases:
            if time.monotonic() > deadline:
                print(f"the time is over: {len(rows)} rows")
                break
            try:
                rows.append(self.row(case, repeat))
            except Exception as error:
                failed.append(" ".join(map(str, case.labels.values())))
                print(f"{failed[-1]}: left out: {short(error)}", flush=True)
                continue
            print(self.describe(rows[-1]), flush=True)
            if path:
                save(path, result)
            if on_gpu():
                torch.cuda.empty_cache()  # of the graphs
        if rows and path:
            self.plot(result, path.with_suffix(".png"))
            print(f"{len(rows)} rows: {path}")
        if failed:
            sys.exit(f"error: {len(failed)} cases failed: {'; '.join(failed)}")

    def row(self, case: Case, repeat: int = REPEAT) -> Row:
        timed = case.prepare()
        calls = {}
        for name, of in timed.calls.items():
            try:
                calls[name] = replay(of) if of else None
            except Exception as error:
                if name in self.ours:
                    raise
                if name not in self.noted:
                    print(f"{name}: not to be had here: {short(error)}", flush=True)
                self.noted.add(name)
                calls[name] = None
        found = take_turns({name: of for name, of in calls.items() if of}, repeat)
        row = case.labels | {name: found.get(name) for name in calls}
        if self.has_limit:
            row["limit_us"] = timed.limit_us
        return row | self.also(row)

    def describe(self, row: Row) -> str:
        """A line: labels, ours, each baseline and how many times its time is ours'."""
        times = {name: t for name, t in row.items() if name.endswith("_us")}
        also = self.also(row)
        rest = [name for name in row if name not in times and name not in also]
        text = " ".join(f"{row[name]!s:>6}" for name in rest)
        for name, stock in self.ours.items():
            mine = times[name]
            text += f"  {name.removesuffix('_us')} {mine:.1f} us"
            others = [stock]
            if len(self.ours) == 1:
                others += [other for other in times if other not in (stock, name)]
            for other in others:
                if times[other] is not None:
                    shown = f"{times[other]:.1f} ({times[other] / mine:.2f})"
                    text += f", {other.removesuffix('_us')} {shown}"
        return text + "".join(f", {value} {name}" for name, value in also.items())

    def plot(self, result: Mapping[str, Any], path: Path) -> None:
        ylabel = f"{self.ylabel}, {result['chip']}"
        draw(self.panels(result["rows"]), path, ylabel, self.log)


def line(
    label: str, rows: Iterable[Row], name: str, over: str | None = None, **how: Any
) -> Line:
    """A figure over tokens, or how many times it is in another; none where null."""
    points = [
        (row["m"], row[over] / row[name] if over else row[name])
        for row in rows
        if row[name] is not None and (over is None or row[over] is not None)
    ]
    return Line(label, points, **how)


def on_gpu() -> bool:
    return torch.cuda.is_available()


def is_interpreted() -> bool:
    """Whether this is a dry run, whose times say nothing."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def device() -> str:
    return "cuda" if on_gpu() else "cpu"


def chip() -> str:
    if on_gpu():
        return torch.cuda.get_device_name().replace(" ", "_")
    return "interpreter" if is_interpreted() else "CPU"


def short(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def version(package: str) -> str | None:
    try:
        return installed_version(package)
    except PackageNotFoundError:
        return None


Replay = Callable[[], float]


def replay(calls: Calls) -> Replay:
    """Run the calls once; what it returns runs them again: microseconds a call."""
    for call in calls:
        call()

    def run() -> None:
        for call in calls:
            call()

    def on_cpu() -> float:
        started = time.perf_counter()
        run()
        return (time.perf_counter() - started) * 1e6 / len(calls)

    if not on_gpu():
        return on_cpu
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def in_graph() -> float:
        graph.replay()  # leaves caches as a run of the same leaves them
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e3 / len(calls)

    in_graph()
    return in_graph


def take_turns(replays: Mapping[str, Replay], repeat: int = REPEAT) -> dict[str, float]:
    """The median microseconds of each."""
    if is_interpreted():
        repeat = 1
    times: dict[str, list[float]] = {name: [] for name in replays}
    for _ in range(repeat):
        for name, one in replays.items():
            times[name].append(one())
    return {name: statistics.median(of) for name, of in times.items()}


def time_us(calls: Calls, repeat: int = REPEAT) -> float:
    return take_turns({"": replay(calls)}, repeat)[""]


@cache
def copy_tbps() -> float | None:
    """Bandwidth of a copy in TB/s, read and written bytes; None without a GPU."""
    if not on_gpu():
        return None
    a = torch.empty(2**28, dtype=torch.float32, device="cuda").normal_()
    b = torch.empty_like(a)
    copy = min(time_us([partial(b.copy_, a)]), time_us([partial(torch.neg, a, out=b)]))
    return 2 * a.nbytes / copy / 1e6


@cache
def int8_peak_tops() -> float | None:
    """Operations of the int8 tensor cores, TOPS; None without a GPU."""
    if not on_gpu():
        return None
    try:
        from humming.ops.bench import tops_bench

        return tops_bench("int8")
    except Exception as error:  # not installed, or it cannot build here
        print(f"Humming's int8 peak: {short(error)}; a library's product instead")
    size = 8192
    m = torch.empty((size, size), dtype=torch.int8, device="cuda").random_(-127, 128)
    return 2 * size**3 / time_us([partial(torch._int_mm, m, m.t())]) / 1e6


def limit_us(moved_bytes: float, operations: float = 0) -> float | None:
    """The larger of what moving and what multiplying takes; None without a GPU."""
    bandwidth = copy_tbps()
    if bandwidth is None:
        return None
    peak = int8_peak_tops() if operations else None
    return max(moved_bytes / bandwidth, operations / peak if peak else 0) / 1e6


def rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def best_tiles(
    what: str,
    stock: Calls | None,
    candidates: Iterable[tuple[Any, Calls]],
    show: int = 6,
) -> None:
    """Time all candidates and print the fastest; what cannot run is left out."""
    us = time_us(stock) if stock else None
    found = []
    tried = 0
    for tiles, calls in candidates:
        tried += 1
        try:
            found.append((time_us(calls), tiles))
        except Exception as error:
            print(f"    {tiles}: {short(error)[:120]}")
    found.sort(key=lambda one: one[0])
    beside = f"upstream {us:.1f} us, " if us else ""
    print(f"{what}: {beside}{tried} tried", flush=True)
    for mine, tiles in found[:show]:
        ratio = f" {us / mine:5.2f}" if us else ""
        print(f"    {mine:8.1f} us{ratio}  {tiles}", flush=True)


def edited_overlay() -> list[str]:
    """Files of the overlay that are not as the installed fork has them."""
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        return []
    installed = Path(found.origin).parent
    return [
        str(file.relative_to(ROOT))
        for file in sorted((ROOT / "vllm").rglob("*.py"))
        if (other := installed / file.relative_to(ROOT / "vllm")).exists()
        and other.read_bytes() != file.read_bytes()
    ]


def warn_of_edits() -> None:
    """Benchmarks import the installed fork: a build stands between edit and figure."""
    if edited := edited_overlay():
        print(
            f"warning: {len(edited)} files of vllm/ are not what is installed and "
            f"measured ({', '.join(edited[:3])}): run make install"
        )


def make_parser(doc: str | None, tokens: Sequence[int]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(doc or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="default: benchmarks/results")
    parser.add_argument("--tokens", type=int, nargs="+", default=tokens, metavar="M")
    parser.add_argument(
        "--interpret",
        action="store_true",
        help="a dry run on a CPU: tiny shapes in Triton's interpreter, whose times "
        "say nothing; into build/benchmarks",
    )
    return parser


def parse(
    parser: argparse.ArgumentParser, interpreted_tokens: Sequence[int]
) -> argparse.Namespace:
    """Parse, and end at once with what would end it late. Before vLLM is imported."""
    args = parser.parse_args()
    if args.interpret:
        os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        if args.tokens is parser.get_default("tokens"):
            args.tokens = interpreted_tokens
    elif not on_gpu():
        sys.exit(
            "error: torch.cuda sees no GPU, and the kernels need one; --interpret is "
            "a dry run without"
        )
    default = "build/benchmarks" if args.interpret else "benchmarks/results"
    args.out = args.out or ROOT / default
    warn_of_edits()
    if importlib.util.find_spec("matplotlib") is None:
        print("warning: matplotlib is not installed: there will be no plot")
    return args

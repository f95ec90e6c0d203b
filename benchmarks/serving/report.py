# SPDX-License-Identifier: Apache-2.0
"""Rows of figures: merged, held against bars, shown, drawn, written as Markdown."""

import datetime
import json
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.plots import Line, Panel, draw
from benchmarks.serving.errors import BenchmarkError

Row = dict[str, Any]
Samples = dict[str, dict[str, list[float]]]  # by metric and build
BUILDS = ("stock", "fork")
# Of a phase of the profile, beside what its kernels take.
TIMES = {"wall_us": "wall clock", "clock_mhz": "clock, MHz", "power_w": "power, W"}

TTFT, TPOT = "time to first token (ms)", "time per output token (ms)"
OUTPUT_RATE, TOTAL_RATE = "output tokens per second", "total tokens per second"
LATENCY, THROUGHPUT = "latency (s)", "throughput (tokens/s)"
SPEED = {
    TTFT: "lower",
    TPOT: "lower",
    OUTPUT_RATE: "higher",
    TOTAL_RATE: "higher",
    LATENCY: "lower",
    THROUGHPUT: "higher",
}
# As `vllm bench serve` calls them.
SERVING = {
    TTFT: "median_ttft_ms",
    TPOT: "median_tpot_ms",
    OUTPUT_RATE: "output_throughput",
    TOTAL_RATE: "total_token_throughput",
}
WEIGHTS_LOADING = "weights loading (s)"
ENGINE_START = "engine start (s)"
MODEL_MEMORY, PEAK_MEMORY = "model memory (GiB)", "peak GPU memory (GiB)"
# As a start calls them.
LOADING = {WEIGHTS_LOADING: "weights_s", ENGINE_START: "start_s"}
MEMORY = {MODEL_MEMORY: "model_gib", PEAK_MEMORY: "peak_gib"}
LONG_PROMPT = 8192


def make_row(
    metric: str,
    samples: Mapping[str, Sequence[float]],
    batch: int | None = None,
    prompt_tokens: int | None = None,
) -> Row:
    """The medians of both builds' samples."""
    medians = {build: statistics.median(samples[build]) for build in BUILDS}
    return {
        "metric": metric,
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        **{build: _short(value) for build, value in medians.items()},
        "better": SPEED.get(metric, "lower"),
        "runs": {build: [_short(x) for x in samples[build]] for build in BUILDS},
    }


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def loading_rows(starts: Sequence[Mapping[str, Any]]) -> list[Row]:
    """One row a figure that both builds' starts have."""
    rows = []
    for metric, key in (LOADING | MEMORY).items():
        samples = {
            start["build"]: [start[key]] for start in starts if start[key] is not None
        }
        if samples.keys() == set(BUILDS):
            rows.append(make_row(metric, samples))
    return rows


def merge(
    old: Iterable[Row], new: Iterable[Row], key: Sequence[str]
) -> list[dict[str, Any]]:
    """The old rows, each replaced by the new one of the same key; then those added."""
    rows = {tuple(row[name] for name in key): row for row in old}
    rows |= {tuple(row[name] for name in key): row for row in new}
    return list(rows.values())


def order(row: Row) -> tuple[int, int, int]:
    """To sort rows: by metric, prompt and batch."""
    metric = [*SPEED, *LOADING, *MEMORY].index(row["metric"])
    return metric, row["prompt_tokens"] or 0, row["batch"] or 0


def ratio(row: Row) -> float:
    """How many times better the fork is: above 1 where it wins."""
    if row["better"] == "lower":
        return row["stock"] / row["fork"]
    return row["fork"] / row["stock"]


def bars(rows: Sequence[Row]) -> list[tuple[str, float, list[Row]]]:
    """What is asked of the fork, the least ratio, and the rows that it is asked of."""
    batches = [row["batch"] for row in rows if row["metric"] == TOTAL_RATE]
    most = max(batches, default=0)
    long = [
        row
        for row in rows
        if row["prompt_tokens"] == LONG_PROMPT
        and row["metric"] in (THROUGHPUT, TOTAL_RATE)
        and (row["metric"] == THROUGHPUT or row["batch"] == most > 1)
    ]
    one = [row for row in rows if row["metric"] == TPOT and row["batch"] == 1]

    def of(metrics: Collection[str]) -> list[Row]:
        return [row for row in rows if row["metric"] in metrics]

    return [
        ("time per output token, batch 1", 1.10, one),
        (f"throughput, {LONG_PROMPT}-token prompts", 1.5, long),
        ("no speed worse", 0.98, of(SPEED)),
        ("loading no slower", 1.0, of(LOADING)),
        ("no more memory", 1.0, of(MEMORY)),
    ]


def verdicts(rows: Sequence[Row]) -> list[str]:
    """A line a bar: met, missed by which row, or not measured."""
    lines = []
    for what, least, found in bars(rows):
        bar = f"{what} >= {least:.2f}x"
        if not found:
            lines.append(f"not measured: {bar}")
            continue
        worst = min(found, key=ratio)
        said = "met" if round(ratio(worst), 2) >= least else "missed"
        lines.append(f"{said}: {bar}; least {ratio(worst):.2f}x, {describe(worst)}")
    return lines


def describe(row: Row) -> str:
    if row["batch"] is None:
        return row["metric"]
    return f"{row['metric']}, {row['batch']} x {row['prompt_tokens']}"


class Results:
    """What is measured, saved as it comes; `about` is the chip and the layers.

    Raises:
        BenchmarkError: those there are of another model.
    """

    def __init__(self, path: Path, profile_path: Path, about: dict[str, Any]) -> None:
        self.path, self.profile_path = path, profile_path
        date = {"date": datetime.date.today().isoformat()}
        self.result = about | {"starts": [], "rows": []} | date
        self.profile = about | date | {"builds": {}, "memory": {}}
        if path.exists():
            self.result = json.loads(path.read_text()) | date
            found, layers = self.result["layers"], about["layers"]
            if found != layers:
                raise BenchmarkError(
                    f"{path}: expected results of {layers} layers, found {found}: "
                    "choose another --out, or remove it"
                )

    def add(self, rows: Sequence[Row] = (), starts: Sequence[Row] = ()) -> None:
        """In place of what they measure again."""
        result = self.result
        result["starts"] = merge(result["starts"], starts, ("build",))
        rows = [*rows, *loading_rows(result["starts"])]
        rows = merge(result["rows"], rows, ("metric", "batch", "prompt_tokens"))
        result["rows"] = sorted(rows, key=order)
        save(self.path, result)

    def add_profile(self, build: str, phases: Row, memory: Row) -> None:
        """By phase what `summarize` says; torch's memory at most."""
        self.profile["builds"][build] = phases
        self.profile["memory"][build] = memory
        save(self.profile_path, self.profile)

    def tables(self) -> list[str]:
        found = [markdown(self.result)] if self.result["rows"] else []
        return found + (
            [profile_markdown(self.profile)] if self.profile["builds"] else []
        )


def save(path: Path, result: Mapping[str, Any]) -> None:
    """Write JSON so that no half of it is ever there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(path)


def markdown(result: Mapping[str, Any]) -> str:
    """Tables of the results for docs/measured/serving.md."""
    rows = result["rows"]
    cells = [row for row in rows if row["metric"] in (TTFT, TPOT, TOTAL_RATE)]
    others = [row for row in rows if row not in cells and row["metric"] != OUTPUT_RATE]
    keys = list(dict.fromkeys((row["prompt_tokens"], row["batch"]) for row in cells))
    names = (TTFT, TPOT, TOTAL_RATE)
    lines = [
        f"{result['chip'].replace('_', ' ')}, {result['date']}, {result['layers']} "
        "layers; stock, fork, how many times better:",
        "",
        f"| prompt tokens | batch | {' | '.join(names)} |",
        "|---:|---:|" + "---|" * len(names),
    ]
    by_key = {(r["prompt_tokens"], r["batch"], r["metric"]): r for r in cells}
    for prompt_tokens, batch in sorted(keys):
        found = [by_key.get((prompt_tokens, batch, name)) for name in names]
        texts = " | ".join(figures(row) if row else "" for row in found)
        lines.append(f"| {prompt_tokens} | {batch} | {texts} |")
    lines += ["", "| | stock | fork | |", "|---|---:|---:|---:|"]
    for row in others:
        lines.append(
            f"| {describe(row)} | {row['stock']:,.5g} | {row['fork']:,.5g} | "
            f"{ratio(row):.2f}x |"
        )
    lines += ["", *(f"- {line}" for line in verdicts(rows))]
    return "\n".join(lines) + "\n"


def figures(row: Row) -> str:
    stock, fork = (f"{float(f'{row[build]:.4g}'):,g}" for build in BUILDS)
    return f"{stock}, {fork}, {ratio(row):.2f}x"


def profile_markdown(result: Mapping[str, Any]) -> str:
    """A table a phase: microseconds of GPU time a step, by kind of kernel."""
    lines = []
    builds = result["builds"]
    for phase in next(iter(builds.values())):
        summaries = [builds[build][phase] for build in builds]
        lines += [
            f"| {phase}, us | {' | '.join(f'{b} | share' for b in builds)} |",
            "|---|" + "---:|---:|" * len(builds),
        ]
        for name in summaries[0]["kinds"]:
            kinds = [summary["kinds"][name] for summary in summaries]
            cells = " | ".join(f"{k['us']:,.1f} | {k['share']:.0%}" for k in kinds)
            lines.append(f"| {name} | {cells} |")
        for name, label in (("gpu_us", "all kernels"), *TIMES.items()):
            # Clock and power are not in older results.
            if name not in summaries[0]:
                continue
            cells = " | ".join(f"{summary[name]:,.1f} | " for summary in summaries)
            lines.append(f"| {label} | {cells} |")
        lines.append("")
    return "\n".join(lines)


def plot(result: Mapping[str, Any], path: Path) -> None:
    """How many times better than stock, by requests at a time."""
    rows = [row for row in result["rows"] if row["prompt_tokens"]]
    panels = []
    for length in sorted({row["prompt_tokens"] for row in rows}):
        lines = []
        for number, metric in enumerate(SPEED):
            points = sorted(
                (row["batch"], ratio(row))
                for row in rows
                if (row["metric"], row["prompt_tokens"]) == (metric, length)
            )
            if metric != OUTPUT_RATE:  # the same ratio as that of all tokens
                label = metric.split(" (")[0]
                lines.append(Line(label, points, "o-", f"C{number}"))
        panels.append(Panel(f"prompts of {length} tokens", lines))
    if panels:
        ylabel = f"times better than stock, {result['chip']}"
        draw(panels, path, ylabel, xlabel="requests at a time")

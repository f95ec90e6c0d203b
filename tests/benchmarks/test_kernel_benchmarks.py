# SPDX-License-Identifier: Apache-2.0
"""The kernels' benchmarks: dry runs in Triton's interpreter, rows as the stored results
have them, the runner's behaviour where something fails."""

import importlib
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.kernels import benchmark_int8_moe, runner
from benchmarks.kernels.runner import Benchmark, Case, Timed
from benchmarks.plots import Line, Panel, draw
from tests.kernels.utils import GPU, interpreted

pytestmark = pytest.mark.needs_group("kernels")

RESULTS = runner.ROOT / "benchmarks/results"
NAMES = ("int8_linear", "int8_moe", "router", "step3p5_attention")
STORED = sorted(path for path in RESULTS.glob("*/*.json") if path.stem in NAMES)
# On a GPU the figures themselves are what is run.
dry_run = pytest.mark.skipif(GPU, reason="a dry run is for machines without a GPU")


def module(name: str) -> Any:
    return importlib.import_module(f"benchmarks.kernels.benchmark_{name}")


def run(name: str, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--interpret", *options])
    module(name).main()


def fail(*_: Any) -> Any:
    raise RuntimeError("not built here")


@interpreted
@dry_run
@pytest.mark.parametrize("name", NAMES)
def test_a_dry_run_has_the_figures_of_the_stored_results(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--out", str(tmp_path), "--tokens", "2"]
    options += ["--routing", "zipf"] if name == "int8_moe" else []
    run(name, monkeypatch, *options)
    found = json.loads((tmp_path / f"interpreter/{name}.json").read_text())
    stored = json.loads((RESULTS / f"NVIDIA_H200/{name}.json").read_text())
    assert list(found) == list(stored)
    assert [list(row) for row in found["rows"]] == [list(stored["rows"][0])]
    # Ours is measured; no limit is known without a GPU.
    [row] = found["rows"]
    assert all(row[figure] > 0 for figure in module(name).BENCHMARK.ours)
    assert row.get("limit_us") is None


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.parent.name + path.stem)
def test_stored_results_are_drawn_with_all_their_figures(
    path: Path, tmp_path: Path
) -> None:
    result = json.loads(path.read_text())
    benchmark = module(path.stem).BENCHMARK
    panels = benchmark.panels(result["rows"])
    drawn = sum(len(line.points) for panel in panels for line in panel.lines)
    figures = [
        value
        for row in result["rows"]
        for name, value in row.items()
        if name.endswith("_us") and name != "limit_us" and row.get("routing") != "zipf"
    ]
    # A point of int8_linear is one figure over another.
    points = len(list(filter(None, figures))) / (2 if path.stem == "int8_linear" else 1)
    assert drawn == points
    benchmark.plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@interpreted
@dry_run
def test_a_sweep_of_ours_prints_a_line_of_the_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it prints is code for tiles that were measured against the table's."""
    tried: list[Any] = []
    speed = benchmark_int8_moe.Climb.speed

    def seen(climb: Any, tiles: Any) -> float:
        tried.append(tiles)
        return speed(climb, tiles)

    monkeypatch.setattr(benchmark_int8_moe.Climb, "speed", seen)
    options = ["--sweep", "ours", "--rounds", "1", "--tokens", "9"]
    run("int8_moe", monkeypatch, *options, "--shape", "4", "32", "32", "2")
    lines = capsys.readouterr().out.splitlines()
    [line] = [line for line in lines if line.startswith("    (4.5, ")]
    chosen = benchmark_int8_moe.fork().choose(
        benchmark_int8_moe.Shape(4, 32, 32, 2, ""), 9
    )
    kinds = {type(one).__name__: type(one) for one in [chosen, *vars(chosen).values()]}
    [(per_expert, found)] = eval(line, kinds)
    assert per_expert == 9 * 2 / 4 and found in [chosen, *tried]
    assert len(tried) > 1


def test_tiles_are_written_as_code_and_have_neighbours() -> None:
    for tiles in benchmark_int8_moe.fork().tables:
        parts = [tiles, *vars(tiles).values()]
        kinds = {type(one).__name__: type(one) for one in parts}
        assert eval(benchmark_int8_moe.written(tiles), kinds) == tiles
        around = list(benchmark_int8_moe.neighbours(tiles))
        assert len(set(around)) == len(around) > 10 and tiles not in around
        # Where one lies beside another, so does the other beside it, but at the edge.
        for other in around:
            assert type(other) is type(tiles)


def test_wrong_tiles_have_no_speed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Faster, but with another result; or with none."""

    def run_tiles(tiles: Any, layer: Any, batch: Any) -> Any:
        if tiles == "broken":
            raise RuntimeError("out of resource")
        return batch.x * {"table": 1, "right": 1, "wrong": 1.5}[tiles]

    fork = benchmark_int8_moe.Fork(run_tiles, lambda *_: "table", [])
    monkeypatch.setattr(benchmark_int8_moe, "fork", lambda: fork)
    climb = benchmark_int8_moe.Climb(benchmark_int8_moe.TINY, 3, "random")
    assert climb.speed("right") > 0
    assert climb.speed("wrong") == 0 and "wrong by 50%" in capsys.readouterr().out
    assert climb.speed("broken") == 0


# The runner.


FP8_SHAPE = benchmark_int8_moe.Shape(5, 160, 256, 2, "odd widths for blocks of 128")


def fp8_product(call: Any) -> torch.Tensor:
    """What DeepGEMM should make of a call's tensors, in float64."""
    (x, x_scale), (w, w_scale), _, m_indices = call
    n, k = w.shape[1:]
    wide = w_scale.double().repeat_interleave(128, 1).repeat_interleave(128, 2)
    weights = (w.double() * wide[:, :n, :k])[m_indices.long()]
    inputs = x.double() * x_scale.double().repeat_interleave(128, 1)[:, :k]
    return torch.einsum("mk,mnk->mn", inputs, weights)


def deep_gemm_call(product: Any = None) -> list[Any]:
    """The arguments of the two products of 37 tokens, in order; with the given one."""
    deep_gemm = benchmark_int8_moe.DeepGemm(FP8_SHAPE)
    calls, product = [], product or deep_gemm.product

    def record(*call: Any) -> None:
        product(*call)
        calls.append(call)

    deep_gemm.product = record
    batch = benchmark_int8_moe.make_batch(FP8_SHAPE, 37, "zipf")
    deep_gemm(batch, FP8_SHAPE.num_experts)()
    counts = batch.topk_ids.flatten().bincount(minlength=FP8_SHAPE.num_experts)
    return [counts, *calls]


def test_deep_gemm_gets_rows_for_every_pair_in_blocks_of_one_expert(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    aligned = "vllm.utils.deep_gemm.get_mk_alignment_for_contiguous_layout"
    monkeypatch.setattr(aligned, lambda: [128, 128])
    counts, w13, w2 = deep_gemm_call(lambda *_: None)
    for (x, x_scale), (w, w_scale), out, m_indices in (w13, w2):
        filled = m_indices.bincount(minlength=len(counts))
        assert (
            (filled % 128 == 0) & (filled >= counts) & (filled < counts + 128)
        ).all()
        assert (m_indices.view(-1, 128) == m_indices[::128, None]).all()
        assert (x.shape, out.shape) == (
            (len(m_indices), w.shape[2]),
            (len(x), w.shape[1]),
        )
        assert x_scale.stride() == (1, len(x)) and m_indices.dtype == torch.int32
        assert w_scale.shape == (5, -(-w.shape[1] // 128), -(-w.shape[2] // 128))
        for tensor in (x, w):  # random, both signs, no NaN
            assert (
                tensor.float().isfinite().all() and len(tensor.float().unique()) > 100
            )
    assert (w13[1][0].shape, w2[1][0].shape) == ((5, 320, 256), (5, 256, 160))


@pytest.mark.gpu
def test_deep_gemm_multiplies_what_it_is_given() -> None:
    try:
        _, *calls = deep_gemm_call()
    except RuntimeError as error:
        pytest.skip(f"no DeepGEMM for this GPU in this vLLM: {error}")
    for call in calls:
        expected = fp8_product(call)
        assert (call[2] - expected).norm() < 0.01 * expected.norm()


def test_a_label_has_one_color(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a panel that lacks a line before it, too."""
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="needs matplotlib")
    closed: list[Any] = []
    monkeypatch.setattr(pyplot, "close", closed.append)
    points = [(1.0, 2.0), (2.0, 3.0)]
    whole = Panel("", [Line(name, points) for name in ("ours", "a peer", "another")])
    lacks = Panel(
        "", [Line("ours", points), Line("a peer", []), Line("another", points)]
    )
    draw([lacks, whole], tmp_path / "plot.png", "us")
    colors: dict[str, set[str]] = {}
    for axis in closed[0].axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            colors.setdefault(label, set()).add(handle.get_color())
    assert [len(found) for found in colors.values()] == [1, 1, 1]
    assert len(set.union(*colors.values())) == 3


def no_panels(_: list[dict[str, Any]]) -> list[Panel]:
    return [Panel("", [])]


def test_baselines_that_fail_are_null_and_cases_that_fail_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = Benchmark("made", {"ours_us": "stock_us"}, no_panels, "us")

    def prepare(ours: Any) -> Timed:
        return Timed({"stock_us": [fail], "other_us": None, "ours_us": [ours]})

    works = partial(sum, [1])
    cases = [
        Case({"m": m}, partial(prepare, of))
        for m, of in ((1, works), (2, fail), (3, works))
    ]
    with pytest.raises(SystemExit, match="1 cases failed: 2"):
        benchmark.measure(cases, tmp_path, versions={})
    result = json.loads((tmp_path / runner.chip() / "made.json").read_text())
    assert list(result) == ["chip", "date", "versions", "rows"]
    assert [row["m"] for row in result["rows"]] == [1, 3]
    for row in result["rows"]:
        assert row["stock_us"] is None and row["other_us"] is None
        assert row["ours_us"] > 0
    said = capsys.readouterr().out
    assert said.count("stock_us: not to be had here: RuntimeError: not built") == 1
    assert "2: left out: RuntimeError: not built here" in said


def test_times_are_medians_of_turns() -> None:
    took: list[str] = []
    times = {"a": iter([5.0, 1.0, 9.0, 7.0, 2.0]), "b": iter([3.0, 2.0, 1.0, 4.0, 5.0])}

    def one(name: str) -> float:
        took.append(name)
        return next(times[name])

    replays = {name: partial(one, name) for name in times}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "is_interpreted", lambda: False)
        assert runner.take_turns(replays, repeat=5) == {"a": 5.0, "b": 3.0}
    assert took == ["a", "b"] * 5


@dry_run
def test_without_a_gpu_it_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setattr(sys, "argv", [name])
        with pytest.raises(SystemExit, match="no GPU.*--interpret"):
            module(name).main()


def test_edits_that_are_not_built_are_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    installed = Path(importlib.import_module("vllm").__file__ or "").parent
    name = "model_executor/kernels/int8_triton.py"
    copy = tmp_path / "vllm" / name
    copy.parent.mkdir(parents=True)
    copy.write_bytes((installed / name).read_bytes())
    (copy.parent / "of_a_group_that_is_not_in.py").touch()
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    runner.warn_of_edits()
    assert capsys.readouterr().out == ""
    copy.write_bytes(copy.read_bytes() + b"# edited\n")
    runner.warn_of_edits()
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and f"vllm/{name}" in said and "make install" in said

# SPDX-License-Identifier: Apache-2.0
"""The benchmark of serving: its checkpoint, rows, bars, kinds of kernels, processes."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open

from benchmarks import benchmark_serving_int8 as benchmark
from benchmarks.serving import checkpoint, processes, report
from benchmarks.serving.checkpoint import Widths, write_checkpoint
from benchmarks.serving.errors import BenchmarkError
from benchmarks.serving.kernel_kinds import HEAD, OTHER, kind, summarize
from benchmarks.serving.processes import Build
from tests.sessions import ServerError

ROOT = Path(__file__).resolve().parents[2]
WIDTHS = Widths(
    layers=3,
    hidden=128,
    vocab=512,
    dense_width=192,
    experts=8,
    top_k=2,
    expert_width=64,
    heads=4,
    sliding_heads=6,
    kv_heads=2,
    head_dim=32,
    sliding_window=16,
)
SHARD_BYTES = 100_000


def tensors(folder: Path) -> Iterator[tuple[str, str, torch.Tensor]]:
    """File, name and value of each tensor that is stored."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                yield file.name, name, opened.get_tensor(name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serving") / "checkpoint"
    write_checkpoint(folder, WIDTHS, SHARD_BYTES)
    return folder


# The checkpoint.


def test_shards_and_index_are_complete(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found = {name: (file, tensor) for file, name, tensor in tensors(folder)}
    assert {name: file for name, (file, _) in found.items()} == index["weight_map"]
    sizes: dict[str, list[int]] = {}
    for file, tensor in found.values():
        sizes.setdefault(file, []).append(tensor.nbytes)
    assert len(sizes) > 2
    assert all(sum(s) <= SHARD_BYTES or len(s) == 1 for s in sizes.values())
    assert index["metadata"]["total_size"] == sum(map(sum, sizes.values()))
    for spec in checkpoint.specs(WIDTHS):
        tensor = found.pop(spec.name)[1]
        assert (tuple(tensor.shape), tensor.dtype) == (spec.shape, spec.dtype)
    assert not found


def test_int8_has_the_whole_range_and_no_zeros(folder: Path) -> None:
    values = [t.flatten() for _, _, t in tensors(folder) if t.dtype == torch.int8]
    counts = torch.cat(values).long().add(127).bincount(minlength=255)
    assert counts[127] == 0  # zero
    counts = torch.cat([counts[:127], counts[128:]]).double()
    assert len(counts) == 254
    # Six deviations of a count of a fair draw.
    mean = counts.mean()
    assert ((counts - mean).abs() < 6 * mean.sqrt()).all()


def test_weights_keep_activations_in_range(folder: Path) -> None:
    found = {name: tensor.double() for _, name, tensor in tensors(folder)}
    for name, weight in found.items():
        scale = found.get(f"{name}_scale")
        if scale is not None:
            assert (scale > 0).all()
            weight = weight * scale[..., None]
        if name.endswith("_proj.weight"):
            deviation = weight.square().mean().sqrt()
            assert deviation * weight.shape[-1] ** 0.5 == pytest.approx(1, rel=0.15)
        assert (weight != 0).any()


def test_quark_check_says_that_the_fork_reads_it_right(folder: Path) -> None:
    command = ROOT / "vllm/model_executor/layers/quantization/quark/quark_check"
    done = subprocess.run(
        [sys.executable, command, folder, "--json"], capture_output=True, text=True
    )
    said = {v["vllm"]: v["outcome"] for v in json.loads(done.stdout)["verdicts"]}
    assert said["this fork, GPU"] == said["this fork, CPU"] == "right"
    assert said["0.20.0-0.21.0"] == "garbage"  # as of the real export


def test_checkpoint_is_used_again(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "checkpoint"
    shutil.copytree(folder, copy)
    before = {file: file.stat().st_mtime_ns for file in copy.iterdir()}
    write_checkpoint(copy, WIDTHS, SHARD_BYTES)
    assert {file: file.stat().st_mtime_ns for file in copy.iterdir()} == before
    write_checkpoint(copy, Widths(**{**vars(WIDTHS), "layers": 2}))
    assert json.loads((copy / "config.json").read_text())["num_hidden_layers"] == 2
    assert len(list(copy.glob("*.safetensors"))) == 1  # none of the old ones


def test_too_little_disk_is_told_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=5 << 30)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(checkpoint, "save_file", lambda *_: pytest.fail("it writes"))
    with pytest.raises(BenchmarkError, match=r"needs 2\d\.\d GiB.* found 5\.0 GiB"):
        write_checkpoint(tmp_path / "checkpoint", Widths())
    assert not list(tmp_path.iterdir())


def test_interrupted_writing_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file = checkpoint.save_file

    def interrupt(tensors: Any, file: Path, **options: Any) -> None:
        if file.name.startswith("model-00002"):
            raise KeyboardInterrupt
        save_file(tensors, file, **options)

    monkeypatch.setattr(checkpoint, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path / "checkpoint", WIDTHS, SHARD_BYTES)
    monkeypatch.undo()
    write_checkpoint(tmp_path / "checkpoint", WIDTHS, SHARD_BYTES)
    index = json.loads(
        (tmp_path / "checkpoint/model.safetensors.index.json").read_text()
    )
    written = {name: file for file, name, _ in tensors(tmp_path / "checkpoint")}
    assert written == index["weight_map"]


def test_tokens_stay_as_many_through_text(folder: Path, rng: torch.Generator) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == WIDTHS.vocab
    tokens = torch.randint(WIDTHS.vocab, (200,), generator=rng).tolist()
    text = tokenizer.decode(tokens)
    assert tokenizer.encode(text) == tokens
    # vLLM's bound of a prompt's characters.
    longest = max(map(len, tokenizer.get_vocab()))
    assert len(" ".join(["fffff"] * 8192)) <= longest * 8192


# Rows and bars.


def make_results(tmp_path: Path, layers: int = 3) -> report.Results:
    about = {"chip": "chip", "layers": layers}
    return report.Results(tmp_path / "results.json", tmp_path / "profile.json", about)


def row(metric: str, stock: float, fork: float, *place: int) -> report.Row:
    return report.make_row(metric, {"stock": [stock], "fork": [fork]}, *place)


def test_row_has_medians_and_runs() -> None:
    made = report.make_row(
        report.TPOT, {"stock": [3.0, 1.0, 9.0], "fork": [1.0, 2.0]}, 8, 128
    )
    assert made == {
        "metric": report.TPOT,
        "batch": 8,
        "prompt_tokens": 128,
        "stock": 3.0,
        "fork": 1.5,
        "better": "lower",
        "runs": {"stock": [3.0, 1.0, 9.0], "fork": [1.0, 2.0]},
    }


def test_merge_replaces_rows_of_the_same_key(tmp_path: Path) -> None:
    old = [row(report.TPOT, 1, 1, 1, 128), row(report.TTFT, 2, 2, 1, 128)]
    new = [row(report.TTFT, 5, 4, 1, 128), row(report.TTFT, 6, 6, 8, 128)]
    key = ("metric", "batch", "prompt_tokens")
    assert report.merge(old, new, key) == [old[0], new[0], new[1]]
    # A part that adds to the same file keeps what another has found.
    results = make_results(tmp_path)
    results.add(rows=old)
    again = make_results(tmp_path)
    again.add(rows=new)
    assert again.result["rows"] == [new[0], new[1], old[0]]
    assert json.loads(again.path.read_text()) == again.result


def test_ratio_is_above_one_where_the_fork_wins() -> None:
    assert report.ratio(row(report.TPOT, 3, 2, 1, 128)) == 1.5
    assert report.ratio(row(report.TOTAL_RATE, 2, 3, 1, 128)) == 1.5


def verdict(rows: list[report.Row], bar: str) -> str:
    [line] = [line for line in report.verdicts(rows) if bar in line]
    return line


@pytest.mark.parametrize(
    "bar, rows, said",
    [
        ("batch 1", [row(report.TPOT, 1.10, 1, 1, 128)], "met"),
        ("batch 1", [row(report.TPOT, 1.09, 1, 1, 128)], "missed"),
        ("batch 1", [row(report.TPOT, 1, 2, 8, 128)], "not measured"),
        ("8192-token", [row(report.THROUGHPUT, 2, 3, 64, 8192)], "met"),
        ("8192-token", [row(report.THROUGHPUT, 2, 2.9, 64, 8192)], "missed"),
        ("8192-token", [row(report.THROUGHPUT, 2, 2.9, 64, 128)], "not measured"),
        # Of serving, the largest batch alone.
        (
            "8192-token",
            [row(report.TOTAL_RATE, 2, n, b, 8192) for b, n in ((1, 2), (64, 3))],
            "met",
        ),
        ("8192-token", [row(report.TOTAL_RATE, 2, 3, 1, 8192)], "not measured"),
        ("no speed worse", [row(report.TTFT, 98, 100, 1, 128)], "met"),
        ("no speed worse", [row(report.TTFT, 97, 100, 1, 128)], "missed"),
        ("no speed worse", [row(report.ENGINE_START, 1, 2)], "not measured"),
        ("loading", [row(report.WEIGHTS_LOADING, 1, 1)], "met"),
        ("loading", [row(report.ENGINE_START, 1, 1.02)], "missed"),
        ("memory", [row(report.PEAK_MEMORY, 20, 20.01)], "met"),
        ("memory", [row(report.MODEL_MEMORY, 20, 21)], "missed"),
    ],
)
def test_bars(bar: str, rows: list[report.Row], said: str) -> None:
    assert verdict(rows, bar).startswith(f"{said}: ")


def test_missed_bar_names_the_worst_row() -> None:
    rows = [row(report.TTFT, 1, 2, 8, 128), row(report.TTFT, 1, 4, 64, 2048)]
    assert "0.25x, time to first token (ms), 64 x 2048" in verdict(rows, "no speed")


def start(build: str, seconds: float, peak: float | None) -> dict[str, Any]:
    return {
        "build": build,
        "weights_s": seconds / 4,
        "start_s": seconds,
        "model_gib": 24.0,
        "peak_gib": peak,
    }


def test_loading_rows() -> None:
    starts = [start("stock", 80, 40), start("fork", 60, 30)]
    rows = {r["metric"]: (r["stock"], r["fork"]) for r in report.loading_rows(starts)}
    assert rows == {
        report.WEIGHTS_LOADING: (20, 15),
        report.ENGINE_START: (80, 60),
        report.MODEL_MEMORY: (24, 24),
        report.PEAK_MEMORY: (40, 30),
    }
    assert not report.loading_rows(starts[:1])  # nothing to compare with
    # Without a GPU no peak is known.
    on_a_cpu = report.loading_rows([start("stock", 80, None), start("fork", 60, None)])
    assert report.PEAK_MEMORY not in {row["metric"] for row in on_a_cpu}


def test_results_of_another_model_are_not_mixed(tmp_path: Path) -> None:
    make_results(tmp_path, layers=6).add()
    assert make_results(tmp_path, layers=6).result["rows"] == []
    with pytest.raises(BenchmarkError, match="expected results of 5 layers, found 6"):
        make_results(tmp_path, layers=5)


def test_tables_of_a_profile() -> None:
    kinds = {"attention": {"us": 5.0, "share": 0.5}}
    summary = {"kinds": kinds, "gpu_us": 10.0, "wall_us": 12.0}
    gauged = {**summary, "clock_mhz": 1980.0, "power_w": 700.0}
    for found, has_clock in ((summary, False), (gauged, True)):
        builds = {build: {"prefill 8192": found} for build in report.BUILDS}
        text = report.profile_markdown({"builds": builds})
        assert "| attention | 5.0 | 50% | 5.0 | 50% |" in text
        assert "| wall clock | 12.0 |  | 12.0 |  |" in text
        assert ("| clock, MHz | 1,980.0 |  | 1,980.0 |  |" in text) == has_clock


def test_tables_and_plot(tmp_path: Path) -> None:
    rows = [
        row(report.TPOT, 3, 2, 1, 128),
        row(report.TOTAL_RATE, 1000, 1500, 1, 128),
        row(report.ENGINE_START, 30, 20),
    ]
    result = {"chip": "A_chip", "date": "2026-11-23", "layers": 6, "rows": rows}
    text = report.markdown(result)
    assert "| 128 | 1 |  | 3, 2, 1.50x | 1,000, 1,500, 1.50x |" in text
    assert "| engine start (s) | 30 | 20 | 1.50x |" in text
    assert "- met: time per output token, batch 1" in text
    report.plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


# Kinds of kernels.


def test_all_kernels_of_the_fork_are_known() -> None:
    """In whatever module; those of the experts are of the INT8 MoE."""
    found: dict[str, set[str]] = {}
    for file in (ROOT / "vllm").rglob("*.py"):
        jitted = r"^@(?:triton|gluon)\.jit.*\ndef (\w+_kernel)\("
        for name in re.findall(jitted, file.read_text(), re.M):
            found.setdefault(kind(name, in_head=False), set()).add(name)
    assert OTHER not in found
    assert len(found["INT8 MoE"]) > 8
    assert found["INT8 MoE"] >= benchmark.FORKS
    assert "router_kernel" in found["other linear layers"]


@pytest.mark.parametrize(
    "name, expected",
    [
        ("fused_moe_kernel", "INT8 MoE"),
        ("_per_token_quant_int8", "INT8 MoE"),
        ("void vllm::moe::moe_align_block_size_kernel<int>(int*)", "INT8 MoE"),
        ("void vllm::act_and_mul_kernel<c10::BFloat16, &silu>", "INT8 MoE"),
        ("void vllm::moe::topkGating<8, 288>(float*)", "MoE routing"),
        ("void cutlass::device_kernel<flash::FlashAttnFwdSm90<...>>", "attention"),
        ("void vllm::reshape_and_cache_flash_kernel<...>", "attention"),
        ("void cutlass::Kernel2<cutlass_3x_gemm_int8<...>>", "other linear layers"),
        ("void vllm::dynamic_scaled_int8_quant_kernel<...>", "other linear layers"),
        ("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", "other linear layers"),
        ("triton_red_fused_unified_attention_with_kv_cache_0", "norms and elementwise"),
        ("void at::native::vectorized_elementwise_kernel<4>", "norms and elementwise"),
        ("Memcpy DtoD (Device -> Device)", "norms and elementwise"),
        ("void at::native::cunn_SoftMaxForward<...>", HEAD),
        ("something_else", "other"),
    ],
)
def test_kinds(name: str, expected: str) -> None:
    assert kind(name, in_head=False) == expected
    assert kind(name, in_head=True) == HEAD


def test_summary_of_a_trace() -> None:
    def event(cat: str, name: str, ts: float, dur: float, number: int = 0) -> dict:
        correlation = {"correlation": number} if number else {}
        # A thread of the CPU's; the number is a stream on the device.
        at = {"ts": ts, "dur": dur, "tid": 7, "args": correlation}
        return {"ph": "X", "cat": cat, "name": name, **at}

    trace = {
        "traceEvents": [
            {"ph": "M", "name": "process_name"},
            event("user_annotation", "gpu_model_runner: postprocess", 100, 20),
            event("cuda_runtime", "cudaGraphLaunch", 50, 5, 1),
            event("cuda_runtime", "cudaLaunchKernel", 110, 5, 2),
            event("kernel", "w13_kernel", 105, 6, 1),  # launched before, runs meanwhile
            event("kernel", "w13_kernel", 111, 4, 1),
            event("kernel", "nvjet_x", 300, 10, 2),
            # Begins early and waits, or runs beside a longer one.
            event("kernel", "moeTopK<256, int>", 302, 12, 4),
            event("kernel", "moeSigmoid", 303, 4, 5),
            event("gpu_memcpy", "Memcpy DtoH", 400, 20, 3),
        ]
    }
    found = summarize(trace, steps=2)
    assert found["gpu_us"] == 22
    times = {name: k["us"] for name, k in found["kinds"].items() if k["us"]}
    assert times == {
        "INT8 MoE": 5,
        "MoE routing": 2,
        HEAD: 5,
        "norms and elementwise": 10,
    }
    assert found["kinds"][HEAD]["share"] == round(10 / 44, 4)
    assert found["kernels"][0]["name"] == "Memcpy DtoH"
    assert found["kernels"][1]["calls"] + found["kernels"][2]["calls"] == 1.5


def test_trace_without_kernels_is_an_error() -> None:
    with pytest.raises(ValueError, match="no kernel"):
        summarize({"traceEvents": []}, steps=1)


@pytest.mark.parametrize(
    "stock, fork, problem",
    [
        ("fused_moe_kernel", "w13_few_kernel", None),
        ("fused_moe_kernel", "fused_moe_kernel", "fork"),
        ("fused_moe_kernel", "w13_kernel fused_moe_kernel", "fork"),
        ("fused_moe_kernel", "other_kernel", "fork"),
        ("w13_kernel", "w13_kernel", "stock"),
        ("fused_moe_kernel w13_few_kernel", "w13_kernel", "stock"),
    ],
)
def test_builds_are_told_by_their_kernels(
    stock: str, fork: str, problem: str | None, tmp_path: Path
) -> None:
    builds = []
    for name, kernels in (("stock", stock), ("fork", fork), ("before", "w13_kernel")):
        builds.append(Build(name, None, tmp_path / name))
        (tmp_path / name / "triton/hash").mkdir(parents=True)
        for kernel in kernels.split():
            (tmp_path / name / f"triton/hash/{kernel}.json").touch()
    if problem is None:
        benchmark.check_kernels(builds)
        return
    with pytest.raises(BenchmarkError, match=f"^{problem}: expected one of"):
        benchmark.check_kernels(builds)


@pytest.mark.parametrize("before", [False, True])
def test_profile_of_a_build_before(
    before: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other, each in the results by its name."""
    running: list[str] = []

    @contextmanager
    def engine(_: Any, build: Build, *__: Any) -> Iterator[Any]:
        assert not running, "two engines share the GPU"
        running.append(build.name)
        said = {"phase": build.name, "torch_gib": (2.0, 1.0)}
        yield SimpleNamespace(ask=lambda **_: said)
        running.clear()

    monkeypatch.setattr(benchmark, "engine_job", engine)
    monkeypatch.setattr(benchmark, "summary", dict)
    monkeypatch.setattr(benchmark.torch.cuda, "is_available", lambda: True)
    names = ["stock", "before", "fork"] if before else ["stock", "fork"]
    builds = {name: Build(name, None, tmp_path) for name in names}
    settings = benchmark.Settings(
        builds={"stock": builds["stock"], "fork": builds["fork"]},
        work=tmp_path,
        out=tmp_path,
        widths=Widths(),
        before=builds.get("before"),
    )
    results = report.Results(
        tmp_path / "rows.json", tmp_path / "profile.json", {"layers": 6}
    )
    benchmark.measure_profile(settings, results)
    found = json.loads((tmp_path / "profile.json").read_text())
    assert list(found["builds"]) == list(found["memory"]) == names
    assert all(list(found["builds"][name]) == [name] for name in names)


# Processes, with a vLLM that does nothing but start.

SERVER = """
    import http.server, os, subprocess, sys, time
    from pathlib import Path

    child = subprocess.Popen(["sleep", "60"])
    print("pids", os.getpid(), child.pid, flush=True)
    print("Model loading took 2.5 GiB memory and 1.25 seconds", flush=True)
    if Path(__file__).parts[-5] == "dies":
        print("this is why", flush=True)
        sys.exit(3)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()

    port = int(sys.argv[sys.argv.index("--port") + 1])
    http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
BENCH = """
    import time

    asked = []

    def add_cli_args(parser):
        for name in ("base-url", "model", "dataset-name", "temperature"):
            parser.add_argument(f"--{name}")
        for name in ("num-prompts", "max-concurrency"):
            parser.add_argument(f"--{name}", type=int)
        for name in ("random-input-len", "random-output-len"):
            parser.add_argument(f"--{name}", type=int)
        for name in ("disable-tqdm", "ignore-eos"):
            parser.add_argument(f"--{name}", action="store_true")

    def get_tokenizer(model):
        return None

    def get_samples(args, tokenizer):
        return None

    def main(args):
        asked.append(args.base_url)
        if "client_dies" in __file__:
            raise RuntimeError("the client's own error")
        if "waits" in __file__ and len(asked) > 14:  # those of the first cell
            time.sleep(60)
        number = float(len(asked))
        return {
            "completed": args.num_prompts,
            "median_ttft_ms": number,
            "median_tpot_ms": number,
            "output_throughput": number,
            "total_token_throughput": number,
        }
"""

LLM = """
    class LLM:
        made = 0

        @classmethod
        def from_engine_args(cls, engine_args):
            print("Model loading took 2.5 GiB memory and 1.25 seconds", flush=True)
            cls.made += 1
            return cls()

        def __init__(self):
            self.llm_engine = Engine()
            self.model_config = Model()

    class Model:
        def get_vocab_size(self):
            return 9

    class Engine:
        def __init__(self):
            self.left = {}

        def add_request(self, name, prompt, params):
            self.left[name] = params["max_tokens"]

        def has_unfinished_requests(self):
            return bool(self.left)

        def abort_request(self, names):
            assert self.left.keys() == set(names), "requests ended before the trace did"
            self.left = {}

        def step(self):
            assert self.left, "a step of nothing"
            outputs = [Output(name) for name in self.left]
            self.left = {n: most - 1 for n, most in self.left.items() if most > 1}
            return outputs

    class Output:
        def __init__(self, name):
            self.request_id = name

    class EngineArgs:
        @staticmethod
        def add_cli_args(parser):
            parser.add_argument("--model")

        from_cli_args = staticmethod(lambda args: args)

    SamplingParams = dict
"""
# Latencies count all calls, rates tell the prompts and how many engines there are.
LATENCY = """
    import json
    from pathlib import Path
    from vllm import LLM

    def add_cli_args(parser):
        parser.add_argument("--output-json")
        parser.add_argument("--num-iters", type=int)
        parser.add_argument("--num-prompts", type=int)
        for name in ("model", "max-model-len", "max-num-seqs", "dataset-name"):
            parser.add_argument(f"--{name}")
        for name in ("max-num-batched-tokens", "kv-cache-memory-bytes"):
            parser.add_argument(f"--{name}")
        for name in ("gpu-memory-utilization", "batch-size", "num-iters-warmup"):
            parser.add_argument(f"--{name}")
        for name in ("input-len", "output-len", "random-input-len"):
            parser.add_argument(f"--{name}")
        parser.add_argument("--random-output-len")
        parser.add_argument("--no-enable-prefix-caching", action="store_true")

    def main(args):
        LLM.from_engine_args(args)
        if "job_dies" in __file__:
            raise RuntimeError("the engine's own error")
        if args.num_prompts:
            found = {"tokens_per_second": args.num_prompts + LLM.made / 10}
        else:
            calls = Path(args.output_json).with_name("calls")
            with calls.open("a") as file:
                file.write(".")
            found = {"latencies": [calls.stat().st_size] * args.num_iters}
        Path(args.output_json).write_text(json.dumps(found))
"""
PARSER = "from argparse import ArgumentParser as FlexibleArgumentParser\n"


def make_vllm(folder: Path) -> Path:
    """A package that passes for vLLM; what its folder is called tells when it dies."""
    for name, text in (
        ("__init__", LLM),
        ("entrypoints/__init__", ""),
        ("entrypoints/cli/__init__", ""),
        ("entrypoints/cli/main", SERVER),
        ("benchmarks/__init__", ""),
        ("benchmarks/serve", BENCH),
        ("benchmarks/latency", LATENCY),
        ("benchmarks/throughput", "from vllm.benchmarks.latency import *"),
        ("utils/__init__", ""),
        ("utils/argparse_utils", PARSER),
    ):
        file = folder / f"vllm/{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text))
    return folder


def make_settings(
    tmp_path: Path, stock: str = "stock", fork: str = "fork"
) -> benchmark.Settings:
    folders = {"stock": make_vllm(tmp_path / stock), "fork": make_vllm(tmp_path / fork)}
    return benchmark.Settings(
        builds={n: Build(n, f, tmp_path / "cache" / n) for n, f in folders.items()},
        work=tmp_path,
        out=tmp_path / "out",
        widths=WIDTHS,
        batches=(1, 256),
        prompt_tokens=(128,),
    )


def alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def started_pids(tmp_path: Path) -> list[int]:
    logs = list((tmp_path / "jobs").glob("server-*.log"))
    lines = [re.search(r"^pids (\d+) (\d+)", log.read_text(), re.M) for log in logs]
    return [int(pid) for line in lines if line for pid in line.groups()]


def eventually(holds: Callable[[], bool], seconds: float = 15) -> bool:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.05)
    return holds()


def none_is_left(tmp_path: Path, started: int) -> bool:
    pids = started_pids(tmp_path)
    assert len(pids) == started
    return eventually(lambda: not any(map(alive, pids)), 5)


def test_serving_asks_both_builds_in_turns(tmp_path: Path) -> None:
    results = make_results(tmp_path)
    benchmark.measure_serving(make_settings(tmp_path), results)
    # The fake's figures are the number of the run; of each cell the first two, one a
    # build, do not count.
    rows = {row["batch"]: row for row in results.result["rows"]}
    assert rows[1]["runs"] == {
        "stock": [3, 6, 7, 10, 11, 14],
        "fork": [4, 5, 8, 9, 12, 13],
    }
    assert rows[256]["runs"] == {"stock": [17, 20], "fork": [18, 19]}  # many tokens
    assert none_is_left(tmp_path, 4)


def test_only_the_fork_is_told_the_experts_kernel(tmp_path: Path) -> None:
    """Stock does not know it, and refuses what it does not know."""
    settings = replace(make_settings(tmp_path), fork_moe_backend="quark_int8")
    stock, fork = (
        benchmark.engine_args(settings, settings.builds[name])
        for name in ("stock", "fork")
    )
    assert fork == [*stock, "--moe-backend", "quark_int8"]


class Meanwhile(report.Results):
    """Results that do something when rows of the first cell come."""

    def __init__(self, tmp_path: Path, work: Callable[[], object]) -> None:
        super().__init__(tmp_path / "results.json", tmp_path / "profile.json", {})
        self.work = work

    def add(
        self, rows: Sequence[report.Row] = (), starts: Sequence[report.Row] = ()
    ) -> None:
        if not self.result["rows"]:
            self.work()
        super().add(rows, starts)


def test_a_server_alone_has_ended_when_the_next_one_starts(tmp_path: Path) -> None:
    settings = dataclasses.replace(make_settings(tmp_path), alone=True)

    def look() -> None:  # rows are of both builds
        assert [alive(pid) for pid in started_pids(tmp_path)].count(True) == 2

    results = Meanwhile(tmp_path, look)
    benchmark.measure_serving(settings, results)
    rows = {row["batch"]: row for row in results.result["rows"]}
    # Of each cell the first run of a build does not count.
    assert rows[1]["runs"] == dict.fromkeys(report.BUILDS, [2, 3, 4, 5, 6, 7])
    assert rows[256]["runs"] == dict.fromkeys(report.BUILDS, [9, 10])
    # Where the fork's half is cut off, stock's is not lost: both warm-ups, all runs.
    assert (tmp_path / "jobs/serve-stock.jsonl").read_text().count("\n") == 2 + 8
    assert none_is_left(tmp_path, 4)


def test_engines_are_asked_in_turns(tmp_path: Path) -> None:
    results = make_results(tmp_path)
    benchmark.measure_offline(make_settings(tmp_path), results)
    starts = results.result["starts"]
    assert [start["build"] for start in starts] == ["stock", "fork"]
    assert all(start["weights_s"] == 1.25 for start in starts)
    assert all(0 < start["start_s"] < 60 for start in starts)
    rows = {row["metric"]: row["runs"] for row in results.result["rows"]}
    # The first call of each, 1 and 2, does not count.
    turns = {"stock": (3, 6), "fork": (4, 5)}
    for build, numbers in turns.items():
        of_turns = [[float(number)] * benchmark.LATENCY_RUNS for number in numbers]
        assert rows[report.LATENCY][build] == sum(of_turns, [])
    rate = benchmark.THROUGHPUT["batch"] + 0.1  # one engine of each build
    for build in report.BUILDS:
        rates = rows[report.THROUGHPUT][build]
        assert rates == [rate] * 2 * benchmark.THROUGHPUT_RUNS


def test_profile_times_and_traces_each_phase(tmp_path: Path) -> None:
    build = make_settings(tmp_path).builds["fork"]
    settings: dict[str, Any] = {"model": "", "engine_args": []}
    with processes.job("profile", build, tmp_path, {}, **settings) as job:
        found = [job.ask(**phase) for phase in benchmark.PHASES]
    cells = [(1, 128), (1, 8192), (64, 128), (256, 128)]
    phases = [f"decode batch {batch} after {tokens}" for batch, tokens in cells]
    assert [one["phase"] for one in found] == [*phases, "prefill 8192"]
    assert [one["steps"] for one in found] == [10, 10, 10, 10, 1]
    for one in found:
        assert one["wall_us"] > 0 and json.loads(Path(one["trace"]).read_text())
        assert torch.cuda.is_available() == (one["clock_mhz"] is not None)


def test_engine_that_dies_ends_all_loudly(tmp_path: Path) -> None:
    settings = make_settings(tmp_path, fork="job_dies")
    said = r"the offline job of fork ended with status 1[\s\S]*own error"
    with pytest.raises(ServerError, match=said):
        benchmark.measure_offline(settings, make_results(tmp_path))


def test_server_that_dies_ends_all_loudly(tmp_path: Path) -> None:
    settings = make_settings(tmp_path, fork="dies")
    with pytest.raises(ServerError) as error:
        benchmark.measure_serving(settings, make_results(tmp_path))
    said = str(error.value)
    assert said.startswith("the server of fork ended with status 3")
    assert str(tmp_path / "jobs/server-fork.log") in said and "this is why" in said
    assert none_is_left(tmp_path, 4)  # the other server's too, and its children


def test_client_that_fails_ends_all_loudly(tmp_path: Path) -> None:
    settings = make_settings(tmp_path, fork="client_dies")
    with pytest.raises(ServerError, match=r"the serve job of fork[\s\S]*own error"):
        benchmark.measure_serving(settings, make_results(tmp_path))
    assert none_is_left(tmp_path, 4)


def test_server_that_dies_later_is_noticed(tmp_path: Path) -> None:
    settings = make_settings(tmp_path, fork="waits")
    results = Meanwhile(
        tmp_path, lambda: os.kill(started_pids(tmp_path)[0], signal.SIGKILL)
    )
    with pytest.raises(ServerError, match="the server of .* ended with status -9"):
        benchmark.measure_serving(settings, results)
    assert len(results.result["rows"]) == 4  # which were saved before
    assert json.loads(results.path.read_text()) == results.result
    assert none_is_left(tmp_path, 4)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_the_benchmark(number: signal.Signals, tmp_path: Path) -> None:
    """Run it as users do, and end it while the servers run."""
    (tmp_path / "checkpoint").mkdir()
    widths = Widths(layers=2)
    config = json.dumps(checkpoint.make_config(widths), indent=1) + "\n"
    (tmp_path / "checkpoint/config.json").write_text(config)
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "benchmarks.benchmark_serving_int8",
    ]
    # Its client waits for a server that never answers anything but /health.
    for name in ("stock", "fork"):
        make_vllm(tmp_path / name)
    wait = "import time\n\ndef get_tokenizer(model):\n    time.sleep(60)\n"
    (tmp_path / "fork/vllm/benchmarks/serve.py").write_text(wait)
    command += ["--stock", tmp_path / "stock", "--fork", tmp_path / "fork"]
    command += ["--work", tmp_path, "--out", tmp_path / "out", "--layers", "2"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert eventually(lambda: (tmp_path / "jobs/serve-fork.log").exists(), 60)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    if number == signal.SIGKILL:
        # The kernel ends the servers; what a server starts is its own to end.
        servers = started_pids(tmp_path)[::2]
        assert eventually(lambda: not any(map(alive, servers)))
        for pid in started_pids(tmp_path)[1::2]:
            os.kill(pid, signal.SIGKILL)
        return
    assert process.returncode == 1
    assert said.splitlines()[-1] == f"error: ended by {number.name}"
    assert none_is_left(tmp_path, 4)


def test_log_without_loading_is_an_error(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_text("INFO: nothing\n")
    with pytest.raises(BenchmarkError, match=f"{log}: expected a line"):
        processes.loading(log)
    log.write_text("(EngineCore pid=1) INFO Loading weights took 3.5 seconds\n")
    assert processes.loading(log) == (3.5, None)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "--stock FOLDER"),
        (["--stock", "/nowhere"], "expected a folder that holds vllm/"),
        (["--stock", "/nowhere", "--layers", "1"], "at least one has experts"),
        (["--stock", "/nowhere", "--alone"], "expected --parts serve"),
        (
            ["--stock", "/nowhere", "--before", "/nowhere", "--parts", "serve"],
            "expected --parts profile",
        ),
    ],
)
def test_arguments_are_checked(
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    with pytest.raises(SystemExit) as ended:
        benchmark.main()
    assert ended.value.code == 2 and said in capsys.readouterr().err

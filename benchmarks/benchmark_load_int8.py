# SPDX-License-Identifier: Apache-2.0
"""Peak memory and time of loading a 2 GB Quark INT8 export on a CPU.

    python benchmarks/benchmark_load_int8.py [RESULTS.json]

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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build/load"
RUNS = 9
SHARD_BYTES = 400 << 20
CHECKS = "vllm/model_executor/layers/quantization/quark/load_checks/loading.py"
MAX_COST = 0.03
# As many experts as Step-3.5-Flash has, of next to no size; the first layer is dense.
SMALL: dict[str, int] = dict(
    layers=5,
    hidden=64,
    vocab=512,
    dense_width=64,
    experts=288,
    expert_width=32,
    heads=4,
    sliding_heads=8,
    kv_heads=2,
    head_dim=16,
)

# Sizes of a Step-3.5-Flash layer, but for the number of experts.
HIDDEN, EXPERTS, WIDTH, VOCAB = 4096, 28, 1280, 4096
HEADS, GROUPS, HEAD = 64, 8, 128
LAYERS = 5  # the first is dense
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
FIXTURE = ROOT / "tests/fixtures/step3p5-tiny/int8-3key/config.json"


def make_config() -> dict[str, Any]:
    """config.json; the scheme is what amd-quark wrote for the test exports."""
    quark = json.loads(FIXTURE.read_text())["quantization_config"]
    bf16 = ["lm_head"]
    for layer in range(LAYERS):
        names = ["mlp"] if layer == 0 else ["share_expert"]
        bf16 += [f"model.layers.{layer}.{n}.{p}" for n in names for p in PROJECTIONS]
        bf16 += [] if layer == 0 else [f"model.layers.{layer}.moe.gate"]
    return {
        "architectures": ["Step3p5ForCausalLM"],
        "model_type": "step3p5",
        "torch_dtype": "bfloat16",
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "max_position_embeddings": 1024,
        "max_seq_len": 1024,
        "num_attention_heads": HEADS,
        "num_attention_groups": GROUPS,
        "head_dim": HEAD,
        "layer_types": ["full_attention"] * LAYERS,
        "rope_theta": [10000.0] * LAYERS,
        "intermediate_size": WIDTH,
        "use_moe": True,
        "moe_layers_enum": ",".join(map(str, range(1, LAYERS))),
        "moe_num_experts": EXPERTS,
        "moe_top_k": 8,
        "moe_intermediate_size": WIDTH,
        "share_expert_dim": WIDTH,
        "moe_router_activation": "sigmoid",
        "quantization_config": quark | {"exclude": bf16},
    }


def random_int8(*shape: int) -> Tensor:
    """From -128 to 127 without zeros."""
    tensor = torch.randint(-128, 127, shape, dtype=torch.int8)
    return torch.where(tensor < 0, tensor, tensor + 1)


def linear(name: str, *shape: int, int8: bool) -> Iterator[tuple[str, Tensor]]:
    if int8:
        yield f"{name}.weight", random_int8(*shape)
        yield f"{name}.weight_scale", torch.rand(shape[:-1]) / 1000 + 1e-4
    else:
        yield f"{name}.weight", torch.randn(shape).bfloat16() / 64


def mlp(name: str, *experts: int, int8: bool) -> Iterator[tuple[str, Tensor]]:
    for projection in PROJECTIONS:
        shape = (HIDDEN, WIDTH) if projection == "down_proj" else (WIDTH, HIDDEN)
        yield from linear(f"{name}.{projection}", *experts, *shape, int8=int8)


def tensors(stacked: bool) -> Iterator[tuple[str, Tensor]]:
    """One after the other, so that no more than a shard of them is in memory."""
    yield "model.embed_tokens.weight", torch.randn(VOCAB, HIDDEN).bfloat16()
    for index in range(LAYERS):
        layer = f"model.layers.{index}"
        query, key = HEADS * HEAD, GROUPS * HEAD
        for name, rows in (("q_proj", query), ("k_proj", key), ("v_proj", key)):
            yield from linear(f"{layer}.self_attn.{name}", rows, HIDDEN, int8=True)
        yield from linear(f"{layer}.self_attn.o_proj", HIDDEN, query, int8=True)
        for norm in ("self_attn.q_norm", "self_attn.k_norm"):
            yield f"{layer}.{norm}.weight", torch.zeros(HEAD, dtype=torch.bfloat16)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}.{norm}.weight", torch.zeros(HIDDEN, dtype=torch.bfloat16)
        if index == 0:
            yield from mlp(f"{layer}.mlp", int8=False)
            continue
        yield from mlp(f"{layer}.share_expert", int8=False)
        yield from linear(f"{layer}.moe.gate", EXPERTS, HIDDEN, int8=False)
        yield f"{layer}.moe.router_bias", torch.zeros(EXPERTS)
        if stacked:
            yield from mlp(f"{layer}.moe", EXPERTS, int8=True)
        else:
            for expert in range(EXPERTS):
                yield from mlp(f"{layer}.moe.experts.{expert}", int8=True)
    yield "model.norm.weight", torch.zeros(HIDDEN, dtype=torch.bfloat16)
    yield from linear("lm_head", VOCAB, HIDDEN, int8=False)


def write_export(folder: Path, stacked: bool) -> None:
    """Write the export unless it is there; the index last, as it makes it whole."""
    index_file = folder / "model.safetensors.index.json"
    if index_file.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(make_config(), indent=1))
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}

    def write() -> None:
        shards.append(list(held))
        save_file(held, folder / f"{len(shards)}.part", metadata={"format": "pt"})
        held.clear()

    size = total = 0
    for name, tensor in tensors(stacked):
        if held and size + tensor.nbytes > SHARD_BYTES:
            write()
            size = 0
        held[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    write()
    places: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        (folder / f"{number}.part").rename(folder / file)
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    index_file.write_text(json.dumps(index))


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
    tensors = (SMALL["layers"] - 1) * SMALL["experts"] * 3 * 2
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
        [sys.executable, __file__, what, folder],
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
    sys.path.insert(0, str(ROOT))
    if sys.argv[1:2] == ["--load"]:
        print(json.dumps(load(Path(sys.argv[2]))))
        return
    if sys.argv[1:2] == ["--load-small"]:
        print(json.dumps(load_small(Path(sys.argv[2]))))
        return
    from benchmarks.serving.checkpoint import Widths, write_checkpoint
    from examples.compare_builds import device_name
    from tools.mutants import install_without

    builds = {"fork": None, "without checks": install_without(patch_of_checks())}
    rows = []
    for layout in ("per_expert", "3key"):
        write_export(WORK / layout, stacked=layout == "3key")
        rows += medians(WORK / layout, builds)
        show(rows)
    write_checkpoint(WORK / "small", Widths(**SMALL))
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

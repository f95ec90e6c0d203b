# SPDX-License-Identifier: Apache-2.0
"""Before the first request: which numbers of tokens the model is run with."""

from collections.abc import Iterator
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from packaging.version import Version
from torch import nn
from triton import JITFunction
from vllm.config import CUDAGraphMode
from vllm.model_executor.layers.fused_moe.experts.quark_int8 import (
    few_tokens,
    many_tokens,
)
from vllm.model_executor.layers.fused_moe.experts.quark_int8.experts import Int8Experts
from vllm.model_executor.layers.fused_moe.experts.quark_int8.tiles import Architecture
from vllm.model_executor.layers.fused_moe.experts.triton_int8_moe import (
    TritonInt8Experts,
)
from vllm.model_executor.warmup import int8_warmup, kernel_warmup
from vllm.model_executor.warmup.int8_warmup import Layer, warmup_sizes
from vllm.platforms import current_platform

from tests.kernels.compile_int8 import run_experts
from tests.kernels.moe.utils import make_moe_config

MAX_TOKENS = 8192


class Launches:
    """Runs the layer on tensors without memory; of each launch keeps what a kernel is
    compiled for."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, architecture: Architecture
    ) -> None:
        self.architecture = architecture
        self.found: set[Any] = set()
        for module in (few_tokens, many_tokens):
            monkeypatch.setattr(module, "launch", self.record)
            monkeypatch.setattr(module, "num_sms", lambda x: 132)

    def record(
        self, kernel: Any, grid: Any, pdl: bool, *args: Any, **options: Any
    ) -> None:
        if not isinstance(kernel, JITFunction):  # in the interpreter
            kernel = JITFunction(kernel.fn, **kernel.kwargs)
        numbers = [
            (parameter.name, value == 1, value % 16 == 0)
            for parameter, value in zip(kernel.params, args, strict=False)
            if isinstance(value, int) and not parameter.do_not_specialize
        ]
        key = kernel.fn.__name__, pdl, *numbers, *sorted(options.items(), key=str)
        self.found.add(key)

    def run(self, num_tokens: int, layer: Layer) -> set[Any]:
        """One of eight ranks' experts."""
        self.found = set()
        run_experts(self.architecture, num_tokens, *layer[:5])
        return self.found


SHAPES = [
    (8, 288, 36, 256, 1280),
    (8, 288, 36, 256, 160),
    (8, 288, 36, 4096, 80),
    (6, 64, 8, 256, 64),
    (4, 64, 8, 64, 768),
    (4, 64, 64, 64, 768),
]


@pytest.mark.parametrize("architecture", ["hopper", "cuda", "rocm"])
@pytest.mark.parametrize(
    "shape", [SHAPES[0], *(pytest.param(s, marks=pytest.mark.slow) for s in SHAPES[1:])]
)
@pytest.mark.parametrize("dp_size", [1, 3])
def test_sizes_reach_every_kernel(
    dp_size: int,
    shape: tuple[int, int, int, int, int],
    architecture: Architecture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever a step holds, its kernels are those of a size before it."""
    layer = Layer(*shape, dp_size)
    launches = Launches(monkeypatch, architecture)
    sizes = [*warmup_sizes(architecture, layer, 0, MAX_TOKENS), MAX_TOKENS]
    assert len(sizes) <= 24
    compiled = set[Any]().union(
        *(launches.run(size * dp_size, layer) for size in sizes)
    )
    for num_tokens in {*range(1, 150), *range(151, MAX_TOKENS, 101)}:
        needed = launches.run(num_tokens * dp_size, layer)
        assert needed <= compiled, num_tokens


@pytest.mark.parametrize("captured", [0, 16, 512])
def test_sizes_lie_between_graphs_and_the_profile_run(captured: int) -> None:
    """Of Step-3.5-Flash: each is the first that needs its kernels, those of a shorter
    step are among those of a longer one, and a model with all of its steps in graphs
    needs none."""
    layer = Layer(8, 288, 288, 4096, 1280, dp_size=1)
    sizes = warmup_sizes("hopper", layer, captured, MAX_TOKENS)
    assert sizes and sizes == sorted(set(sizes))
    assert captured < sizes[0] and sizes[-1] < MAX_TOKENS
    needed = [layer.kernels("hopper", size) for size in (*sizes, MAX_TOKENS)]
    assert len(set(needed)) == len(needed)
    for most in (captured + 1, 600, 1153, 3000):
        shorter = warmup_sizes("hopper", layer, captured, most)
        assert set(shorter) <= {size for size in sizes if size < most}
    assert warmup_sizes("hopper", layer, captured, captured) == []


def test_ranks_of_uneven_experts_run_alike() -> None:
    """288 experts over 64 ranks: some have five, others four."""
    few, more = (
        make_moe_config(288, 8, 4096, 1280, num_local_experts=n) for n in (4, 5)
    )
    for moe in (few, more):
        moe.moe_parallel_config.ep_size = 64
    assert Layer.of(few) == Layer.of(more)
    assert Layer.of(few).num_experts == 5


class Worker(SimpleNamespace):
    """What the warmup asks a worker for; keeps the runs of its model."""

    @classmethod
    def of(cls, model: nn.Module, captured: list[int]) -> "Worker":
        runs: list[tuple[Any, ...]] = []
        return cls(
            runs=runs,
            get_model=lambda: model,
            vllm_config=SimpleNamespace(
                compilation_config=SimpleNamespace(cudagraph_capture_sizes=captured)
            ),
            scheduler_config=SimpleNamespace(max_num_batched_tokens=64),
            model_runner=SimpleNamespace(
                _dummy_run=lambda *args, **options: runs.append((*args, options))
            ),
        )


@pytest.fixture
def moe_model(monkeypatch: pytest.MonkeyPatch) -> Iterator[nn.Module]:
    experts: Any = nn.Module()
    kernel = SimpleNamespace(fused_experts=object.__new__(Int8Experts))
    experts.quant_method = SimpleNamespace(moe_kernel=kernel)
    experts.moe_config = SimpleNamespace(
        experts_per_token=2,
        num_experts=8,
        ep_size=1,
        hidden_dim=64,
        intermediate_size_per_partition=64,
        dp_size=1,
    )
    monkeypatch.setattr(int8_warmup, "get_architecture", lambda: "hopper")
    yield nn.Sequential(nn.Linear(1, 1), experts)


def test_runs_models_of_int8_experts(moe_model: nn.Module) -> None:
    """With the sizes beyond the largest graph, or all with enforce_eager."""
    options = {"cudagraph_runtime_mode": CUDAGraphMode.NONE, "skip_eplb": True}
    experts: Any = list(moe_model.children())[-1]
    for captured in ([1, 2, 16], []):
        worker = Worker.of(moe_model, captured)
        int8_warmup.int8_warmup(worker)
        most = max(captured, default=0)
        sizes = warmup_sizes("hopper", Layer.of(experts.moe_config), most, 64)
        assert sizes and worker.runs == [(size, options) for size in sizes]


def test_leaves_other_models_alone(moe_model: nn.Module) -> None:
    worker = Worker.of(nn.Linear(1, 1), [])
    int8_warmup.int8_warmup(worker)
    assert worker.runs == []
    _, experts = moe_model.children()
    kernel: Any = experts.quant_method.moe_kernel  # type: ignore[union-attr]
    kernel.fused_experts = object.__new__(TritonInt8Experts)
    worker = Worker.of(moe_model, [])
    int8_warmup.int8_warmup(worker)
    assert worker.runs == []


def test_upstreams_warmup_asks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patch 0024, before CUDA graphs are captured."""

    if Version(version("vllm")) >= Version("0.24") and current_platform.is_cpu():
        pytest.skip("needs a vLLM built for GPUs: newer releases' warmup asks its ops")

    class Asked(Exception):
        pass

    worker = MagicMock()

    def asked(given: object) -> None:
        assert given is worker
        raise Asked

    monkeypatch.setattr(int8_warmup, "int8_warmup", asked)
    monkeypatch.setattr(kernel_warmup.envs, "VLLM_USE_DEEP_GEMM", False)
    with pytest.raises(Asked):
        kernel_warmup.kernel_warmup(worker)

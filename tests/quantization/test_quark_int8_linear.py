# SPDX-License-Identifier: Apache-2.0
"""Quark INT8 linear layers: what is loaded, in which shape, and what they compute.

Inputs of the products are whole multiples of a power of two, so that quantizing them
is exact and the float64 reference differs from a kernel by the rounding of its output.
"""

import gc
import weakref
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import pytest
import torch
import vllm._custom_ops as ops
from packaging.version import Version
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.kernels.linear.scaled_mm.triton import (
    TritonInt8ScaledMMLinearKernel,
)
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.quantization.compressed_tensors.triton_scaled_mm import (  # noqa: E501
    triton_scaled_mm,
)
from vllm.model_executor.layers.quantization.quark.quark import (
    QuarkConfig,
    QuarkLinearMethod,
)
from vllm.model_executor.layers.quantization.quark.schemes import QuarkW8A8Int8
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)
from vllm.platforms import current_platform

from tests.quantization.utils import (
    poison,
    random_int8,
    random_scales,
    skip_without_int8_ops,
)
from tools.upstream import holds_fix

HIDDEN = 64
HEAD_SIZE = 16

Shards = dict[str | int | None, int]


@dataclass(frozen=True)
class TP:
    rank: int
    size: int

    def __str__(self) -> str:
        return f"rank{self.rank}of{self.size}"


@dataclass(frozen=True)
class Kind:
    """A linear layer: its tensors in the checkpoint, and what each rank takes."""

    layer: type[LinearBase]
    sizes: dict[str, Any]
    # Shard id -> rows of that tensor in the checkpoint.
    shards: Shards
    # Shards of which every rank holds all rows.
    whole: tuple[str | int | None, ...] = ()

    def build(self, quark: dict[str, Any]) -> LinearBase:
        layer = self.layer(
            bias=False,
            quant_config=QuarkConfig.from_config(quark),
            prefix="model.layers.0.proj",
            **self.sizes,
        )
        poison(layer)
        return layer

    def share(self, shard: str | int | None, full: Tensor, tp: TP) -> Tensor:
        """The rows of the checkpoint's tensor [N, ...] that this rank holds."""
        if shard in self.whole:
            return full
        rows = full.shape[0] // tp.size
        return full[tp.rank * rows : (tp.rank + 1) * rows]


def column(name: str) -> dict[str, int]:
    return {"input_size": HIDDEN, name: 48}


def heads(num_heads: int, num_kv_heads: int) -> dict[str, int]:
    return {
        "hidden_size": HIDDEN,
        "head_size": HEAD_SIZE,
        "total_num_heads": num_heads,
        "total_num_kv_heads": num_kv_heads,
    }


KINDS = {
    "replicated": Kind(
        ReplicatedLinear, column("output_size"), {None: 48}, whole=(None,)
    ),
    "column": Kind(ColumnParallelLinear, column("output_size"), {None: 48}),
    "row": Kind(
        RowParallelLinear,
        column("output_size") | {"reduce_results": False},
        {None: 48},
        whole=(None,),
    ),
    "gate_up": Kind(
        MergedColumnParallelLinear,
        {"input_size": HIDDEN, "output_sizes": [64, 32]},
        {0: 64, 1: 32},
    ),
    "qkv": Kind(QKVParallelLinear, heads(6, 2), {"q": 96, "k": 32, "v": 32}),
    # One key/value head: both ranks hold it.
    "qkv_shared": Kind(
        QKVParallelLinear, heads(6, 1), {"q": 96, "k": 16, "v": 16}, whole=("k", "v")
    ),
}
FUSED = ("gate_up", "qkv", "qkv_shared")
LAYOUTS = (TP(0, 1), TP(0, 2), TP(1, 2))
# Without 0001 a vector loads and counts right; columns, on disk or here, do not.
NEEDS_0001 = pytest.mark.needs_patch("0001")
COLUMN_ON_DISK = pytest.param(True, marks=NEEDS_0001, id="2d")
VECTOR_ON_DISK = pytest.param(False, id="1d")

each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
each_layout = pytest.mark.parametrize("tp", LAYOUTS, ids=str)


@pytest.fixture(autouse=True)
def _context(vllm_config: VllmConfig) -> None:
    """Every layer here is built under a current VllmConfig."""


def load(layer: nn.Module, name: str, shard: str | int | None, tensor: Tensor) -> None:
    param = getattr(layer, name)
    shard_args = () if shard is None else (shard,)
    param.weight_loader(param, tensor, *shard_args)


def random_column(name: str, rows: int, rng: torch.Generator) -> Tensor:
    if name == "weight_scale":
        return random_scales(rows, rng=rng)
    return random_int8(rows, rng=rng)


@NEEDS_0001
@each_layout
@each_kind
@pytest.mark.parametrize("on_disk", ["1d", "2d"])
@pytest.mark.parametrize("name", ["weight_scale", "weight_zero_point"])
def test_per_channel_tensors_load_as_columns(
    kind, tp, on_disk, name, tensor_parallel, quark_dict, rng
):
    tensor_parallel(tp.rank, tp.size)
    layer = kind.build(quark_dict())
    shares = []
    for shard, rows in kind.shards.items():
        full = random_column(name, rows, rng)
        load(layer, name, shard, full if on_disk == "1d" else full[:, None])
        shares.append(kind.share(shard, full, tp))

    expected = torch.cat(shares)[:, None]
    assert torch.equal(getattr(layer, name).data.cpu(), expected)


@NEEDS_0001
@each_layout
@pytest.mark.parametrize("on_disk", ["1d", "2d"])
@pytest.mark.parametrize("kind", [KINDS[name] for name in FUSED], ids=FUSED)
def test_scale_that_is_fused_on_disk(
    kind, tp, on_disk, tensor_parallel, quark_dict, rng
):
    tensor_parallel(tp.rank, tp.size)
    layer = kind.build(quark_dict())
    full = random_scales(sum(kind.shards.values()), rng=rng)
    load(layer, "weight_scale", None, full if on_disk == "1d" else full[:, None])

    parts = full.split(list(kind.shards.values()))
    shares = [
        kind.share(shard, part, tp)
        for shard, part in zip(kind.shards, parts, strict=True)
    ]
    expected = torch.cat(shares)[:, None]
    assert torch.equal(layer.weight_scale.data.cpu(), expected)


@each_layout
@each_kind
@pytest.mark.parametrize("shape", [(), (1,)], ids=["scalar", "one"])
def test_per_tensor_scale_stays_one_a_shard(
    kind, tp, shape, tensor_parallel, quark_dict, rng
):
    tensor_parallel(tp.rank, tp.size)
    layer = kind.build(quark_dict(weight="per_tensor", static=True))
    scales = random_scales(len(kind.shards), rng=rng)
    for shard, scale in zip(kind.shards, scales, strict=True):
        load(layer, "weight_scale", shard, scale.reshape(shape))
    load(layer, "input_scale", next(iter(kind.shards)), scales[0].reshape(shape))

    assert torch.equal(layer.weight_scale.data.cpu(), scales)
    assert torch.equal(layer.input_scale.data.cpu(), scales[:1])


@each_kind
@pytest.mark.parametrize("difference", [-1, "one"])
def test_scale_of_another_length_is_refused(kind, difference, quark_dict, rng):
    """Above all a single scale, which must not spread over a channel's place."""
    layer = kind.build(quark_dict())
    shard, rows = next(iter(kind.shards.items()))
    wrong = random_scales(1 if difference == "one" else rows + difference, rng=rng)
    with pytest.raises((AssertionError, RuntimeError)):
        load(layer, "weight_scale", shard, wrong)
    assert layer.weight_scale.isnan().all()


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero_point"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("weight", ["per_channel", "per_tensor"])
def test_scheme_selection(weight, static, symmetric, quark_dict):
    quark = quark_dict(weight=weight, static=static, symmetric=symmetric)
    layer = KINDS["column"].build(quark)

    assert isinstance(layer.quant_method, QuarkLinearMethod)
    assert isinstance(layer.scheme, QuarkW8A8Int8)
    assert layer.scheme.qscheme == weight
    assert layer.scheme.is_static_input_scheme is static
    assert layer.scheme.input_symmetric is symmetric


@pytest.mark.needs_group("checks")
@pytest.mark.parametrize(
    "part, field",
    [("weight", {"symmetric": False}), ("input_tensors", {"qscheme": "per_tensor"})],
    ids=["asymmetric weight", "dynamic per tensor"],
)
def test_scheme_without_a_kernel_is_refused(part, field, quark_dict):
    quark = quark_dict()
    quark["global_quant_config"][part] |= field
    with pytest.raises(
        NotImplementedError, match=r"layer.*: expected a scheme .* found weight int8"
    ):
        KINDS["column"].build(quark)


@dataclass(frozen=True)
class Quantized:
    """Inputs x that a scheme quantizes without error, and how."""

    x: Tensor  # bfloat16 [M, K]
    scale: Tensor  # float32: [M, 1] if dynamic, else [1, 1]
    zero_point: Tensor  # int8, like scale


def quantized_input(
    num_tokens: int, static: bool, symmetric: bool, rng: torch.Generator
) -> Quantized:
    """x = scale * (q - zero point), q int8 that reaches both ends of its range.

    Both halves of the channels reach them, as row-parallel ranks quantize their own.
    """
    rows = 1 if static else num_tokens
    q = random_int8(num_tokens, HIDDEN, rng=rng).int()
    for half in q.chunk(2, dim=1):
        half[:, :2] = torch.tensor(
            [-127 if symmetric else -128, 127], dtype=q.dtype, device="cpu"
        )
    exponent = torch.randint(-6, -2, (rows, 1), generator=rng, device="cpu")
    scale = torch.pow(2.0, exponent.float())
    zero_point = random_int8(rows, 1, rng=rng)
    if symmetric:
        zero_point = torch.zeros_like(zero_point)
    x = ((q - zero_point) * scale).bfloat16()
    return Quantized(x, scale, zero_point)


def forward(
    layer: LinearBase, kind: Kind, weights: dict, x: Quantized, columns: bool
) -> Tensor:
    """Load the layer, process it as the engine does, and run it; float64 [M, N]."""
    for shard, (weight, scale) in weights.items():
        load(layer, "weight", shard, weight)
        load(layer, "weight_scale", shard, scale[:, None] if columns else scale)
        if layer.input_scale is not None:
            load(layer, "input_scale", shard, x.scale.reshape(1))
            load(layer, "input_zero_point", shard, x.zero_point.reshape(1))
    layer.quant_method.process_weights_after_loading(layer)
    inputs = x.x
    if kind.layer is RowParallelLinear:
        inputs = inputs.chunk(layer.tp_size, dim=1)[layer.tp_rank]
    output, _ = layer(inputs.contiguous().to(layer.weight_scale.device))
    return output.cpu().double()


def assert_rounded(output: Tensor, expected: Tensor) -> None:
    """Equal up to one rounding to bfloat16, and float32's where terms cancel."""
    slack = expected.abs().max().item() * 1e-5
    torch.testing.assert_close(output, expected, rtol=2**-8, atol=slack)


def random_weights(kind: Kind, per_channel: bool, rng: torch.Generator) -> dict:
    return {
        shard: (
            random_int8(rows, HIDDEN, rng=rng),
            random_scales(rows if per_channel else 1, rng=rng),
        )
        for shard, rows in kind.shards.items()
    }


@pytest.mark.parametrize("columns", [VECTOR_ON_DISK, COLUMN_ON_DISK])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero_point"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize(
    "cpu", [None, pytest.param("AVX2", marks=pytest.mark.needs_group("cpu"))]
)
@each_kind
def test_per_channel_product(
    kind, cpu, static, symmetric, columns, quark_dict, rng, monkeypatch
):
    if cpu and not current_platform.is_cpu():
        pytest.skip("needs a vLLM built for CPUs")
    if cpu:  # vLLM's build for it has no INT8 kernel
        monkeypatch.setattr(ops, "_supports_onednn", False)
    elif not symmetric:
        skip_without_int8_ops()
    quark = quark_dict(static=static, symmetric=symmetric)
    weights = random_weights(kind, per_channel=True, rng=rng)
    x = quantized_input(5, static, symmetric, rng)

    output = forward(kind.build(quark), kind, weights, x, columns)

    full = torch.cat([w.double() * s[:, None] for w, s in weights.values()])
    assert_rounded(output, x.x.double() @ full.T)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@each_kind
def test_per_tensor_product(kind, static, quark_dict, rng):
    quark = quark_dict(weight="per_tensor", static=static)
    weights = random_weights(kind, per_channel=False, rng=rng)
    x = quantized_input(5, static, symmetric=True, rng=rng)

    output = forward(kind.build(quark), kind, weights, x, columns=False)

    full = torch.cat([w.double() * s for w, s in weights.values()])
    assert_rounded(output, x.x.double() @ full.T)


@pytest.mark.parametrize("columns", [VECTOR_ON_DISK, COLUMN_ON_DISK])
@each_kind
def test_ranks_add_up_to_the_product(kind, columns, tensor_parallel, quark_dict, rng):
    weights = random_weights(kind, per_channel=True, rng=rng)
    x = quantized_input(5, static=False, symmetric=True, rng=rng)
    for tp in (TP(0, 2), TP(1, 2)):
        tensor_parallel(tp.rank, tp.size)
        output = forward(kind.build(quark_dict()), kind, weights, x, columns)

        full = torch.cat(
            [
                kind.share(shard, w.double() * s[:, None], tp)
                for shard, (w, s) in weights.items()
            ]
        )
        inputs = x.x.double()
        if kind.layer is RowParallelLinear:
            inputs, full = (t.chunk(2, dim=1)[tp.rank] for t in (inputs, full))
        assert_rounded(output, inputs @ full.T)


def test_triton_kernel_reads_vectors_and_columns_alike(device, rng):
    """ROCm's kernel, and CUDA's for sizes that CUTLASS cannot take."""
    x = quantized_input(5, static=False, symmetric=True, rng=rng)
    q = (x.x / x.scale).to(torch.int8)
    weight = random_int8(48, HIDDEN, rng=rng)
    vector = random_scales(48, rng=rng)
    of_vector, of_column = (
        triton_scaled_mm(
            q.to(device),
            weight.to(device).T,
            x.scale.to(device),
            scale.to(device),
            torch.float32,
        ).cpu()
        for scale in (vector, vector[:, None])
    )
    assert torch.equal(of_vector, of_column)
    expected = x.x.double() @ (weight.double() * vector[:, None]).T
    torch.testing.assert_close(of_column.double(), expected, rtol=1e-6, atol=0)


@NEEDS_0001
@pytest.mark.parametrize("on_disk", ["1d", "2d"])
@each_kind
def test_scales_load_a_second_time(kind, on_disk, quark_dict, rng):
    """Through upstream's reload, with the kernel's processing in between."""
    layer = kind.build(quark_dict())
    record_metadata_for_reloading(layer)
    for again in (False, True, True):
        weights = random_weights(kind, per_channel=True, rng=rng)
        if again:
            initialize_layerwise_reload(layer)
        expected = torch.cat([scale for _, scale in weights.values()])
        assert layer.weight_scale.shape == (len(expected), 1)
        for shard, (weight, scale) in weights.items():
            load(layer, "weight", shard, weight)
            load(
                layer,
                "weight_scale",
                shard,
                scale if on_disk == "1d" else scale[:, None],
            )
        if again:
            finalize_layerwise_reload(layer, None)
        else:
            layer.quant_method.process_weights_after_loading(layer)

        # A column or a row, as the kernel wants it.
        assert torch.equal(layer.weight_scale.data.cpu().flatten(), expected)


@pytest.mark.needs_patch("0017")
@each_kind
def test_weights_load_a_second_time_after_a_kernel_of_gpus(kind, quark_dict, rng):
    """Those of CUDA and ROCm leave input_zero_point as None, the CPU's leaves none."""
    layer = kind.build(quark_dict())
    kernel = layer.scheme.kernel
    layer.scheme.kernel = TritonInt8ScaledMMLinearKernel.__new__(
        TritonInt8ScaledMMLinearKernel
    )
    vars(layer.scheme.kernel).update(vars(kernel))
    record_metadata_for_reloading(layer)
    for again in (False, True):
        weights = random_weights(kind, per_channel=True, rng=rng)
        if again:
            initialize_layerwise_reload(layer)
        for shard, (weight, scale) in weights.items():
            load(layer, "weight", shard, weight)
            load(layer, "weight_scale", shard, scale)
        if again:
            finalize_layerwise_reload(layer, None)
        else:
            layer.quant_method.process_weights_after_loading(layer)
        assert layer.input_zero_point is None  # which is what made it fail
        rows = torch.cat([weight for weight, _ in weights.values()])
        assert torch.equal(layer.weight.data.cpu(), rows.T)


@pytest.mark.skipif(
    holds_fix(Version(version("vllm")).public),
    reason="upstream's own loader of columns, which this release has in place of patch "
    "0001's, holds its layer, and the record for reloading holds that loader",
)
def test_layer_is_freed(quark_dict):
    """What is recorded for reloading must not keep a deleted model's weights."""
    layer = KINDS["column"].build(quark_dict())
    record_metadata_for_reloading(layer)
    alive = weakref.ref(layer)
    del layer
    gc.collect()
    assert alive() is None

# SPDX-License-Identifier: Apache-2.0
"""Whatever the layout and the shapes: each rank reads back the exact dequantized values
of its share of the checkpoint."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.quantization.quark.quark import QuarkConfig
from vllm.model_executor.parameter import RowvLLMParameter, _ColumnvLLMParameter

from tests.models import step3p5_micro as micro
from tests.models.step3p5_micro import Share, Sizes
from tests.moe_layers import ExpertsModule, make_experts
from tests.quantization.utils import poison, random_int8, random_scales

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "float16": torch.float16}
TP_SIZES = (1, 2, 4)
# A shared seed makes the examples small to print; the numbers come from it.
seeds = st.integers(0, 2**32 - 1)
scale_dtypes = st.sampled_from(sorted(DTYPES))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_same(found: Tensor, wanted: Tensor, where: str) -> None:
    """Exactly; names the first of the differences."""
    assert found.shape == wanted.shape, f"{where}: {found.shape} not {wanted.shape}"
    differs = ~(found == wanted)
    if differs.any():
        first = tuple(differs.nonzero()[0].tolist())
        raise AssertionError(
            f"{where}: {int(differs.sum())} of {differs.numel()} values differ, first "
            f"at {list(first)}: {found[first]:g}, expected {wanted[first]:g}"
        )


@pytest.fixture
def as_rank(device, tensor_parallel):
    """A context in which layers are built as a rank's share."""

    @contextmanager
    def context(share: Share) -> Iterator[VllmConfig]:
        tensor_parallel(share.rank, share.size)
        config = VllmConfig()
        config.parallel_config.enable_expert_parallel = share.by_expert
        with set_current_vllm_config(config):
            yield config

    return context


# Linear layers.


@dataclass(frozen=True)
class Linear:
    """A linear layer and how its tensors lie in the checkpoint.

    `shards`: rows of each tensor; `heads`: of query, and of key and value, for qkv.
    """

    kind: str
    tp_size: int
    columns: int
    shards: tuple[int, ...]
    scale: str
    scale_dtype: str
    fused_on_disk: bool
    seed: int
    heads: tuple[int, int] = (0, 0)
    head_size: int = 0

    def build(self, quark: dict) -> LinearBase:
        layer_class, sizes = {
            "replicated": (ReplicatedLinear, (self.columns, *self.shards)),
            "column": (ColumnParallelLinear, (self.columns, *self.shards)),
            "row": (RowParallelLinear, (self.columns, *self.shards)),
            "merged": (MergedColumnParallelLinear, (self.columns, list(self.shards))),
            "qkv": (QKVParallelLinear, (self.columns, self.head_size, *self.heads)),
        }[self.kind]
        layer = layer_class(
            *sizes,
            bias=False,
            quant_config=QuarkConfig.from_config(quark),
            prefix="model.layers.0.proj",
        )
        poison(layer)
        return layer

    def shard_ids(self) -> list[str | int | None]:
        if self.kind == "qkv":
            return ["q", "k", "v"]
        return list(range(len(self.shards))) if self.kind == "merged" else [None]

    def of_rank(self, share: Share, shard: int, values: Tensor) -> Tensor:
        """A rank's share of one tensor's values [N, K]."""
        if self.kind == "replicated":
            return values
        if self.kind == "row":
            return values[:, share.part(self.columns)]
        if self.kind != "qkv":
            return values[share.part(len(values))]
        by_head = values.unflatten(0, (-1, self.head_size))
        chosen = share.part if shard == 0 else share.kv_heads
        return by_head[chosen(len(by_head))].flatten(0, 1)


@st.composite
def linears(draw: st.DrawFn) -> Linear:
    kind = draw(st.sampled_from(["replicated", "column", "row", "merged", "qkv"]))
    tp_size = draw(st.sampled_from(TP_SIZES))
    part = st.integers(1, 6)
    scale = draw(st.sampled_from(["[N]", "[N, 1]", "per tensor []", "per tensor [1]"]))
    columns = draw(part) * (tp_size if kind == "row" else 1)
    heads, head_size = (0, 0), 0
    if kind == "qkv":
        key = draw(st.sampled_from([1, 2, 4, 8]))
        # Query heads are a multiple of the key heads, and of the ranks.
        query = draw(st.integers(1, 3)) * max(key, tp_size)
        heads, head_size = (query, key), draw(part)
        shards = tuple(head_size * count for count in (query, key, key))
    elif kind == "merged":
        shards = tuple(tp_size * draw(part) for _ in range(draw(st.integers(1, 3))))
    else:
        shards = (draw(part) * tp_size,)
    fused = kind in ("merged", "qkv") and "tensor" not in scale and draw(st.booleans())
    return Linear(
        kind=kind,
        tp_size=tp_size,
        columns=columns,
        shards=shards,
        scale=scale,
        scale_dtype=draw(scale_dtypes),
        fused_on_disk=fused,
        seed=draw(seeds),
        heads=heads,
        head_size=head_size,
    )


def load(layer: LinearBase, name: str, shard: str | int | None, tensor: Tensor) -> None:
    parameter = getattr(layer, name)
    parameter.weight_loader(parameter, tensor, *(() if shard is None else (shard,)))


def check_linear(case: Linear, as_rank: Callable, quark_dict: Callable) -> None:
    rng = generator(case.seed)
    per_tensor = "tensor" in case.scale
    quark = quark_dict("per_tensor" if per_tensor else "per_channel", static=per_tensor)
    weights = [random_int8(rows, case.columns, rng=rng) for rows in case.shards]
    scales = [
        random_scales(1 if per_tensor else rows, rng=rng).to(DTYPES[case.scale_dtype])
        for rows in case.shards
    ]
    shapes = {"[N]": (-1,), "[N, 1]": (-1, 1), "per tensor []": ()}
    on_disk = [scale.reshape(shapes.get(case.scale, (1,))) for scale in scales]
    for rank in range(case.tp_size):
        share = Share(rank, case.tp_size)
        with as_rank(share):
            layer = case.build(quark)
        if case.fused_on_disk:
            load(layer, "weight", None, torch.cat(weights))
            load(layer, "weight_scale", None, torch.cat(on_disk))
        else:
            for shard, *tensors in zip(case.shard_ids(), weights, on_disk, strict=True):
                load(layer, "weight", shard, tensors[0])
                load(layer, "weight_scale", shard, tensors[1])

        wanted = [
            case.of_rank(share, shard, weight.double() * scale.double()[:, None])
            for shard, (weight, scale) in enumerate(zip(weights, scales, strict=True))
        ]
        scale = layer.weight_scale.data.cpu().double().flatten()
        if per_tensor:
            scale = scale.repeat_interleave(
                torch.tensor(layer.logical_widths, device="cpu")
            )
        found = layer.weight.data.cpu().double() * scale[:, None]
        assert_same(found, torch.cat(wanted), f"rank {rank} of {case.tp_size}")


# Without 0001 columns on disk do not load.
@pytest.mark.needs_patch("0001")
@given(case=linears())
def test_linear_layers(case, as_rank, quark_dict):
    check_linear(case, as_rank, quark_dict)


# Routed experts, each on its own in the checkpoint.


@dataclass(frozen=True)
class Experts:
    """Experts of a layer, `experts` of them, and who holds them."""

    experts: int
    hidden: int
    width: int
    size: int
    by_expert: bool
    scale: str
    scale_dtype: str
    seed: int


@st.composite
def parallel_sizes(draw: st.DrawFn) -> tuple[int, bool]:
    """Ranks, and whether they share the experts out."""
    return draw(st.sampled_from([*((size, False) for size in TP_SIZES), (2, True)]))


@st.composite
def experts_cases(draw: st.DrawFn) -> Experts:
    size, by_expert = draw(parallel_sizes())
    return Experts(
        # An odd number as well, which ranks cannot share evenly.
        experts=draw(st.integers(size if by_expert else 1, 7)),
        hidden=draw(st.integers(1, 12)),
        width=draw(st.integers(1, 4)) * (1 if by_expert else size),
        size=size,
        by_expert=by_expert,
        scale=draw(st.sampled_from(["[N]", "per tensor []", "per tensor [1]"])),
        scale_dtype=draw(scale_dtypes),
        seed=draw(seeds),
    )


def check_experts(case: Experts, as_rank: Callable, quark_dict: Callable) -> None:
    rng = generator(case.seed)
    per_tensor = "tensor" in case.scale
    quark = quark_dict("per_tensor" if per_tensor else "per_channel", static=per_tensor)
    rows = {"w1": case.width, "w2": case.hidden, "w3": case.width}
    columns = {"w1": case.hidden, "w2": case.width, "w3": case.hidden}
    weights, scales = {}, {}
    for shard in rows:
        weights[shard] = random_int8(case.experts, rows[shard], columns[shard], rng=rng)
        num_scales = 1 if per_tensor else rows[shard]
        scale = random_scales(case.experts, num_scales, rng=rng)
        scales[shard] = scale.to(DTYPES[case.scale_dtype])
    for rank in range(case.size):
        share = Share(rank, case.size, case.by_expert)
        with as_rank(share):
            layer = make_experts(
                num_experts=case.experts,
                top_k=1,
                hidden_size=case.hidden,
                intermediate_size=case.width,
                quant_config=QuarkConfig.from_config(quark),
                prefix="model.layers.0.moe.experts",
            )
        poison(layer)
        for shard in rows:
            prefix = "w2" if shard == "w2" else "w13"
            for kind, tensors in (("weight", weights), ("weight_scale", scales)):
                name = f"{prefix}_{kind}"
                parameter = getattr(layer, name)
                for expert_id, tensor in enumerate(tensors[shard]):
                    if kind == "weight_scale" and case.scale == "per tensor []":
                        tensor = tensor.reshape(())
                    parameter.weight_loader(
                        parameter, tensor, name, shard_id=shard, expert_id=expert_id
                    )

        experts = share.part(case.experts) if share.by_expert else slice(None)
        inner = slice(None) if share.by_expert else share.part(case.width)
        value = {
            shard: (weights[shard].double() * scales[shard].double()[..., None])[
                experts
            ]
            for shard in rows
        }
        where = f"rank {rank} of {case.size}"
        gate_up = torch.cat([value["w1"][:, inner], value["w3"][:, inner]], dim=1)
        assert_same(dequantize(layer, "w13"), gate_up, f"{where}, w13")
        assert_same(dequantize(layer, "w2"), value["w2"][..., inner], f"{where}, w2")
        if not per_tensor:  # which are quantized anew, with one scale for w1 and w3
            layer.quant_method.process_weights_after_loading(layer)
            where += ", processed"
            assert_same(dequantize(layer, "w13"), gate_up, f"{where}, w13")
            down = value["w2"][..., inner]
            assert_same(dequantize(layer, "w2"), down, f"{where}, w2")


def dequantize(layer: Any, prefix: str) -> Tensor:
    """float64 [E, N, K] of a scale [E, N], [E, N, 1], [E, 2] or [E]."""
    weight = getattr(layer, f"{prefix}_weight").data.cpu().double()
    scale = getattr(layer, f"{prefix}_weight_scale").data.cpu().double()
    scale = scale.reshape(len(weight), -1)
    scale = scale.repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)
    return weight * scale[..., None]


@given(case=experts_cases())
def test_routed_experts(case, as_rank, quark_dict):
    check_experts(case, as_rank, quark_dict)


# A whole Step-3.5, by its own load_weights.


@dataclass(frozen=True)
class Model:
    """A small model, and the export that it is loaded from."""

    sizes: Sizes
    size: int
    by_expert: bool
    stacked: bool
    exclude: tuple[str, ...]
    scale_dtype: str
    seed: int


@st.composite
def models(draw: st.DrawFn) -> Model:
    size, by_expert = draw(parallel_sizes())
    groups = draw(st.sampled_from([2, 4]))
    sizes = Sizes(
        hidden=8 * draw(st.integers(1, 3)),
        width=size * draw(st.integers(1, 3)),
        experts=draw(st.integers(size, 6)),
        heads=max(groups, size) * draw(st.integers(1, 2)),
        groups=groups,
        head=32 * draw(st.integers(1, 2)),
    )
    attention = tuple(f"{micro.MOE}.self_attn.{name}_proj" for name in "qkv")
    optional = draw(st.sampled_from([(), micro.SHARED, attention]))
    return Model(
        sizes=sizes,
        size=size,
        by_expert=by_expert,
        stacked=draw(st.booleans()),
        exclude=micro.NEVER_INT8 + optional,
        scale_dtype=draw(scale_dtypes),
        seed=draw(seeds),
    )


def check_model(case: Model, as_rank: Callable, quark_dict: Callable, tmp_path) -> None:
    scale_dtype = DTYPES[case.scale_dtype]
    tensors = micro.export(
        case.sizes, case.exclude, generator(case.seed), scale_dtype=scale_dtype
    )
    weights = list(tensors.items() if case.stacked else micro.one_by_one(tensors))
    random.Random(case.seed).shuffle(weights)
    micro.write_config(tmp_path, case.sizes, quark_dict(exclude=case.exclude))
    for rank in range(case.size):
        share = Share(rank, case.size, case.by_expert)
        with as_rank(share):
            model, _ = micro.build(tmp_path, share.by_expert)
        poison(model)
        model.load_weights(iter(weights))

        found = micro.found(model)
        for name, value in micro.expected(tensors, case.sizes, share).items():
            where = f"rank {rank} of {case.size}, {name}"
            assert_same(found.pop(name), value, where)
        # What is left no export of INT8 weights holds.
        assert all(".self_attn.attn." in name for name in found), sorted(found)


# Without 0003 excluded layers that vLLM fuses are INT8.
@pytest.mark.slow
@pytest.mark.needs_patch("0003")
@given(case=models())
def test_step3p5(case, as_rank, quark_dict, tmp_path):
    check_model(case, as_rank, quark_dict, tmp_path)


# What the properties see.


def reverse_ranks(load: Callable) -> Callable:
    def mutant(self, *args, **kwargs):
        self.tp_rank = self.tp_size - 1 - self.tp_rank
        load(self, *args, **kwargs)
        self.tp_rank = self.tp_size - 1 - self.tp_rank

    return mutant


def with_argument(name: str, change: Callable) -> Callable:
    """Of a method: one that gets another value of the keyword argument `name`."""

    def mutate(method: Callable) -> Callable:
        def mutant(self, *args, **kwargs):
            kwargs[name] = change(kwargs[name])
            return method(self, *args, **kwargs)

        return mutant

    return mutate


def next_expert(to_local: Callable) -> Callable:
    def mutant(self, expert_id):
        return to_local(self, (expert_id + 1) % self.global_num_experts)

    return mutant


LINEAR, EXPERTS, MODEL = (
    (linears(), check_linear),
    (experts_cases(), check_experts),
    (models(), check_model),
)
COLUMN, ROW = _ColumnvLLMParameter, RowvLLMParameter
swap_w1_w3 = with_argument("shard_id", {"w1": "w3", "w3": "w1"}.get)
one_rank = with_argument("tp_rank", lambda rank: 0)
MUTANTS = {
    "column ranks": (LINEAR, COLUMN, "load_column_parallel_weight", reverse_ranks),
    "row ranks": (LINEAR, ROW, "load_row_parallel_weight", reverse_ranks),
    "merged ranks": (LINEAR, COLUMN, "load_merged_column_weight", reverse_ranks),
    "merged offsets": (
        LINEAR,
        COLUMN,
        "load_merged_column_weight",
        with_argument("shard_offset", lambda offset: 0),
    ),
    "shared heads": (
        LINEAR,
        COLUMN,
        "load_qkv_weight",
        with_argument("num_heads", lambda replicas: 2 * replicas),
    ),
    "expert ranks": (EXPERTS, ExpertsModule, "_load_w2", one_rank),
    "gate and up": (EXPERTS, ExpertsModule, "_load_w13", swap_w1_w3),
    "expert ids": (
        EXPERTS,
        ExpertsModule,
        "_map_global_expert_id_to_local_expert_id",
        next_expert,
    ),
    "model, qkv ranks": (MODEL, COLUMN, "load_qkv_weight", reverse_ranks),
    "model, gate and up": (MODEL, ExpertsModule, "_load_w13", swap_w1_w3),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_properties_see(mutant, as_rank, quark_dict, tmp_path, monkeypatch):
    """A loader that errs."""
    (cases, check), owner, name, mutate = mutant
    monkeypatch.setattr(owner, name, mutate(getattr(owner, name)))

    @settings(database=None, phases=[Phase.generate], report_multiple_bugs=False)
    @given(case=cases)
    def property_of(case):
        more = (tmp_path,) if check is check_model else ()
        check(case, as_rank, quark_dict, *more)

    with pytest.raises(AssertionError, match="values differ, first at"):
        property_of()

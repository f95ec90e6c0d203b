# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The tensors of an INT8 (W8A8) fused MoE layer, and their checks."""

from dataclasses import dataclass

import torch
from vllm.model_executor.layers.fused_moe.experts.quark_int8.tiles import Shape

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Of the hidden size and the width: int8 in whole vectors of 16 bytes.
SIZES_STEP = 16


@dataclass(frozen=True)
class Experts:
    """What a layer holds: E experts of this rank, width N, of hidden size K.

    w13: [E, 2N, K] int8, the gate projection above the up projection; w2: [E, K, N]
    int8; N and K are multiples of 16. w13_scale and w2_scale: float32, per channel,
    [E, 2N, 1] and [E, K, 1], or per tensor, [E]. a13_scale and a2_scale: a float32
    scalar of static activations, None for dynamic per-token ones, whatever the weights'
    scales. w13_bias: [E, 2N], and w2_bias: [E, K], or None. swiglustep_limit: clips
    both factors of the activation silu(gate) * up; None does not.
    """

    w13: torch.Tensor
    w2: torch.Tensor
    w13_scale: torch.Tensor
    w2_scale: torch.Tensor
    a13_scale: torch.Tensor | None = None
    a2_scale: torch.Tensor | None = None
    w13_bias: torch.Tensor | None = None
    w2_bias: torch.Tensor | None = None
    swiglustep_limit: float | None = None

    @property
    def num_experts(self) -> int:
        return self.w2.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.w2.shape[1]

    @property
    def width(self) -> int:
        return self.w2.shape[2]


@dataclass(frozen=True)
class Routing:
    """Where tokens go.

    topk_ids: [M, topk] integer, experts of the model if there is an `expert_map`, else
    of this rank; an id that is no expert adds nothing. topk_weights: [M, topk] float;
    apply_router_weight: whether outputs are weighted with them. expert_map: id in the
    model to id on this rank, -1 where it is absent.
    """

    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    expert_map: torch.Tensor | None = None
    apply_router_weight: bool = True

    @property
    def topk(self) -> int:
        return self.topk_ids.shape[1]

    def num_ids(self, experts: Experts) -> int:
        """Experts of all ranks."""
        if self.expert_map is None:
            return experts.num_experts
        return self.expert_map.numel()


def shape_of(experts: Experts, routing: Routing) -> Shape:
    num_tokens, topk = routing.topk_ids.shape
    return Shape(num_tokens, topk, routing.num_ids(experts), *experts.w2.shape)


def knows_sizes(hidden_size: int, width: int) -> bool:
    return hidden_size % SIZES_STEP == 0 and width % SIZES_STEP == 0


def check(x: torch.Tensor, experts: Experts, routing: Routing) -> None:
    """Raise ValueError for a shape or dtype that the kernels do not know."""
    num_experts, hidden_size, width = experts.w2.shape

    def expect(name: str, found: object, expected: object) -> None:
        if found != expected:
            raise ValueError(
                f"INT8 experts: {name} is {found}, expected {expected}; w2 is "
                f"{list(experts.w2.shape)}."
            )

    w13_shape = [num_experts, 2 * width, hidden_size]
    expect("w13's shape", list(experts.w13.shape), w13_shape)
    expect("hidden_states' last dimension", x.shape[-1], hidden_size)
    expect("topk_ids' first dimension", routing.topk_ids.shape[0], x.shape[0])
    for name, tensor in (("w13", experts.w13), ("w2", experts.w2)):
        expect(f"{name}'s dtype", tensor.dtype, torch.int8)
        expect(f"{name} contiguous", tensor.is_contiguous(), True)
    if x.dtype not in DTYPES:
        expect("hidden_states' dtype", x.dtype, " or ".join(map(str, DTYPES)))
    if not knows_sizes(hidden_size, width):
        expect("sizes", [hidden_size, width], f"multiples of {SIZES_STEP}")
    for name, scale, channels in (
        ("w13_scale", experts.w13_scale, 2 * width),
        ("w2_scale", experts.w2_scale, hidden_size),
    ):
        if scale.numel() not in (num_experts, num_experts * channels):
            expect(name, list(scale.shape), f"[{num_experts}, {channels}, 1] or [E]")
    for name, static_scale in (
        ("a13_scale", experts.a13_scale),
        ("a2_scale", experts.a2_scale),
    ):
        if static_scale is not None and static_scale.numel() != 1:
            expect(name, list(static_scale.shape), "a scalar")

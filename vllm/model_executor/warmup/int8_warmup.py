# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Compile a model's Triton kernels before the first request, if it has INT8 experts.

Their tiles depend on the number of tokens. The profile run and the capture of CUDA
graphs reach some choices; without this the others are compiled while requests wait.
"""

import bisect
from collections.abc import Hashable
from typing import TYPE_CHECKING, NamedTuple

from torch import nn
from vllm.config import CUDAGraphMode
from vllm.logger import init_logger
from vllm.model_executor.kernels.linear.scaled_mm import int8_few_tokens
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.experts.quark_int8.experts import Int8Experts
from vllm.model_executor.layers.fused_moe.experts.quark_int8.many_tokens import (
    sort_options,
)
from vllm.model_executor.layers.fused_moe.experts.quark_int8.tiles import (
    Architecture,
    FewConfig,
    Shape,
    choose_config,
    get_architecture,
)
from vllm.model_executor.layers.fused_moe.router import triton_router

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_worker import Worker

logger = init_logger(__name__)


class Layer(NamedTuple):
    """What a layer's choice of kernels depends on, beside the number of tokens.

    The same on every rank, or ranks would run the model unlike often and wait for each
    other: of experts that do not divide by the ranks, as many as the fullest rank has.
    """

    topk: int
    num_ids: int
    num_experts: int
    hidden_size: int
    intermediate_size: int
    dp_size: int

    @classmethod
    def of(cls, moe: FusedMoEConfig) -> "Layer":
        return cls(
            moe.experts_per_token,
            moe.num_experts,
            -(-moe.num_experts // moe.ep_size),
            moe.hidden_dim,
            moe.intermediate_size_per_partition,
            moe.dp_size,
        )

    def kernels(self, architecture: Architecture, num_tokens: int) -> Hashable:
        """The same for numbers of tokens that need the same kernels, those of the
        router and of linear layers too."""
        # Experts see the tokens of all data-parallel ranks.
        shape = Shape(num_tokens * self.dp_size, *self[:5])
        config = choose_config(architecture, shape)
        return (
            config,
            # With few tokens, how many programs there are.
            shape.num_tokens
            if isinstance(config, FewConfig)
            else tuple(sort_options(shape.num_pairs, shape.num_experts).values()),
            triton_router.choose_tiles(num_tokens, self.hidden_size),
            bisect.bisect_left(int8_few_tokens.MOST_TOKENS, num_tokens),
        )


def warmup_sizes(
    architecture: Architecture, layer: Layer, captured: int, max_num_tokens: int
) -> list[int]:
    """The first number of tokens beyond `captured` for each set of kernels, but for
    that of max_num_tokens: the profile run has had it."""
    first = {layer.kernels(architecture, max_num_tokens): max_num_tokens}
    for num_tokens in range(captured + 1, max_num_tokens):
        first.setdefault(layer.kernels(architecture, num_tokens), num_tokens)
    return sorted(set(first.values()) - {max_num_tokens})


def has_int8_experts(module: nn.Module) -> bool:
    """Whether this is an MoE layer whose kernel is this fork's, of whatever format."""
    kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
    return kernel is not None and isinstance(kernel.fused_experts, Int8Experts)


def int8_warmup(worker: "Worker") -> None:
    """Run the worker's model for each of `warmup_sizes`, if it has INT8 experts.

    Before CUDA graphs are captured, which runs the model with fewer tokens.
    """
    captured = worker.vllm_config.compilation_config.cudagraph_capture_sizes or [0]
    max_num_tokens = worker.scheduler_config.max_num_batched_tokens
    layers = {
        Layer.of(module.moe_config)
        for module in worker.get_model().modules()
        if has_int8_experts(module)
    }
    sizes: set[int] = set()
    for layer in layers:
        sizes.update(
            warmup_sizes(get_architecture(), layer, max(captured), max_num_tokens)
        )
    for size in sorted(sizes):
        logger.info("Compiling the kernels for %s tokens.", size)
        worker.model_runner._dummy_run(
            size, cudagraph_runtime_mode=CUDAGraphMode.NONE, skip_eplb=True
        )

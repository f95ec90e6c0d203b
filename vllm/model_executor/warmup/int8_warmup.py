# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Compile a model's Triton kernels before the first request, if it has INT8 experts.

Their tiles depend on the number of tokens. The profile run and the capture of CUDA
graphs reach some choices; without this the others are compiled while requests wait.
"""

import bisect
from collections.abc import Hashable
from typing import TYPE_CHECKING, NamedTuple

from vllm.config import CUDAGraphMode
from vllm.logger import init_logger
from vllm.model_executor.kernels.linear.scaled_mm import int8_few_tokens
from vllm.model_executor.layers.fused_moe import int8_moe
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.int8_moe_configs import (
    Architecture,
    FewConfig,
    get_architecture,
)
from vllm.model_executor.layers.fused_moe.router import triton_router
from vllm.model_executor.layers.quantization.quark.quark_moe import (
    QuarkW8A8Int8MoEMethod,
)

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_worker import Worker

logger = init_logger(__name__)


class Experts(NamedTuple):
    """What a layer's choice of kernels depends on, beside the number of tokens."""

    topk: int
    num_ids: int
    num_experts: int
    hidden_size: int
    intermediate_size: int
    dp_size: int

    @classmethod
    def of(cls, moe: FusedMoEConfig) -> "Experts":
        return cls(
            moe.experts_per_token,
            moe.num_experts,
            moe.num_local_experts,
            moe.hidden_dim,
            moe.intermediate_size_per_partition,
            moe.dp_size,
        )

    def kernels(self, architecture: Architecture, num_tokens: int) -> Hashable:
        """The same for numbers of tokens that need the same kernels, those of the
        router and of linear layers too."""
        # Experts see the tokens of all data-parallel ranks.
        of_all = num_tokens * self.dp_size
        config = int8_moe.choose(architecture, of_all, *self[:5])
        return (
            config,
            # With few tokens, how many programs there are.
            of_all
            if isinstance(config, FewConfig)
            else int8_moe.pairs_to_sort_at_once(of_all * self.topk),
            triton_router.choose_tiles(num_tokens, self.hidden_size),
            bisect.bisect_left(int8_few_tokens.MOST_TOKENS, num_tokens),
        )


def warmup_sizes(
    architecture: Architecture, experts: Experts, captured: int, max_num_tokens: int
) -> list[int]:
    """The first number of tokens beyond `captured` for each set of kernels, but for
    that of max_num_tokens: the profile run has had it."""
    first = {experts.kernels(architecture, max_num_tokens): max_num_tokens}
    for num_tokens in range(captured + 1, max_num_tokens):
        first.setdefault(experts.kernels(architecture, num_tokens), num_tokens)
    return sorted(set(first.values()) - {max_num_tokens})


def int8_warmup(worker: "Worker") -> None:
    """Run the worker's model for each of `warmup_sizes`, if `int8_moe` serves it.

    Before CUDA graphs are captured, which runs the model with fewer tokens.
    """
    captured = worker.vllm_config.compilation_config.cudagraph_capture_sizes or [0]
    max_num_tokens = worker.scheduler_config.max_num_batched_tokens
    layers = {
        Experts.of(module.moe_config)
        for module in worker.get_model().modules()
        if isinstance(getattr(module, "quant_method", None), QuarkW8A8Int8MoEMethod)
        and int8_moe.serves(module.moe_config)
    }
    sizes: set[int] = set()
    for experts in layers:
        sizes.update(
            warmup_sizes(get_architecture(), experts, max(captured), max_num_tokens)
        )
    for size in sorted(sizes):
        logger.info("Compiling the kernels for %s tokens.", size)
        worker.model_runner._dummy_run(
            size, cudagraph_runtime_mode=CUDAGraphMode.NONE, skip_eplb=True
        )

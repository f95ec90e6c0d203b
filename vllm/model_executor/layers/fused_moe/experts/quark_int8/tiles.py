# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Tiles of the INT8 (W8A8) fused MoE: a table of choices by device and shape.

The choices for Hopper were measured on an H200; those for other devices follow from
their limits and were compiled but not run: docs/design/int8-moe.md. They are used there
with `--moe-backend quark_int8` alone.
"""

import functools
from dataclasses import dataclass, replace
from typing import Literal

import torch
from vllm.model_executor.kernels.int8_triton import is_hopper
from vllm.utils.math_utils import next_power_of_2

Architecture = Literal["hopper", "cuda", "rocm"]


@dataclass(frozen=True)
class Shape:
    """What the tiles of a layer depend on.

    num_ids counts the experts of all ranks, num_experts those of this rank, and
    intermediate_size this rank's columns of an expert.
    """

    num_tokens: int
    topk: int
    num_ids: int
    num_experts: int
    hidden_size: int
    intermediate_size: int

    @property
    def num_pairs(self) -> int:
        """A pair is a token and one of its experts."""
        return self.num_tokens * self.topk


@dataclass(frozen=True)
class Product:
    """How one of the two grouped products is tiled, beside the layer's block_size_m.

    A tile holds block_size_w rows of the weight, of which w13 needs two for a column of
    the intermediate, and block_size_k numbers of each at a time.
    """

    block_size_w: int
    block_size_k: int = 128
    num_warps: int = 4
    num_stages: int = 3
    swap_ab: bool = False  # weights fill the tensor core's rows, pairs its columns
    tma_w: bool = False  # read weights through TMA descriptors
    tma_a: bool = False  # read pairs through them; w2 alone
    # Blocks of block_size_w rows that a program takes in turn, in place of steps over
    # K; w2 alone, of experts no wider than block_size_k. 0: steps over K.
    blocks: int = 0
    # The kernels of hopper_kernels.py, with num_stages buffers: programs stay and take
    # tiles in turn, `ctas_per_sm` of them on a multiprocessor. In each, `groups` of
    # num_warps multiply: one, or two (always in w2) that take tiles of it in turn.
    persistent: bool = False
    ctas_per_sm: int = 1
    groups: int = 1


@dataclass(frozen=True)
class Config:
    """The tiles of a layer: block_size_m pairs of one expert, in both products."""

    block_size_m: int
    w13: Product
    w2: Product
    pdl: bool = False  # launch each kernel while the one before ends


@dataclass(frozen=True)
class FewConfig:
    """The path for a few tokens.

    A program multiplies block_size_n columns by whole rows at a time; `ctas_per_sm` of
    them on a multiprocessor take turns, as many as there are columns where that is 0.
    """

    w13_block_size_n: int
    w13_num_warps: int
    w13_stages: int
    w13_ctas_per_sm: int
    w2_block_size_n: int
    w2_num_warps: int
    w2_stages: int
    w2_ctas_per_sm: int
    pdl: bool = False


def _same(block_size_m: int, product: Product) -> Config:
    return Config(block_size_m, product, product)


# The most pairs for each expert, on average, and the tiles up to there. Up to 60 the
# weights are the traffic: a tile is thin and holds all pairs of almost every expert, so
# that weights are read once, and the weights fill the tensor core's 64 rows. Beyond, a
# tile is as large as the accumulators in registers allow. With 8 pairs Triton takes
# Ampere's instruction, which has 8 columns.
_THIN = Product(64, 256, 4, 3, swap_ab=True, tma_w=True)
_LONG = replace(_THIN, num_stages=4)
_MANY_W13 = Product(256, 128, 8, 4, tma_w=True, persistent=True)
_TURNS_W13 = Product(128, 128, 4, 6, tma_w=True, persistent=True, groups=2)
_TURNS_W2 = replace(_TURNS_W13, tma_a=True)
_HOPPER = (
    (2, Config(8, replace(_LONG, block_size_k=512), _THIN, pdl=True)),
    (8, Config(16, _LONG, _THIN, pdl=True)),
    (22, Config(32, _THIN, replace(_THIN, tma_a=True), pdl=True)),
    (
        60,
        Config(
            64,
            replace(_THIN, block_size_w=128),
            Product(128, 128, 4, 3, tma_w=True, tma_a=True),
            pdl=True,
        ),
    ),
    (128, Config(128, _MANY_W13, _TURNS_W2, pdl=True)),
    (float("inf"), Config(128, _MANY_W13, _TURNS_W2)),
)
# Of few experts the weights are soon read, so that the start and the end of programs
# weigh: programs stay from fewer pairs on.
_FEW_EXPERTS = 128
_HOPPER_FEW_EXPERTS = (
    *_HOPPER[:3],
    (60, Config(64, _TURNS_W13, _TURNS_W2, pdl=True)),
    *_HOPPER[4:],
)
# Experts of 256 columns or fewer: w2 has but one step, and tiles of 256 rows of w13
# would reach far beyond the width.
_NARROW_W2 = Product(128, 256, 4, 3, swap_ab=True, tma_w=True, blocks=4)
_NARROW_W13 = Product(128, 128, 4, 3, tma_w=True, persistent=True, ctas_per_sm=2)
_NARROW_WIDE_W2 = Product(64, 256, 4, 4, tma_w=True, blocks=16)
_HOPPER_NARROW = (
    (10, Config(16, _LONG, _NARROW_W2, pdl=True)),
    (30, Config(32, _LONG, _NARROW_W2, pdl=True)),
    (60, Config(64, _TURNS_W13, _NARROW_WIDE_W2)),
    (float("inf"), Config(128, _NARROW_W13, _NARROW_WIDE_W2)),
)
# 99 KiB of shared memory (compute capability 8.6 and 8.9) must hold num_stages tiles.
_CUDA = (
    (8, _same(16, Product(64, 128, 4, 4, swap_ab=True))),
    (80, _same(64, Product(128, 64, 4, 4))),
    (float("inf"), _same(128, Product(128, 64, 8, 4))),
)
# For MI300 by what the compiled code executes, not measured; see
# docs/design/mi300-kernels.md. 64 KiB of LDS hold one tile of two or three workgroups,
# and the next waits in registers.
# Up to 80 pairs an expert the traffic of weights takes longest: a tile holds all of the
# pairs. Beyond, matrix instructions do, if LDS keeps up: a tile of 128 x 128 reads less
# of it for each product than smaller ones, and leaves room for a second workgroup, that
# multiplies while the other one loads. With eight waves of 128 x 256 there is no room,
# and Triton lets waves take turns: one writes to LDS while reads of another, for which
# it has not waited, may not have happened.
_ROCM = (
    (8, _same(16, Product(128, 128, 4, 2))),
    (80, _same(64, Product(128, 128, 4, 2))),
    (float("inf"), _same(128, Product(128, 128, 4, 2))),
)
_TABLES = {"hopper": _HOPPER, "cuda": _CUDA, "rocm": _ROCM}

# With more tokens the path for a few reads too much twice: every pair reads its expert.
_FEW_TOKENS = 8
# Bytes of an expert beyond which half as many are enough for that. On Hopper two tokens
# are, if they have more pairs than a fifth of the experts.
_LARGE_EXPERT = 1 << 22
# Words of four int8 that a program of it multiplies at a time; they lie in registers.
_FEW_WORDS = 16384


@functools.cache
def get_architecture() -> Architecture:
    if torch.version.hip:
        return "rocm"
    return "hopper" if is_hopper() else "cuda"


def choose_config(architecture: Architecture, shape: Shape) -> Config | FewConfig:
    """The tiles of a layer for a number of tokens."""
    few = _choose_few(architecture, shape)
    if few is not None:
        return few
    table = _TABLES[architecture]
    pairs_per_expert = shape.num_pairs / shape.num_ids
    if architecture == "hopper" and shape.intermediate_size <= 256:
        table = _HOPPER_NARROW
    elif architecture == "hopper" and shape.num_experts <= _FEW_EXPERTS:
        table = _HOPPER_FEW_EXPERTS
    return next(config for most, config in table if pairs_per_expert <= most)


def _choose_few(architecture: Architecture, shape: Shape) -> FewConfig | None:
    """How to take the path for a few tokens, None to take the other one."""
    num_tokens, width = shape.num_tokens, shape.intermediate_size
    w13_words = next_power_of_2(shape.hidden_size // 4)
    w2_words = next_power_of_2(width // 4) * next_power_of_2(shape.topk)
    is_large = 3 * width * shape.hidden_size > _LARGE_EXPERT
    is_crowded = is_large and num_tokens > 1 and architecture == "hopper"
    if (
        num_tokens > (_FEW_TOKENS // 2 if is_large else _FEW_TOKENS)
        or shape.num_pairs * (5 if is_crowded else 2) >= shape.num_ids
        or w13_words > 4096
        or w2_words > _FEW_WORDS
    ):
        return None
    w2_block_size_n = min(_FEW_WORDS // w2_words, 16)
    if architecture != "hopper":
        w13_block_size_n = min(4096 // w13_words, 16)
        return FewConfig(w13_block_size_n, 4, 1, 0, w2_block_size_n, 8, 1, 0)
    if num_tokens == 1:
        w13 = min(max(2048 // w13_words, 1), 16), 4, 2, 3
    else:
        w13 = min(4096 // w13_words, 16), 4, 3, 3
    if width <= 256:
        w2 = max(w2_block_size_n // 2, 1), 4, 2, 4
    elif num_tokens == 1:
        w2 = w2_block_size_n, 4, 3, 1
    else:
        w2 = max(w2_block_size_n // 2, 1), 4, 3, 2
    return FewConfig(*w13, *w2, pdl=True)

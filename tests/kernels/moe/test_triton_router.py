# SPDX-License-Identifier: Apache-2.0
"""The router's product and choice in Triton, against float64.

On a GPU if there is one, else in Triton's interpreter.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.model_executor.kernels import int8_triton
from vllm.model_executor.layers.fused_moe.router import triton_router
from vllm.model_executor.layers.fused_moe.router.triton_router import (
    FewTiles,
    Tiles,
    choose_tiles,
    router_logits,
    run_product,
    topk_sigmoid,
)
from vllm.model_executor.models import step3p5
from vllm.platforms.interface import Platform

from tests.kernels.utils import DEVICE, interpreted
from tests.platforms import pretended

# Small ones, and what the engine takes.
CHOSEN = Tiles(64, 64, 64, 4, 3), Tiles(128, 64, 64, 4, 3)
TILES = Tiles(16, 16, 32, 4, 2), Tiles(32, 64, 64, 4, 3), *CHOSEN


def assert_product(found: Tensor, x: Tensor, weight: Tensor) -> None:
    """As near to the exact product as float32 that is added up in some order."""
    exact = x.double() @ weight.double().T
    size = x.double().abs() @ weight.double().abs().T
    assert found.dtype == torch.float32 and found.shape == exact.shape
    assert ((found.double() - exact).abs() <= size * 2**-21).all()


@interpreted
@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 33])
@pytest.mark.parametrize(("experts", "hidden"), [(6, 64), (36, 80), (1, 16)])
def test_product_is_exact_to_float32(
    num_tokens: int, experts: int, hidden: int, rng: torch.Generator
) -> None:
    x = torch.randn(num_tokens, hidden, generator=rng).bfloat16().to(DEVICE)
    weight = torch.randn(experts, hidden, generator=rng).to(DEVICE)
    assert_product(router_logits(x, weight), x, weight)
    for tiles in (FewTiles(1, 2, 4), FewTiles(4, 1, 4), *TILES):
        assert_product(run_product(tiles, x, weight), x, weight)


@interpreted
def test_all_of_a_weights_bits_count(rng: torch.Generator) -> None:
    """A weight that differs in its last bit gives another product."""
    x = torch.eye(16).bfloat16().to(DEVICE)
    weight = torch.randn(16, 16, generator=rng).to(DEVICE)
    for tiles in (FewTiles(1, 2, 4), *TILES):
        assert torch.equal(run_product(tiles, x, weight), weight.T)


@interpreted
def test_sums_of_one_sign_are_as_good_as_float32s(rng: torch.Generator) -> None:
    """Where sums grow, a bit lost in each step would show."""
    x = torch.rand(40, 4096, generator=rng).bfloat16().to(DEVICE)
    weight = torch.rand(20, 4096, generator=rng).to(DEVICE)
    exact = x.double() @ weight.double().T
    for tiles in (FewTiles(1, 2, 4), *TILES):
        found = run_product(tiles, x, weight)
        assert ((found - exact).abs() <= exact * 2**-20).all()


def in_float64(
    logits: Tensor, top_k: int, renormalize: bool, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Weights and ids, one token at a time. Ties go to the lower id."""
    weights, ids = [], []
    for row in logits.double().cpu():
        scores = 1 / (1 + (-row).exp())
        biased = scores if bias is None else scores + bias.double().cpu()
        best = sorted(range(len(row)), key=lambda e: (-biased[e].item(), e))[:top_k]
        chosen = scores[best]
        weights.append(chosen / chosen.sum() if renormalize else chosen)
        ids.append(best)
    return torch.stack(weights), torch.tensor(ids)


def choose(
    logits: Tensor,
    top_k: int,
    renormalize: bool,
    bias: Tensor | None,
    operator: Callable[..., None] = topk_sigmoid,
    **kwargs: float,
) -> tuple[Tensor, Tensor, Tensor]:
    size = logits.shape[0], top_k
    weights = torch.full(size, torch.nan, device=DEVICE)
    ids, rows = (
        torch.full(size, -1, dtype=torch.int32, device=DEVICE) for _ in range(2)
    )
    operator(weights, ids, rows, logits, renormalize, bias, **kwargs)
    return weights.cpu(), ids.cpu(), rows.cpu()


@interpreted
@pytest.mark.parametrize("renormalize", [False, True], ids=["scores", "renormalized"])
@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(
    ("num_tokens", "experts", "top_k"), [(5, 288, 8), (3, 36, 5), (1, 7, 7), (0, 6, 2)]
)
def test_choice_matches_float64(
    num_tokens: int,
    experts: int,
    top_k: int,
    has_bias: bool,
    renormalize: bool,
    rng: torch.Generator,
) -> None:
    logits = torch.randn(num_tokens, experts, generator=rng).to(DEVICE)
    bias = torch.randn(experts, generator=rng).to(DEVICE) if has_bias else None
    factor = 1 + torch.rand((), generator=rng).item()
    weights, ids, rows = choose(
        logits, top_k, renormalize, bias, routed_scaling_factor=factor
    )
    if num_tokens == 0:
        return
    wanted, wanted_ids = in_float64(logits, top_k, renormalize, bias)
    assert torch.equal(ids.long(), wanted_ids)
    torch.testing.assert_close(weights.double(), factor * wanted, rtol=1e-6, atol=1e-7)
    token, choice = torch.arange(num_tokens)[:, None], torch.arange(top_k)[None, :]
    assert torch.equal(rows.long(), choice * num_tokens + token)


@interpreted
def test_equal_scores_go_to_the_lower_expert() -> None:
    logits = torch.zeros(2, 36, device=DEVICE)
    logits[1, 20:] = 1
    weights, ids, _ = choose(logits, 3, True, None)
    assert ids.tolist() == [[0, 1, 2], [20, 21, 22]]
    torch.testing.assert_close(weights, torch.full((2, 3), 1 / 3))


@interpreted
def test_scores_of_zero_stay_zero() -> None:
    weights, ids, _ = choose(torch.full((1, 6), -200.0, device=DEVICE), 2, True, None)
    assert weights.tolist() == [[0, 0]] and ids.tolist() == [[0, 1]]


@interpreted
def test_scores_that_are_nan_are_not_chosen() -> None:
    """288 is no power of two: what is beyond it never is an expert."""
    logits = torch.full((3, 288), torch.nan, device=DEVICE)
    logits[1] = torch.arange(288.0, device=DEVICE) / 100
    logits[1, 280:] = torch.nan
    logits[2, 5] = 1
    weights, ids, _ = choose(logits, 3, False, None)
    assert ids.tolist() == [[0, 0, 0], [279, 278, 277], [5, 0, 0]]
    assert weights[0].isnan().all() and not weights[1].isnan().any()


@pytest.mark.parametrize("capability", [(9, 0), (8, 0)])
def test_serves_hopper_where_upstream_is_slow(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_triton, "current_platform", pretended.cuda(*capability))
    hopper = capability == (9, 0)

    def logits(experts: int) -> Tensor:
        return torch.empty(1, experts, device="meta")

    served = {
        e for e in (36, 256, 288, 384, 1040) if triton_router.serves_choice(logits(e))
    }
    assert served == ({36, 288} if hopper else set())
    weight = logits(4)
    assert triton_router.serves_product(weight.bfloat16(), weight) == hopper
    assert not triton_router.serves_product(weight, weight)
    assert not triton_router.serves_product(logits(5).bfloat16(), weight)
    assert not triton_router.serves_product(weight.bfloat16(), weight.bfloat16())


@pytest.mark.needs_patch("0031")
@pytest.mark.parametrize(
    ("platform", "served"),
    [
        (pretended.cuda(8, 0), True),
        (pretended.cuda(10, 0), True),
        (pretended.rocm(), True),
        (pretended.cuda(7, 5), False),
        (pretended.cpu(), False),
    ],
)
def test_other_gpus_take_it_where_that_is_asked_for(
    platform: Platform, served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_triton, "current_platform", platform)
    logits = torch.empty(1, 288, device="meta")
    x, weight = torch.empty(1, 4, dtype=torch.bfloat16), torch.empty(3, 4)
    for asked, expected in (("auto", False), ("on", served)):
        monkeypatch.setenv("VLLM_QUARK_INT8_KERNELS", asked)
        assert triton_router.serves_choice(logits) == expected
        assert triton_router.serves_product(x, weight) == expected
    monkeypatch.setattr(triton_router.envs, "VLLM_BATCH_INVARIANT", True)
    assert not triton_router.serves_product(x, weight)


@pytest.mark.needs_patch("0031")
def test_a_misspelt_switch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_QUARK_INT8_KERNELS", "yes")
    with pytest.raises(ValueError, match="VLLM_QUARK_INT8_KERNELS.*auto.*on"):
        int8_triton.serves_here()


@interpreted
@pytest.mark.parametrize("num_tokens", [0, 1, 64, 65, 1023, 1024])
def test_every_number_of_tokens_is_served(
    num_tokens: int, rng: torch.Generator
) -> None:
    """By one kernel, the other, or upstream's."""
    x = torch.randn(num_tokens, 16, generator=rng).bfloat16().to(DEVICE)
    weight = torch.randn(4, 16, generator=rng).to(DEVICE)
    assert_product(router_logits(x, weight), x, weight)


def test_leaves_logits_that_are_not_to_depend_on_the_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Upstream's product: ours adds up in another order for more tokens."""
    monkeypatch.setattr(int8_triton, "current_platform", pretended.cuda(9, 0))
    x = torch.empty(1, 4, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(3, 4, device="meta")
    assert triton_router.serves_product(x, weight)
    monkeypatch.setattr(triton_router.envs, "VLLM_BATCH_INVARIANT", True)
    assert not triton_router.serves_product(x, weight)


def test_leaves_few_tokens_to_a_gate_with_a_kernel_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(int8_triton, "current_platform", pretended.cuda(9, 0))
    weight = torch.empty(3, 4, device="meta")
    older = SimpleNamespace(weight=weight)
    newer = SimpleNamespace(weight=weight, allow_ll_fp32w_gemm=True, FP32_MAX_TOKENS=32)
    for num_tokens in (1, 32, 33):
        x = torch.empty(num_tokens, 4, dtype=torch.bfloat16, device="meta")
        assert triton_router.serves_gate(older, x)
        assert triton_router.serves_gate(newer, x) == (num_tokens > 32)


@pytest.mark.parametrize("hidden", [16, 4096, 4097, 12288])
def test_tiles_fit_a_multiprocessor(hidden: int) -> None:
    """Rows lie in registers, stages in shared memory, sums of a step and of all too;
    what is tested above is what is chosen."""
    chosen = {choose_tiles(m, hidden) for m in [*range(1, 70), *range(70, 20000, 97)]}
    for tiles in chosen - {None}:
        if isinstance(tiles, FewTiles):
            words = 1 << (hidden - 1).bit_length()
            # bfloat16 of tokens, float32 of weights.
            held = tiles.block_size_m / 2 + tiles.block_size_e
            per_thread = held * words / tiles.num_warps / 32
            assert per_thread <= 255
        else:
            assert tiles in TILES
            parts = (
                2 * tiles.block_size_m + 3 * 2 * tiles.block_size_e
            )  # bfloat16, three of w
            assert tiles.num_stages * tiles.block_size_k * parts <= 227 << 10
            assert tiles.block_size_m * tiles.block_size_e / tiles.num_warps <= 2048


def test_gate_of_step_3p5_asks_it(monkeypatch: pytest.MonkeyPatch, vllm_config) -> None:
    """Patch 0022: the router's product, wherever it serves."""
    make: Any = getattr(step3p5, "FP32ReplicatedLinear", None)  # up to 0.26.0
    if make is None:
        make = partial(step3p5.TensorCoreGate, out_dtype=torch.float32)
    gate = make(16, 6, bias=False, params_dtype=torch.float32, prefix="gate")
    torch.nn.init.normal_(gate.weight)
    weight = gate.weight.data.clone().to(DEVICE)
    gate.quant_method.process_weights_after_loading(gate.to(DEVICE))
    x = torch.randn(3, 16, dtype=torch.bfloat16, device=DEVICE)
    expected, _ = gate(x)
    assert_product(expected, x, weight)
    asked = []

    def product(x: Tensor, weight: Tensor) -> Tensor:
        asked.append((x, weight))
        return expected + 1

    monkeypatch.setattr(triton_router, "serves_product", lambda *_: True)
    monkeypatch.setattr(torch.ops.quark_int8, "router_logits", product)
    found, bias = gate(x)
    assert asked == [(x, gate.weight)] and bias is None
    torch.testing.assert_close(found, expected + 1)


@interpreted
def test_upstreams_operator_asks_it(
    monkeypatch: pytest.MonkeyPatch, rng: torch.Generator
) -> None:
    """Patch 0023: the choice, wherever it serves, each argument in its place."""
    monkeypatch.setattr(triton_router, "serves_choice", lambda *_: True)
    monkeypatch.setattr(ops, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    # Which a build for CPUs does not have, nor more experts than its own any build.
    monkeypatch.setattr(torch.ops, "_moe_C", None, raising=False)
    logits = torch.randn(5, 36, generator=rng).to(DEVICE)
    bias = torch.randn(36, generator=rng).to(DEVICE)
    weights, ids, _ = choose(logits, 3, True, bias, ops.topk_sigmoid)
    wanted_weights, wanted_ids = in_float64(logits, 3, True, bias)
    assert torch.equal(ids.long(), wanted_ids)
    torch.testing.assert_close(weights.double(), wanted_weights, rtol=1e-6, atol=1e-7)

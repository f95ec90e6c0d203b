# SPDX-License-Identifier: Apache-2.0
"""ask_checkpoints.py for releases of which the fork has the group `fix` alone.

On a GPU it changes nothing. On a CPU these releases have neither the choice of experts
nor the fused-MoE kernel for INT8: both have a stand-in in plain torch here. vLLM still
reads the config, chooses what is quantized, loads and shapes every tensor, and has its
own linear layers. The stand-in reads scales by the rules of the Triton kernel, so that
wrong ones give wrong answers.
"""

import importlib.util
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ask_checkpoints  # beside this script
import torch
from vllm import _custom_ops as ops
from vllm.model_executor.layers import fused_moe
from vllm.model_executor.layers.activation import SiluAndMul, SwigluStepAndMul
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.platforms import current_platform

OVERLAY = Path(__file__).parent.parent / "vllm/model_executor/layers/fused_moe"


def cpu_topk() -> Any:
    """The overlay's choice of experts, which imports torch alone."""
    path = OVERLAY / "router/cpu_topk.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def quantize(
    x: torch.Tensor, scale: torch.Tensor | None, per_token: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """INT8 values as float64, in which sums of their products are exact, and scales."""
    x = x.double()
    if per_token:
        scale = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-10) / 127
    assert scale is not None
    return (x / scale).round().clamp(-128, 127), scale.double()


def of_expert(scale: torch.Tensor, expert: int, per_token: bool) -> torch.Tensor:
    """A scale a channel where activations are scaled a token; else the one at the
    expert's place in memory."""
    found = scale[expert].flatten() if per_token else scale.flatten()[expert]
    return found.double()


def gate(activation: MoEActivation, x: torch.Tensor) -> torch.Tensor:
    """The activation as vLLM's layers of it have it in torch: some are Triton else."""
    if activation == MoEActivation.SWIGLUSTEP:
        return SwigluStepAndMul.forward_native(SimpleNamespace(limit=7.0), x)
    assert activation == MoEActivation.SILU
    return SiluAndMul.forward_native(x)


def fused_experts(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: MoEActivation = MoEActivation.SILU,
    expert_map: torch.Tensor | None = None,
    quant_config: Any = None,
    **options: Any,
) -> torch.Tensor:
    """What vLLM's function of this name does with INT8 weights."""
    assert quant_config.use_int8_w8a8 and not options["apply_router_weight_on_input"]
    per_token = quant_config.per_act_token_quant
    if expert_map is not None:
        topk_ids = expert_map[topk_ids]
    result = torch.zeros_like(hidden_states, dtype=torch.float32)
    x, x_scale = quantize(hidden_states, quant_config.a1_scale, per_token)
    for expert in topk_ids.unique().tolist():
        if expert < 0:  # another rank's
            continue
        token, place = (topk_ids == expert).nonzero(as_tuple=True)
        y = x[token] @ w1[expert].double().T
        y *= x_scale[token] if per_token else x_scale
        y *= of_expert(quant_config.w1_scale, expert, per_token)
        y = y.to(hidden_states.dtype)
        gated = gate(activation, y)
        z, z_scale = quantize(gated, quant_config.a2_scale, per_token)
        z = z @ w2[expert].double().T * z_scale
        z *= of_expert(quant_config.w2_scale, expert, per_token)
        weighed = z.float() * topk_weights[token, place, None]
        result.index_add_(0, token, weighed)
    return result.to(hidden_states.dtype)


def stand_in() -> None:
    topk = cpu_topk()

    # The third argument is scratch of the kernels.
    def topk_softmax(weights, ids, _, *args, **kwargs) -> None:
        topk.topk_softmax(weights, ids, *args, **kwargs)

    def topk_sigmoid(weights, ids, _, *args, **kwargs) -> None:
        topk.topk_sigmoid(weights, ids, *args, **kwargs)

    ops.topk_softmax, ops.topk_sigmoid = topk_softmax, topk_sigmoid
    fused_moe.fused_experts = fused_experts
    # 0.18 does not start without these names, which make it faster.
    os.environ["LD_PRELOAD"] = os.environ.get("LD_PRELOAD", "") + " libtcmalloc libiomp"
    # The runner of a CPU asks a CUDA build of torch for a GPU when it ends.
    torch.accelerator.synchronize = lambda *_: None


if __name__ == "__main__":
    if current_platform.is_cpu():
        stand_in()
    ask_checkpoints.main()

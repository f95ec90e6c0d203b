# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""An INT8 linear layer behind attention whose heads are gated, in the layer's kernels.

A gate of its own reads and writes all of attention's output before it is quantized.
"""

import torch
from torch import nn
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.kernels.linear.scaled_mm.int8_few_tokens import (
    FewTokensInt8ScaledMMLinearKernel,
)
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.layers.quantization.quark.quark import QuarkLinearMethod


def serves_gate(layer: nn.Module) -> bool:
    """Whether `gated_linear` computes this layer: a row-parallel one of Quark's without
    bias, to which the kernel of INT8 linear layers on Hopper belongs, and nothing that
    does more before or around it."""
    if type(layer) is not RowParallelLinear:
        return False
    if type(layer.quant_method) is not QuarkLinearMethod:
        return False
    kernel = getattr(layer.scheme, "kernel", None)
    return (
        isinstance(kernel, FewTokensInt8ScaledMMLinearKernel)
        and bool(layer.input_is_parallel)
        and layer.bias is None
    )


def gated_linear(
    layer: RowParallelLinear, x: torch.Tensor, gate: torch.Tensor
) -> torch.Tensor:
    """The layer's output for x [..., K] times the sigmoid of its heads' gate [...,
    heads]. Upstream rounds what it gates to the dtype of x; this rounds nothing."""
    kernel: FewTokensInt8ScaledMMLinearKernel = layer.scheme.kernel
    weight, weight_scale, input_scale, _, _ = kernel._get_layer_params(layer)
    out = torch.ops.quark_int8.int8_linear(
        x, weight, weight_scale, input_scale, None, gate
    )
    if layer.reduce_results and layer.tp_size > 1:
        out = tensor_model_parallel_all_reduce(out)
    return out

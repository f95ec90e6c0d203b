# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""INT8 linear layers on CPUs where upstream's kernel is wrong or missing."""

from typing import TYPE_CHECKING

import torch
import vllm._custom_ops as ops
from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import (
    Int8ScaledMMLinearKernel,
    Int8ScaledMMLinearLayerConfig,
)
from vllm.model_executor.layers.quantization.utils.cpu_int8_utils import (
    has_exact_int8_dot,
    per_token_quant_int8,
    per_token_quant_int8_asymmetric,
    static_per_tensor_quant_int8,
)
from vllm.model_executor.layers.quantization.utils.w8a8_utils import (
    convert_to_channelwise,
)
from vllm.model_executor.utils import replace_parameter
from vllm.platforms import current_platform

if TYPE_CHECKING:
    from vllm.model_executor.layers.linear import LinearBase


class CPUExactInt8ScaledMMLinearKernel(Int8ScaledMMLinearKernel):
    """W8A8 with exact products on any CPU.

    Steps back where upstream's kernel is right, and faster: on CPUs with VNNI but no
    AMX. Without VNNI that kernel saturates, and an AVX2 build of vLLM lacks it; with
    AMX and many threads it is wrong for some shapes (on 16 cores, [256, 4096]).
    """

    @classmethod
    def is_supported(
        cls, compute_capability: int | None = None
    ) -> tuple[bool, str | None]:
        if not current_platform.is_cpu():
            return False, "requires CPU."
        has_amx = torch.cpu._is_amx_tile_supported()
        if ops._supports_onednn and has_exact_int8_dot() and not has_amx:
            return False, "is not needed on this CPU."
        return True, None

    @classmethod
    def can_implement(cls, c: Int8ScaledMMLinearLayerConfig) -> tuple[bool, str | None]:
        return True, None

    def process_weights_after_loading(self, layer: "LinearBase") -> None:
        _, scale_name, input_scale_name, zero_name, sums_name = self.layer_param_names
        weight, scale, input_scale, zero_point, _ = self._get_layer_params(layer)
        if not self.config.is_channelwise:
            scale = convert_to_channelwise(scale, layer.logical_widths)
        replace_parameter(layer, scale_name, scale.view(1, -1))
        is_static = self.config.is_static_input_scheme
        if self.config.input_symmetric:
            if is_static:
                replace_parameter(layer, input_scale_name, input_scale.max())
            return
        # Whole numbers, as the product with a zero point wants them.
        sums = weight.sum(dim=1, dtype=torch.float64)
        replace_parameter(layer, sums_name, sums)
        if is_static:
            input_scale, zero_point = _cover(input_scale, zero_point)
            replace_parameter(layer, input_scale_name, input_scale)
            replace_parameter(layer, zero_name, zero_point)

    def apply_weights(
        self,
        layer: "LinearBase",
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        weight, weight_scale, input_scale, zero_point, sums = self._get_layer_params(
            layer
        )
        is_symmetric = self.config.input_symmetric
        rows = x.reshape(-1, x.shape[-1])
        if input_scale is not None:
            rows_q, row_scale = static_per_tensor_quant_int8(
                rows, input_scale, None if is_symmetric else zero_point
            )
        elif is_symmetric:
            rows_q, row_scale = per_token_quant_int8(rows)
        else:
            rows_q, row_scale, zero_point = per_token_quant_int8_asymmetric(rows)
        out = torch.ops.quark_int8.cpu_int8_mm(rows_q, weight)
        if not is_symmetric:
            # A row far from zero has a zero point whose product passes 32 bits.
            zero_points = zero_point.double().flatten().expand(rows.shape[0])
            out = out.double().addr_(zero_points, sums, alpha=-1).float()
        out = out * row_scale * weight_scale
        if bias is not None:
            out += bias
        return out.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def _cover(
    scales: torch.Tensor, zero_points: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One scale and zero point, float32 and int32, for the ranges of all parts of a
    fused layer, as upstream's kernels choose them."""
    zero_points = zero_points.to(torch.int32)
    smallest = (scales * (-128 - zero_points)).min()
    largest = (scales * (127 - zero_points)).max()
    scale = (largest - smallest) / 255
    return scale, (-128 - smallest / scale).round().to(torch.int32)

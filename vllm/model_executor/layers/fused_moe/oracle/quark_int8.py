# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which kernel applies Quark's INT8 experts: the part of the INT8 oracle that upstream
lacks.

Upstream's oracle chooses for compressed-tensors, which has one scheme, and from 0.27.0
for Quark's experts with dynamic activations. Quark has four schemes, and a kernel of
upstream's that reads three of them, one through patch 0009.
"""

from collections.abc import Sequence
from importlib.util import find_spec

import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.oracle import int8
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    QuantKey,
    kInt8DynamicTokenSym,
    kInt8StaticChannelSym,
    kStaticTensorScale,
)

logger = init_logger(__name__)

kInt8StaticTensorSym = QuantKey(
    kInt8StaticChannelSym.dtype, kStaticTensorScale, symmetric=True
)
# Weights per channel or per tensor; activations per token, or static per tensor.
SCHEMES = tuple(
    (weight_key, activation_key)
    for weight_key in (kInt8StaticChannelSym, kInt8StaticTensorSym)
    for activation_key in (kInt8DynamicTokenSym, kInt8StaticTensorSym)
)

_EXPERTS = "vllm.model_executor.layers.fused_moe.experts"


def experts_classes() -> list[type[mk.FusedMoEExperts]]:
    """The fork's own experts that this build holds, of `--moe-backend quark_int8`."""
    classes: list[type[mk.FusedMoEExperts]] = []
    if find_spec(f"{_EXPERTS}.quark_int8"):
        from vllm.model_executor.layers.fused_moe.experts.quark_int8.experts import (
            Int8Experts,
        )

        classes.append(Int8Experts)
    if find_spec(f"{_EXPERTS}.quark_int8_cpu"):
        from vllm.model_executor.layers.fused_moe.experts.quark_int8_cpu import (
            Int8CpuExperts,
        )

        classes.append(Int8CpuExperts)
    return classes


def quant_keys(per_channel: bool, static: bool) -> tuple[QuantKey, QuantKey]:
    """Of Quark's weights, and of their activations."""
    return (
        kInt8StaticChannelSym if per_channel else kInt8StaticTensorSym,
        kInt8StaticTensorSym if static else kInt8DynamicTokenSym,
    )


def select_quark_int8_experts(
    moe_config: FusedMoEConfig,
    weight_key: QuantKey | None,
    activation_key: QuantKey | None,
    layer_name: str = "Experts",
) -> type[mk.FusedMoEExperts]:
    """The class for Quark's INT8 experts: the fork's own where it serves, else
    upstream's Triton kernel, which any `--moe-backend` but auto and quark_int8 names.

    Raises:
        NotImplementedError: no kernel serves; it names the layer and each reason.
    """
    from vllm.model_executor.layers.fused_moe.experts.triton_int8_moe import (
        TritonInt8Experts,
    )

    backend = moe_config.moe_backend
    candidates: list[type[mk.FusedMoEExperts]] = []
    if backend in ("auto", "quark_int8"):
        candidates += experts_classes()
    if backend != "quark_int8":
        candidates.append(TritonInt8Experts)
    found, reasons = _first_that_serves(
        candidates, moe_config, weight_key, activation_key
    )
    if found is None:
        raise _no_kernel(layer_name, weight_key, activation_key, backend, reasons)
    return found


def select_quark_int8_backend(
    moe_config: FusedMoEConfig,
    weight_key: QuantKey,
    activation_key: QuantKey,
    layer_name: str,
) -> tuple[int8.Int8MoeBackend, type[mk.FusedMoEExperts]]:
    """`select_quark_int8_experts` for releases whose oracle serves Quark's experts:
    with dynamic activations upstream's choice takes the place of that Triton kernel.

    Returns:
        The back end whose layout the weights take, and the class.

    Raises:
        NotImplementedError: no kernel serves; it names the layer and each reason.
        ValueError: `--moe-backend` names one of upstream's that does not serve.
    """
    backend = moe_config.moe_backend
    is_static = activation_key.scale.static
    reasons: list[str] = []
    if (
        moe_config.swiglu_limit is not None
        and moe_config.activation is MoEActivation.SILU
    ):
        reasons.append(f"this fork's experts clip no SiLU at {moe_config.swiglu_limit}")
    elif is_static or backend in ("auto", "quark_int8"):
        own = experts_classes() if backend in ("auto", "quark_int8") else []
        if is_static and backend in ("auto", "triton"):
            from vllm.model_executor.layers.fused_moe.experts.triton_int8_moe import (
                TritonInt8Experts,
            )

            own.append(TritonInt8Experts)
        found, reasons = _first_that_serves(own, moe_config, weight_key, activation_key)
        if found is not None:
            return int8.Int8MoeBackend.TRITON, found
    if is_static and backend not in ("auto", "triton", "quark_int8"):
        reasons.append(f"{backend} reads no static activations; take auto")
    if is_static or backend == "quark_int8":
        raise _no_kernel(layer_name, weight_key, activation_key, backend, reasons)
    try:
        # Patch 0009 gives per-tensor weights a scale for each channel.
        return int8.select_int8_moe_backend(
            moe_config, kInt8StaticChannelSym, kInt8DynamicTokenSym
        )
    except NotImplementedError as error:
        reasons.append(str(error))
        raise _no_kernel(
            layer_name, weight_key, activation_key, backend, reasons
        ) from None


def _first_that_serves(
    candidates: Sequence[type[mk.FusedMoEExperts]],
    moe_config: FusedMoEConfig,
    weight_key: QuantKey | None,
    activation_key: QuantKey | None,
) -> tuple[type[mk.FusedMoEExperts] | None, list[str]]:
    """The first class that serves, and why those before it do not."""
    activation_format = (
        mk.FusedMoEActivationFormat.BatchedExperts
        if moe_config.moe_parallel_config.use_batched_activation_format
        else mk.FusedMoEActivationFormat.Standard
    )
    reasons: list[str] = []
    for experts_cls in candidates:
        supported, reason = experts_cls.is_supported_config(
            experts_cls, moe_config, weight_key, activation_key, activation_format
        )
        if supported:
            logger.info_once(
                "Using %s for Quark's INT8 MoE out of potential experts: %s.",
                experts_cls.__name__,
                ", ".join(candidate.__name__ for candidate in candidates),
            )
            return experts_cls, reasons
        reasons.append(f"{experts_cls.__name__}: {reason}")
        logger.debug_once("%s does not serve: %s", experts_cls.__name__, reason)
    return None, reasons


def _no_kernel(
    layer_name: str,
    weight_key: QuantKey | None,
    activation_key: QuantKey | None,
    backend: str,
    reasons: Sequence[str],
) -> NotImplementedError:
    return NotImplementedError(
        f"{layer_name}: expected INT8 experts that a kernel reads, found weights "
        f"{weight_key} with activations {activation_key}, which none does with "
        f"--moe-backend {backend} here: {'; '.join(reasons) or 'this build has none'}."
    )

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What stands in for parts of vLLM while a model is built and not run."""

from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from typing import Any


@contextmanager
def in_place_of(owner: Any, name: str, value: Any) -> Generator[None, None, None]:
    """An attribute of a module, class or object that has another value for a while."""
    had, before = name in vars(owner), getattr(owner, name, None)
    before = vars(owner)[name] if had else before
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


@contextmanager
def quantized_by(quant_config: Any) -> Generator[None, None, None]:
    """Configs of the engine get this quantization config, whatever the folder says."""
    from vllm.config import VllmConfig

    ours = staticmethod(lambda model_config, load_config: quant_config)
    with (
        in_place_of(VllmConfig, "_get_quantization_config", ours),
        # Asked by models that load a second one.
        in_place_of(VllmConfig, "get_quantization_config", ours),
    ):
        yield


class _AnyAttentionImpl:
    """Attention that is built and computes nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def any_platform(lacks: list[str]) -> Generator[None, None, None]:
    """Of attention that a platform lacks, `lacks` gets its error; the model is built
    all the same, since nothing of it is computed."""
    from vllm.platforms import current_platform
    from vllm.v1.attention import selector

    # Of another model that was asked before.
    selector._cached_get_attn_backend.cache_clear()
    before = current_platform.get_attn_backend_cls

    def get_attn_backend_cls(*args, **kwargs):
        try:
            return before(*args, **kwargs)
        except (NotImplementedError, ValueError) as error:
            if str(error) not in lacks:
                lacks.append(str(error))
            return _any_attention()

    from vllm.model_executor.layers.attention import mla_attention

    prefill = "get_mla_prefill_backend"  # from 0.22 on
    stands_in = hasattr(mla_attention, prefill) and not current_platform.is_cuda_alike()
    with (
        in_place_of(current_platform, "get_attn_backend_cls", get_attn_backend_cls),
        in_place_of(mla_attention, prefill, lambda config: _AnyAttentionImpl)
        if stands_in
        else nullcontext(),
    ):
        yield


def _any_attention() -> str:
    """The name by which vLLM finds a backend for `_AnyAttentionImpl`."""
    try:
        from vllm.v1.attention.backend import AttentionBackend
    except ImportError:  # before 0.20
        from vllm.attention.backends.abstract import AttentionBackend

    class AnyAttention(AttentionBackend):
        get_name = staticmethod(lambda: "ANY")
        get_impl_cls = staticmethod(lambda: _AnyAttentionImpl)

    globals()["AnyAttention"] = AnyAttention
    return f"{__name__}.AnyAttention"


@contextmanager
def any_experts() -> Generator[None, None, None]:
    """Experts of a release without the fork are built as for a GPU where the platform
    has no kernel for them, which from 0.27.0 on would end the build."""
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method
    from vllm.model_executor.layers.quantization.quark import quark_moe

    with (
        _or_triton(quark_moe, "select_int8_moe_backend", "Int8MoeBackend"),
        _or_triton(
            unquantized_fused_moe_method,
            "select_unquantized_moe_backend",
            "UnquantizedMoeBackend",
        ),
    ):
        yield


@contextmanager
def _or_triton(module: Any, name: str, backends: str) -> Generator[None, None, None]:
    """A function of that name in `module` chooses Triton's experts where it finds
    none; `backends` is its enumeration. Where there is no such function: nothing."""
    select = getattr(module, name, None)
    if select is None:
        yield
        return

    def selected(*args: Any, **kwargs: Any) -> Any:
        try:
            return select(*args, **kwargs)
        except NotImplementedError:
            triton = select.__globals__[backends].TRITON
            return triton, select.__globals__["backend_to_kernel_cls"](triton)[0]

    with in_place_of(module, name, selected):
        yield

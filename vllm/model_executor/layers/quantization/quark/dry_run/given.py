# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Tensors of a checkpoint without numbers, and who takes them."""

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from vllm.model_executor.layers.quantization.quark.load_checks.watch import Watch

_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
}


class Given(torch.Tensor):
    """Knows from which tensors of the checkpoint it was made."""

    origins: frozenset[str] = frozenset()

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        made = [x for x in _flat(result) if isinstance(x, cls)]
        if any(not each.origins for each in made):
            every = [*_flat(args), *_flat(list((kwargs or {}).values()))]
            found = (x.origins for x in every if isinstance(x, cls))
            origins = frozenset[str]().union(*found)
            for each in made:
                each.origins = each.origins or origins
        return result


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from _flat(each)
    else:
        yield value


class MetaWatch(Watch):
    """The engine's Watch, for tensors without numbers."""

    def _read(self, parameter: str, source: Any) -> str:
        origins = getattr(source, "origins", ())
        for name in origins:
            self.taken[name].add(parameter)
            self._left.pop(name, None)
        return min(origins) if origins else super()._read(parameter, source)

    def _copying(self, copy: Callable) -> Callable:
        def copy_shape(target, source, *args, **kwargs):
            if source.is_meta and not target.is_meta:
                # Made on a device by name; there are no numbers to copy.
                source.expand(target.shape)
                return target
            with _named(source):
                return copy(target, source, *args, **kwargs)

        return super()._copying(copy_shape)

    def _setting(self, set_item: Callable) -> Callable:
        def set_shape(tensor, index, value):
            if getattr(value, "is_meta", False) and not tensor.is_meta:
                value.expand(tensor[index].shape)
                return None
            return set_item(tensor, index, value)

        return super()._setting(set_shape)


@contextmanager
def _named(source: Any) -> Generator[None, None, None]:
    """An error over a tensor that does not fit says which one it is."""
    try:
        yield
    except RuntimeError as error:
        name = min(getattr(source, "origins", ()), default="")
        if name and name not in str(error):
            raise RuntimeError(f"{name}: {error}") from None
        raise


def given(headers: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """HEADERS as tensors on the meta device, by name."""
    for name, (dtype, shape, *_) in headers.items():
        kind = getattr(torch, _DTYPES[dtype])
        tensor = torch.empty(shape, dtype=kind, device="meta").as_subclass(Given)
        tensor.origins = frozenset([name])
        yield name, tensor

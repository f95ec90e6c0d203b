# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which tensor of a checkpoint goes into which parameter of a model.

vLLM's models load their weights each in their own way. So this looks below them: at
the methods of tensors that write. It works with weights on the meta device as well,
where a model is asked what it would do with a checkpoint.
"""

from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

Weights = Iterable[tuple[str, torch.Tensor]]
# Where a part of a parameter begins, in bytes, its shape and its strides.
Part = tuple[int, tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Write:
    """A copy into a parameter: `target` is the part of it that is written, `tensor`
    the name in the checkpoint of what is read, "" where that is not known."""

    parameter: str
    tensor: str
    target: torch.Tensor
    source: torch.Tensor


class Watch:
    """Sees every write into a model's parameters and buffers while weights are loaded.

    A parameter is known by its storage: `weight_loader`s write into views of it.

    on_write: called before each copy; may raise to prevent it.
    """

    def __init__(self, model: nn.Module, on_write: Callable[[Write], None]) -> None:
        self.model = model
        self.on_write = on_write
        self.parameters = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.numel()
        }
        # Storage -> (first byte, byte after the last, name) of what lies in it. The
        # storages are kept, so that none of these addresses is given to another.
        self._places: dict[int, list[tuple[int, int, str]]] = defaultdict(list)
        self._storages = {}
        buffers = ((name, each) for name, each in model.named_buffers() if each.numel())
        for name, tensor in (*self.parameters.items(), *buffers):
            storage = tensor.untyped_storage()
            first = int(tensor.storage_offset()) * tensor.itemsize
            place = first, first + int(tensor.nbytes), name
            self._places[storage._cdata].append(place)
            self._storages[name] = storage
        # Parameter -> the parts of it that were written, each once, and their sizes.
        self.written: dict[str, dict[Part, int]] = defaultdict(dict)
        # Tensor of the checkpoint -> the parameters that took it.
        self.taken: dict[str, set[str]] = defaultdict(set)
        self.current: tuple[str, torch.Tensor] | None = None
        # Storage -> the tensor of the checkpoint in it. A weak reference lets its
        # memory go, and keeps its address from another.
        self._names: dict[int, str] = {}
        self._addresses: list[StorageWeakRef] = []
        # Tensors that nothing took yet, and their bytes.
        self._left: dict[str, int] = {}
        # Bytes of what was written from tensors that a loader made before.
        self._made: list[int] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Stand in for the methods of tensors that write.

        A TorchDispatchMode would see more, and take longer than all else that is
        done for an expert: loaders make several views for each write.
        """
        replaced = {
            "copy_": self._copying(torch.Tensor.copy_),
            "fill_": self._filling(torch.Tensor.fill_),
            "zero_": self._filling(torch.Tensor.zero_),
            "__setitem__": self._setting(torch.Tensor.__setitem__),
        }
        own = {name: torch.Tensor.__dict__.get(name) for name in replaced}
        for name, method in replaced.items():
            setattr(torch.Tensor, name, method)
        try:
            yield
        finally:
            for name, before in own.items():
                if before is None:
                    delattr(torch.Tensor, name)
                else:
                    setattr(torch.Tensor, name, before)

    def watch(
        self, weights: Weights
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        """Pass the weights on, and see who takes them."""
        for name, tensor in weights:
            self.current = name, tensor
            if tensor.numel():
                storage = tensor.untyped_storage()
                self._addresses.append(StorageWeakRef(storage))
                self._names[storage._cdata] = name
                self._left[name] = tensor.nbytes
            yield name, tensor
        self.current = None

    @property
    def not_taken(self) -> list[str]:
        """Tensors of the checkpoint that went into no parameter."""
        # What a loader makes of a tensor, once it has them all, has no name.
        made = list(self._made)
        left = []
        for name, size in self._left.items():
            if size in made:
                made.remove(size)
            else:
                left.append(name)
        return left

    def num_filled(self, name: str) -> int:
        """Elements of a parameter that were written; all where a loader put another
        tensor in its place."""
        parameter = self.parameters[name]
        if parameter.untyped_storage()._cdata != self._storages[name]._cdata:
            return parameter.numel()
        return sum(self.written[name].values()) if name in self.written else 0

    def _copying(self, copy: Callable) -> Callable:
        def copy_(target, source, *args, **kwargs):
            self._note(target, source)
            return copy(target, source, *args, **kwargs)

        return copy_

    def _filling(self, fill: Callable) -> Callable:
        def fill_(target, *args, **kwargs):
            self._note(target)
            return fill(target, *args, **kwargs)

        return fill_

    def _setting(self, set_item: Callable) -> Callable:
        def __setitem__(tensor, index, value):
            source = value if isinstance(value, torch.Tensor) else None
            if self._place(tensor) is not None:
                part = tensor[index]
                storages = part.untyped_storage(), tensor.untyped_storage()
                if storages[0]._cdata == storages[1]._cdata:
                    self._note(part, source)
                else:  # a copy: the index names single elements
                    self._note(tensor, number=part.numel())
            return set_item(tensor, index, value)

        return __setitem__

    def _place(self, target: torch.Tensor) -> tuple[str, int] | None:
        """The parameter that a tensor is a part of, and at which byte it begins."""
        places = self._places.get(target.untyped_storage()._cdata)
        if places is None:
            return None
        at = int(target.storage_offset()) * target.itemsize
        for first, last, name in places:
            if first <= at < last:
                return name, at - first
        return None

    def _note(
        self,
        target: torch.Tensor,
        source: torch.Tensor | None = None,
        number: int | None = None,
    ) -> None:
        """Something, or a copy of `source`, is written to all of the target, or to this
        number of its elements."""
        if not target.numel() or (place := self._place(target)) is None:
            return
        parameter, offset = place
        tensor = self._read(parameter, source)
        if source is not None:
            self.on_write(Write(parameter, tensor, target, source))
        part = (offset, tuple(target.shape), target.stride())
        self.written[parameter][part] = target.numel() if number is None else number

    def _read(self, parameter: str, source: torch.Tensor | None) -> str:
        """The tensor of the checkpoint that is read for a write, "" for none known."""
        name = ""
        if source is not None and source.numel():
            storage = source.untyped_storage()
            name = self._names.get(storage._cdata, "")
            if not name and self.current is None:
                self._made.append(storage.nbytes())
        if not name and self.current is not None:
            name = self.current[0]
        if name:
            self.taken[name].add(parameter)
            self._left.pop(name, None)
        return name

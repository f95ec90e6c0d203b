# SPDX-License-Identifier: Apache-2.0
"""Run kernels in Gluon on the CPU: Triton's interpreter does not know them.

A module's source is executed again, with Gluon's names bound to those below, so that
its kernels are functions of Python over NumPy. Their layouts mean nothing here; the
order of what happens does, and is as unkind as a GPU may be:

- The partitions of `warp_specialize` run in threads, one at a time. In every other
  program, whoever signals a barrier lets all others run until they wait; in the rest a
  partition runs until it waits itself. When all wait, that is an error.
- A copy spoils its buffer at once and fills it when somebody has waited for its
  barrier; a product reads its operands as late as `warpgroup_mma_wait` allows.
- A barrier counts arrivals and bytes, and products read what threads have copied only
  after `fence_async_shared`.
- Loads and stores are within their tensor.
"""

import builtins
import operator
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch

POISON = 0x55


class Value:
    """A tensor or a number of a kernel."""

    type = SimpleNamespace(layout=None)

    def __init__(self, array: Any) -> None:
        self._array = None if array is None else np.asarray(array)

    def __index__(self) -> int:
        return int(self.array)

    def __bool__(self) -> bool:
        return bool(self.array)

    def __neg__(self) -> "Value":
        return Value(-self.array)

    def to(self, dtype: Any) -> "Value":
        return Value(self.array.astype(dtype))

    @property
    def array(self) -> np.ndarray:
        assert self._array is not None, "the sums of an unfinished product are read"
        return self._array

    @array.setter
    def array(self, array: Any) -> None:
        self._array = np.asarray(array)

    def reshape(self, shape: Sequence[int]) -> "Value":
        return Value(self.array.reshape(shape))

    def permute(self, order: Sequence[int]) -> "Value":
        return Value(self.array.transpose(order))

    def split(self) -> tuple["Value", "Value"]:
        return Value(self.array[..., 0]), Value(self.array[..., 1])


def _array(value: Any) -> Any:
    return value.array if isinstance(value, Value) else value


def _operator(function: Callable, is_reflected: bool) -> Callable:
    def apply(self: Value, other: Any) -> Any:
        if isinstance(other, Pointer):
            return NotImplemented
        operands = self.array, _array(other)
        return Value(function(*(reversed(operands) if is_reflected else operands)))

    return apply


_ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "and", "or", "xor")
for _name in (*_ARITHMETIC, "lt", "le", "gt", "ge", "eq"):
    _function = getattr(operator, f"__{_name}__")
    setattr(Value, f"__{_name}__", _operator(_function, False))
    if _name in _ARITHMETIC:
        setattr(Value, f"__r{_name}__", _operator(_function, True))


class Pointer:
    """Addresses of a tensor's elements."""

    def __init__(self, memory: np.ndarray, offsets: Any = 0) -> None:
        self.memory, self.offsets = memory, offsets
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, other: Any) -> "Pointer":
        return Pointer(self.memory, self.offsets + np.asarray(_array(other)))

    def masked(self, mask: Any) -> tuple[np.ndarray, np.ndarray]:
        """Offsets that broadcast with the mask, 0 where it is false, and the mask."""
        offsets, mask = np.broadcast_arrays(
            self.offsets, True if mask is None else _array(mask)
        )
        inside = (offsets >= 0) & (offsets < self.memory.size)
        assert (inside | ~mask).all(), "an address is outside of its tensor"
        return np.where(mask, offsets, 0), mask

    def load(self, mask: Any = None, other: Any = 0) -> np.ndarray:
        offsets, mask = self.masked(mask)
        other = np.asarray(other, self.memory.dtype)
        return np.where(mask, self.memory[offsets], other)


class Buffer:
    """Shared memory, or a view of it."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def index(self, i: Any) -> "Buffer":
        return Buffer(self.array[int(i)])

    def slice(self, start: int, length: int) -> "Buffer":
        return Buffer(self.array[start : start + length])

    def permute(self, order: Sequence[int]) -> "Buffer":
        return Buffer(self.array.transpose(order))


@dataclass
class Barrier:
    count: int = 0
    arrivals: int = 0
    expected_bytes: int = 0
    phase: int = 0
    copies: list[tuple[np.ndarray, np.ndarray, bool]] = field(default_factory=list)
    arrived: list[tuple[np.ndarray, np.ndarray, bool]] = field(default_factory=list)

    def arrive(self, count: int, num_bytes: int = 0) -> None:
        assert self.count, "the barrier was not initialized"
        self.arrivals += count
        self.expected_bytes += num_bytes
        self.advance()

    def advance(self) -> None:
        """Begin the next phase if all have arrived, and all bytes."""
        assert self.arrivals <= self.count, "more arrive than the barrier counts"
        by_tma = sum(into.nbytes for into, _, is_tma in self.copies if is_tma)
        assert by_tma <= self.expected_bytes, "more bytes arrive than were announced"
        if self.arrivals == self.count and by_tma == self.expected_bytes:
            self.arrived += self.copies
            self.copies, self.arrivals, self.expected_bytes = [], 0, 0
            self.phase += 1


class Program:
    """One program of a launch: its barriers, its partitions, products on their way."""

    def __init__(self, index: int, num_programs: int) -> None:
        self.index, self.num_programs = index, num_programs
        self.local = threading.local()
        self.turn = threading.Condition()
        self.order: list[int] = []
        self.events = 0
        self.failure: BaseException | None = None
        self.unannounced: list[tuple[np.ndarray, np.ndarray, bool]] = []
        self.unfenced: list[np.ndarray] = []

    @property
    def products(self) -> list[Callable[[], None]]:
        """The partition's own, oldest first."""
        if not hasattr(self.local, "products"):
            self.local.products = []
        return self.local.products

    def pass_on(self) -> None:
        """Let all other partitions run until they wait."""
        with self.turn:
            if len(self.order) < 2:
                return
            me = self.order.pop(0)
            self.order.append(me)
            self.turn.notify_all()
            self.turn.wait_for(lambda: self.failure or self.order[0] == me)
            if self.failure:
                raise SystemExit

    def wait(self, holds: Callable[[], bool]) -> None:
        while not holds():
            events = self.events
            self.pass_on()
            assert holds() or self.events != events, "all partitions wait: a deadlock"

    def specialize(self, partitions: Sequence[tuple[Callable, tuple]]) -> None:
        self.order = list(range(len(partitions)))

        def run(i: int, function: Callable, args: tuple) -> None:
            with self.turn:
                self.turn.wait_for(lambda: self.failure or self.order[0] == i)
            try:
                if not self.failure:
                    function(*args)
            except SystemExit:
                pass
            except BaseException as error:
                self.failure = self.failure or error
            with self.turn:
                self.order.remove(i)
                self.events += 1
                self.turn.notify_all()

        threads = [
            threading.Thread(target=run, args=(i, *partition))
            for i, partition in enumerate(partitions)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.failure:
            raise self.failure


class Interpreter:
    """Gluon's names for one module, and the program that runs now."""

    program: Program

    def imports(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("triton.experimental"):
            gl = SimpleNamespace(
                **{n[3:]: getattr(self, n) for n in dir(self) if n.startswith("gl_")}
            )
            return SimpleNamespace(
                gluon=SimpleNamespace(jit=self.jit, constexpr_function=lambda f: f),
                language=gl,
                async_copy=SimpleNamespace(
                    async_copy_global_to_shared=self.copy,
                    mbarrier_arrive=self.arrive_by_copies,
                ),
                mbarrier=SimpleNamespace(
                    MBarrierLayout=lambda: "barriers",
                    init=self.init,
                    wait=self.wait,
                    expect=self.expect,
                    arrive=self.arrive,
                ),
                tma=SimpleNamespace(async_copy_global_to_shared=self.copy_box),
                fence_async_shared=self.fence,
                warpgroup_mma=self.multiply,
                warpgroup_mma_wait=self.wait_for_products,
                TensorDescriptor=object,  # of what is not a kernel, and not made
            )
        return builtins.__import__(name, *args, **kwargs)

    def jit(self, function: Any = None, **_: Any) -> Any:
        return function if function else lambda f: f

    # --- gluon.language -------------------------------------------------------------

    gl_int8, gl_int32, gl_int64, gl_float32 = np.int8, np.int32, np.int64, np.float32
    gl_static_range = range

    class gl_NVMMASharedLayout:
        get_default_for = staticmethod(lambda *_: None)

    gl_NVMMADistributedLayout = gl_BlockedLayout = gl_SliceLayout = staticmethod(
        lambda *_: None
    )
    gl_DistributedLinearLayout = gl_NVMMADistributedLayout
    gl_constexpr = staticmethod(lambda value: value)
    gl_cdiv = staticmethod(lambda a, b: (a + b - 1) // b)
    gl_convert_layout = staticmethod(lambda value, _: value)

    @staticmethod
    def gl_zeros(shape: Sequence[int], dtype: Any, _: Any) -> Value:
        return Value(np.zeros(shape, dtype))

    @staticmethod
    def gl_arange(start: int, end: int, _: Any) -> Value:
        return Value(np.arange(start, end, dtype=np.int32))

    @staticmethod
    def gl_expand_dims(value: Value, axis: int) -> Value:
        return Value(np.expand_dims(value.array, axis))

    @staticmethod
    def gl_minimum(a: Any, b: Any) -> Value:
        return Value(np.minimum(_array(a), _array(b)))

    @staticmethod
    def gl_maximum(a: Any, b: Any) -> Value:
        return Value(np.maximum(_array(a), _array(b)))

    @staticmethod
    def gl_exp(value: Value) -> Value:
        with np.errstate(over="ignore"):
            return Value(np.exp(value.array))

    @staticmethod
    def gl_load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Value:
        return Value(pointer.load(mask, other))

    @staticmethod
    def gl_store(pointer: Pointer, value: Value, mask: Any = None) -> None:
        offsets, mask = pointer.masked(mask)
        pointer.memory[offsets[mask]] = np.broadcast_to(value.array, mask.shape)[mask]

    def gl_program_id(self, _: int) -> int:
        return self.program.index

    def gl_num_programs(self, _: int) -> int:
        return self.program.num_programs

    @staticmethod
    def gl_allocate_shared_memory(dtype: Any, shape: Sequence[int], layout: Any) -> Any:
        if layout == "barriers":
            barriers = [Barrier() for _ in range(shape[0])]
            return SimpleNamespace(index=lambda i: barriers[int(i)])
        return Buffer(np.full(shape, POISON, dtype))

    def gl_warp_specialize(
        self,
        partitions: Sequence[tuple[Callable, tuple]],
        num_warps: Sequence[int],
        registers: Sequence[int],
    ) -> None:
        assert len(registers) == len(num_warps)
        assert all(count % 8 == 0 for count in registers)

        def run(warps: int | None, function: Callable, args: tuple) -> None:
            self.program.local.warps = warps
            function(*args)

        self.program.specialize(
            [
                (run, (warps, *partition))
                for warps, partition in zip((None, *num_warps), partitions, strict=True)
            ]
        )

    # --- gluon.language.nvidia ------------------------------------------------------

    def _happened(self) -> None:
        self.program.events += 1
        if self.program.index % 2:
            self.program.pass_on()

    def init(self, barrier: Barrier, count: int) -> None:
        barrier.count = count

    def wait(self, barrier: Barrier, phase: Any) -> None:
        self.program.wait(lambda: barrier.phase % 2 != int(phase))
        for into, values, is_tma in barrier.arrived:
            into[...] = values
            if not is_tma:
                self.program.unfenced.append(into)
        barrier.arrived.clear()

    def expect(self, barrier: Barrier, num_bytes: int) -> None:
        barrier.arrive(1, num_bytes)

    def arrive(self, barrier: Barrier, pred: Any = True) -> None:
        if pred:
            barrier.arrive(1)
            self._happened()

    def fence(self) -> None:
        self.program.unfenced.clear()

    def copy_box(
        self, box: Any, at: Sequence[Any], barrier: Barrier, into: Buffer
    ) -> None:
        rows, columns = box.block_shape
        row, column = map(int, at)
        assert into.array.shape == (rows, columns) and row >= 0 and column >= 0
        values = np.zeros((rows, columns), into.array.dtype)
        found = box.base[row : row + rows, column : column + columns]
        values[: found.shape[0], : found.shape[1]] = found
        into.array[...] = POISON
        barrier.copies.append((into.array, values, True))
        barrier.advance()
        self._happened()

    def copy(self, into: Buffer, pointer: Pointer, mask: Any) -> None:
        values = pointer.load(mask)
        into.array[...] = POISON
        self.program.unannounced.append((into.array, values, False))

    def arrive_by_copies(self, barrier: Barrier, increment_count: bool) -> None:
        assert not increment_count
        barrier.copies += self.program.unannounced
        self.program.unannounced = []
        barrier.arrive(32 * self.program.local.warps)
        self._happened()

    def multiply(self, a: Buffer, w: Buffer, sums: Value, is_async: bool) -> Value:
        assert is_async
        for operand in (a.array, w.array):
            assert not any(
                np.shares_memory(operand, one) for one in self.program.unfenced
            ), "what threads copied is multiplied without a fence"
        result = Value(None)

        def product() -> None:
            # Whole numbers below 2**53: exact.
            found = a.array.astype(np.float64) @ w.array.astype(np.float64)
            # The product before has made its sums by now.
            result.array = sums.array + found.astype(np.int32)

        self.program.products.append(product)
        return result

    def wait_for_products(self, most: int, deps: Sequence[Value]) -> Value:
        while len(self.program.products) > most:
            self.program.products.pop(0)()
        (sums,) = deps
        return sums


class Kernel:
    """A kernel that is launched as Triton's are, on tensors of the CPU."""

    def __init__(self, interpreter: Interpreter, function: Callable) -> None:
        self.interpreter, self.function = interpreter, function

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        def launch(
            *args: Any, num_warps: int, maxnreg: int = 255, **options: Any
        ) -> None:
            values = [_argument(value) for value in args]
            for i in range(grid[0]):
                self.interpreter.program = Program(i, grid[0])
                self.function(*values, **options)

        return launch


def _argument(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return Pointer(value.detach().view(-1).numpy())
    if hasattr(value, "block_shape"):
        rows, columns = value.shape
        size = int(np.prod(value.block_shape))
        return SimpleNamespace(
            base=value.base.detach().view(rows, columns).numpy(),
            block_shape=value.block_shape,
            block_type=SimpleNamespace(nbytes=size * value.base.element_size()),
        )
    return value


def interpret(module: ModuleType) -> dict[str, Kernel]:
    """The module's kernels by their names, for tensors of the CPU."""
    interpreter = Interpreter()
    assert module.__file__
    code = compile(Path(module.__file__).read_text(), module.__file__, "exec")
    bound: dict[str, Any] = {
        "__name__": module.__name__,
        "__builtins__": vars(builtins) | {"__import__": interpreter.imports},
    }
    exec(code, bound)
    return {
        name: Kernel(interpreter, found)
        for name, found in bound.items()
        if name.endswith("_kernel")
    }

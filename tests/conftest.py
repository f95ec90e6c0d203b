# SPDX-License-Identifier: Apache-2.0
"""Fixtures and rules that every test shares."""

import ast
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.groups import group_of, has_group, installed, lacking, lacking_of_module
from tests.process_groups import start_process_groups

# Ask the driver's management library: asking CUDA would break processes forked later.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
# It chose the build under test; builds that tests make choose for themselves.
os.environ.pop("VLLM_QUARK_GROUPS", None)
HAS_GPU = torch.cuda.is_available()

if not HAS_GPU:
    # Both are read once, when vLLM and Triton are imported: vLLM drops Triton on a
    # machine without a driver unless no device is visible on purpose, and Triton then
    # runs its kernels in its interpreter.
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    os.environ.setdefault("TRITON_INTERPRET", "1")
    with suppress(ImportError):
        from triton.backends import backends

        # From 0.23.0 a vLLM for CPUs drops a Triton without a back end of that name.
        nothing = SimpleNamespace(supports_target=lambda target: False)
        backends.setdefault("cpu", SimpleNamespace(driver=None, compiler=nothing))
    if not torch.accelerator.is_available():
        # As vLLM's runner for CPUs does: a CPU build of torch has no accelerator.
        torch.accelerator.empty_cache = lambda: None

# Examples a property. Fixtures are ranks to pretend and configs, which keep no example.
for name, max_examples in (("ci", 200), ("nightly", 2500)):
    settings.register_profile(
        name,
        max_examples=max_examples,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

Parallel = Callable[[int, int], None]
QuarkDict = Callable[..., dict[str, Any]]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, help="seed of random inputs; fresh if absent")


class LackingModule(pytest.Module):
    """A module of tests that is not even imported: the build has not what it needs."""

    group = ""

    def collect(self) -> NoReturn:
        reason = f"needs the group of patches {self.group}, which this build lacks"
        raise pytest.skip.Exception(reason, allow_module_level=True)


def pytest_pycollect_makemodule(
    module_path: Path, parent: pytest.Collector
) -> pytest.Module | None:
    if (group := lacking_of_module(module_path, HAS_GPU)) is None:
        return None
    module = LackingModule.from_parent(parent, path=module_path)
    module.group = group
    return module


@cache
def functions(path: Path) -> dict[int, ast.AST]:
    """The functions of a file, by their lines and those of their decorators."""
    found: dict[int, ast.AST] = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found |= dict.fromkeys((first, node.lineno), node)
    return found


def lacking_of_item(item: pytest.Item) -> str | None:
    """A group that this test needs and the installed build lacks."""
    wanted = [group for m in item.iter_markers("needs_group") for group in m.args]
    wanted += [group_of(m.args[0]) for m in item.iter_markers("needs_patch")]
    for group in wanted:
        if not has_group(group):
            return group
    code = getattr(getattr(item, "function", None), "__code__", None)
    if installed() is None or code is None or code.co_filename != str(item.path):
        return None
    node = functions(item.path).get(code.co_firstlineno)
    return lacking(node, HAS_GPU) if node else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Engines take minutes: first, so that no core waits for the last one.
    items.sort(key=lambda item: not item.nodeid.startswith("tests/v1/"))
    for item in items:
        # For the JUnit report that tools/mutants.py reads.
        for needs in item.iter_markers("needs_patch"):
            item.user_properties.append(("needs_patch", needs.args[0]))
    for item in items:
        if group := lacking_of_item(item):
            reason = f"needs the group of patches {group}, which this build lacks"
            item.add_marker(pytest.mark.skip(reason=reason))
    num_gpus = torch.cuda.device_count() if HAS_GPU else 0
    for marker, needed in (("gpu", 1), ("gpu2", 2)):
        if num_gpus >= needed:
            continue
        reason = f"needs {needed} CUDA or ROCm GPU(s); torch.cuda sees {num_gpus}"
        for item in items:
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> torch.Generator:
    """A CPU generator, seeded afresh for each test; a failure shows the seed."""
    seed = request.config.getoption("--seed")
    if seed is None:
        seed = secrets.randbits(32)
    print(f"random inputs: repeat with --seed={seed}")
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="session")
def process_groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """vLLM's process groups, for this process alone."""
    from vllm.distributed import parallel_state

    start_process_groups(tmp_path_factory.mktemp("process_groups") / "store")
    yield
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For models so small that threads cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def device(process_groups: None) -> Iterator[torch.device]:
    """The platform's device, made the default with bfloat16, as the engine does."""
    from vllm.platforms import current_platform
    from vllm.v1.worker import workspace

    if not workspace.is_workspace_manager_initialized():  # as a worker does
        workspace.init_workspace_manager(torch.device(current_platform.device_type))
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(current_platform.device_type) as chosen:
            yield chosen
    finally:
        torch.set_default_dtype(dtype)


@pytest.fixture
def vllm_config(device: torch.device) -> Iterator[Any]:
    """A current VllmConfig without a model, of this test alone."""
    from vllm.config import VllmConfig, set_current_vllm_config

    config = VllmConfig()
    with set_current_vllm_config(config):
        yield config


@pytest.fixture
def tensor_parallel(process_groups: None, monkeypatch: pytest.MonkeyPatch) -> Parallel:
    """Call it with (rank, size): layers built from then on are that rank's share."""
    from vllm.distributed import get_tp_group

    def pretend(rank: int, size: int) -> None:
        group = get_tp_group()
        monkeypatch.setattr(group, "rank_in_group", rank)
        monkeypatch.setattr(group, "world_size", size)

    return pretend


@pytest.fixture
def quark_dict() -> QuarkDict:
    """Make the `quantization_config` that amd-quark writes for an INT8 export."""

    def make(
        weight: str = "per_channel",
        static: bool = False,
        symmetric: bool = True,
        exclude: tuple[str, ...] = (),
    ) -> dict[str, Any]:
        """Static activations have one scale a tensor, dynamic ones one a token."""
        return {
            "quant_method": "quark",
            "export": {"kv_cache_group": [], "pack_method": "reorder"},
            "global_quant_config": {
                "weight": {
                    "dtype": "int8",
                    "qscheme": weight,
                    "ch_axis": 0 if weight == "per_channel" else None,
                    "is_dynamic": False,
                    "symmetric": True,
                },
                "input_tensors": {
                    "dtype": "int8",
                    "qscheme": "per_tensor" if static else "per_channel",
                    "ch_axis": None if static else 1,
                    "is_dynamic": not static,
                    "symmetric": symmetric,
                },
                "output_tensors": None,
                "bias": None,
            },
            "layer_quant_config": {},
            "layer_type_quant_config": {},
            "exclude": list(exclude),
        }

    return make

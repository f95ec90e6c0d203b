# SPDX-License-Identifier: Apache-2.0
"""Runs tests of Triton kernels on what is compiled for an AMD GPU, in the machine:

    pytest -p tests.kernels.amdgcn.plugin --amdgcn gfx942 tests/kernels/moe

What a test cannot show there, a kernel in Gluon or a tensor descriptor, is skipped.
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest

# Read when Triton and the tests are imported; no GPU may be found.
os.environ |= {
    "TRITON_INTERPRET": "0",
    "CUDA_VISIBLE_DEVICES": "",
    "AMDGCN_MACHINE": "1",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("amdgcn")
    group.addoption("--amdgcn", default="gfx942", help="what to compile for")
    group.addoption(
        "--large-tensors",
        action="store_true",
        help="as for tensors of 2 GiB or more, without instructions for buffers",
    )
    group.addoption(
        "--waves",
        default="together",
        choices=("together", "forward", "backward"),
        help="the order in which waves run",
    )
    group.addoption(
        "--nudge",
        action="store_true",
        help="let what is approximate be off by a unit in the last place",
    )


@pytest.fixture(autouse=True)
def _machine(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    launcher: Any,
) -> None:
    def run(function: Any, *args: Any, **kwargs: Any) -> None:
        try:
            launcher.run(function, *args, **kwargs)
        except NotImplementedError as e:
            pytest.skip(str(e))

    from triton.runtime.jit import JITFunction

    monkeypatch.setattr(JITFunction, "run", run)


@pytest.fixture(scope="session")
def launcher(request: pytest.FixtureRequest) -> Iterator[Any]:
    from tests.kernels.amdgcn.launches import Launcher
    from tests.kernels.amdgcn.machine import Options

    option = request.config.getoption
    found = Launcher(
        option("--amdgcn"),
        not option("--large-tensors"),
        Options(option("--waves"), option("--nudge")),
    )
    yield found
    executed = sum(int(s.counts.sum()) for _, s in found.statistics)
    print(
        f"\n{len(found.statistics)} launches of {len(found.kernels)} kernels compiled "
        f"for {found.arch}; {executed} instructions executed by waves"
    )

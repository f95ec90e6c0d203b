# SPDX-License-Identifier: Apache-2.0
"""Builds a wheel named vllm by repacking a released one: see tools/build.py.

Nothing is compiled. `pip install .`, `pip wheel .` and `python -m build` all end in
the bdist_wheel command below.
"""

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.dist_info import dist_info
from setuptools.command.egg_info import egg_info
from setuptools.errors import BaseError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from tools.build import build_metadata, build_wheel, plan  # noqa: E402
from tools.errors import ForkError  # noqa: E402


class RepackWheel(bdist_wheel):
    def run(self) -> None:
        try:
            path = build_wheel(Path(self.dist_dir))
        except ForkError as error:
            raise BaseError(str(error)) from None
        self.distribution.dist_files.append(("bdist_wheel", "any", str(path)))


class BaseMetadata(dist_info):
    """Tell pip the base wheel's requirements before the wheel is made."""

    def run(self) -> None:
        super().run()
        try:
            metadata = build_metadata()
        except ForkError as error:
            raise BaseError(str(error)) from None
        (Path(self.dist_info_dir) / "METADATA").write_bytes(metadata)


class EggInfoInBuild(egg_info):
    """An egg-info in the root would answer `version("vllm")` for the installed fork,
    and vLLM chooses its CPU platform by that version."""

    def initialize_options(self) -> None:
        super().initialize_options()
        (ROOT / "build").mkdir(exist_ok=True)
        self.egg_base = "build"


def version() -> str:
    try:
        return plan().version
    except ForkError as error:
        raise SystemExit(f"error: {error}") from None


setup(
    name="vllm",
    version=version(),
    packages=[],
    py_modules=[],
    cmdclass={
        "bdist_wheel": RepackWheel,
        "dist_info": BaseMetadata,
        "egg_info": EggInfoInBuild,
    },
)

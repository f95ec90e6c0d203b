# SPDX-License-Identifier: Apache-2.0
"""What a base wheel asks of the Python and the torch that it runs with."""

import platform
from importlib.metadata import distributions
from zipfile import ZipFile

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import parse_wheel_filename
from packaging.version import Version

from tools.errors import ForkError
from tools.target import site_folders


def check_python(headers: str, name: str) -> None:
    """See that a wheel of this METADATA runs with this Python. Raises ForkError."""
    for value in _values(headers, "Requires-Python"):
        found = platform.python_version()
        if not SpecifierSet(value).contains(found, prereleases=True):
            raise ForkError(
                f"{name}: expected Python {value}, found {found}: build with one of "
                "these, or choose another release with VLLM_BASE_VERSION."
            )


def check_version(headers: str, name: str) -> None:
    """See that a wheel holds the build that its name says, such as 0.20.2+rocm721.
    Raises ForkError."""
    expected = parse_wheel_filename(name)[1]
    for value in _values(headers, "Version"):
        if Version(value) != expected:
            raise ForkError(
                f"{name}: its name says version {expected}, its METADATA {value}: the "
                "file was renamed. Take another wheel, and tell whoever serves it."
            )


def torch_note(headers: str, name: str) -> str | None:
    """One line where the installed torch is not the one that the wheel is built for."""
    wanted = {
        Version(pin.version).public
        for value in _values(headers, "Requires-Dist")
        for requirement in [Requirement(value)]
        if requirement.name == "torch"
        and (requirement.marker is None or requirement.marker.evaluate())
        for pin in requirement.specifier
        if pin.operator == "=="
    }
    for torch in distributions(name="torch", path=site_folders()):
        found = Version(torch.version).public
        if wanted and found not in wanted:
            return (
                f"{name}: expected torch {' or '.join(sorted(wanted))}, found "
                f"{torch.version}: pip replaces it, unless you install with --no-deps, "
                "and vLLM's extension may not load beside another one."
            )
    return None


def headers_of(base: ZipFile) -> str:
    """METADATA of a wheel, up to its first empty line. Raises ForkError."""
    names = [n for n in base.namelist() if n.endswith(".dist-info/METADATA")]
    if len(names) != 1:
        raise ForkError(f"{base.filename}: expected one METADATA, found {names}.")
    return base.read(names[0]).decode().partition("\n\n")[0]


def _values(headers: str, key: str) -> list[str]:
    lines = (line.partition(": ") for line in headers.splitlines())
    return [value for name, _, value in lines if name == key]

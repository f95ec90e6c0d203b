# SPDX-License-Identifier: Apache-2.0
"""Upstream's ROCm wheels, which are on an index of upstream's own.

Each build of each release has an index, as PEP 503 (HTML) and PEP 691 (JSON) describe
them. What fits is found on its page alone: nothing is downloaded that could not be
installed.
"""

import os
import platform
import re
from collections.abc import Iterable
from urllib.parse import unquote, urlsplit

import requests
from packaging.tags import sys_tags
from packaging.utils import BuildTag, InvalidWheelFilename, parse_wheel_filename
from packaging.version import Version
from pypi_simple import (
    DistributionPackage,
    NoSuchProjectError,
    PyPISimple,
    UnsupportedRepoVersionError,
)

from tools.download import TIMEOUT_S
from tools.errors import ForkError
from tools.location import VARIABLE
from tools.upstream import BaseWheel, Release, releases, rocm_index

VARIANT = "VLLM_PRECOMPILED_WHEEL_VARIANT"  # upstream's: which build of a release
PROJECT = "vllm"
SHA256 = re.compile(r"[0-9a-fA-F]{64}")
ELSE = (
    f"In a container that has vLLM, {VARIABLE}=installed makes the base wheel out of "
    "it; a path or URL there names a wheel of your own (docs/guide/rocm.md)."
)


def rocm_wheel(release: Release) -> BaseWheel:
    """The ROCm wheel of a release for this Python, as its index describes it today.

    VLLM_PRECOMPILED_WHEEL_VARIANT chooses among the release's builds, such as rocm721.
    Raises ForkError where no wheel fits, and nothing was downloaded then.
    """
    variant = _variant(release)
    index = rocm_index(release.version, variant)
    wanted = Version(f"{release.version}+{variant}")
    packages = _packages(index)
    named = [p for p in packages if _is_of(p.filename, wanted)]
    if not named:
        raise ForkError(
            f"{index}: expected a wheel of {PROJECT} {wanted}, found "
            f"{_names(packages) or 'no files'}. {ELSE}"
        )
    fitting = [p for p in named if _fits(p.filename)]
    if not fitting:
        raise ForkError(
            f"{index}: expected a wheel for Python {platform.python_version()} on "
            f"{platform.machine()} with {' '.join(platform.libc_ver())}, found "
            f"{_names(named)}. Build with a Python that one of these is for. {ELSE}"
        )
    offered = [p for p in fitting if not p.is_yanked]
    if not offered:
        reasons = {p.yanked_reason or "no reason given" for p in fitting}
        raise ForkError(
            f"{index}: {_names(fitting)} was withdrawn (yanked): "
            f"{'; '.join(sorted(reasons))}. {ELSE}"
        )
    chosen = max(offered, key=lambda package: _build(package.filename))
    return BaseWheel(
        filename=chosen.filename,
        sha256=_sha256(chosen, index),
        release=release,
        target="rocm",
        url=_url(chosen, index),
        source=f"the index {index}",
    )


def _variant(release: Release) -> str:
    known = release.rocm_variants
    if not known:
        having = ", ".join(v for v, each in releases().items() if each.rocm_variants)
        raise ForkError(
            f"UPSTREAM.toml knows of no ROCm wheel of vLLM {release.version}, but of "
            f"{having}: choose one with VLLM_BASE_VERSION. {ELSE}"
        )
    variant = os.environ.get(VARIANT) or known[-1]
    if variant not in known:
        raise ForkError(
            f"{VARIANT}={variant!r}: UPSTREAM.toml knows of no such ROCm wheel of vLLM "
            f"{release.version}, but of {', '.join(known)}. {ELSE}"
        )
    return variant


def _packages(index: str) -> list[DistributionPackage]:
    """What the index's page of vLLM lists."""
    try:
        with PyPISimple(index) as simple:
            return simple.get_project_page(PROJECT, timeout=TIMEOUT_S).packages
    except NoSuchProjectError:
        raise ForkError(f"{index}: has no page of {PROJECT} (404). {ELSE}") from None
    except (
        requests.RequestException,
        UnsupportedRepoVersionError,
        ValueError,  # neither HTML nor JSON, or JSON that lacks what it must say
    ) as error:
        raise ForkError(
            f"{index}: cannot read its page of {PROJECT}: {error}\n"
            f"Check the network and try again. {ELSE}"
        ) from None


def _is_of(filename: str, wanted: Version) -> bool:
    try:
        name, version, _, _ = parse_wheel_filename(filename)
    except InvalidWheelFilename:
        return False
    return name == PROJECT and version == wanted


def _fits(filename: str) -> bool:
    """Whether pip would install it here."""
    return not parse_wheel_filename(filename)[3].isdisjoint(sys_tags())


def _build(filename: str) -> BuildTag:
    return parse_wheel_filename(filename)[2]


def _names(packages: Iterable[DistributionPackage]) -> str:
    return ", ".join(sorted(package.filename for package in packages))


def _sha256(package: DistributionPackage, index: str) -> str:
    stated = package.digests.get("sha256", "")
    if not SHA256.fullmatch(stated):
        raise ForkError(
            f"{package.filename}: expected {index} to state its sha256, found "
            f"{package.digests or 'none'}. To build from it all the same, set "
            f"{VARIABLE} to {package.url} (with #sha256=<64 hex digits> behind it, if "
            f"you know them). {ELSE}"
        )
    return stated.lower()


def _url(package: DistributionPackage, index: str) -> str:
    parts = urlsplit(package.url)
    served = unquote(parts.path).rpartition("/")[2]
    if parts.scheme not in ("http", "https") or served != package.filename:
        raise ForkError(
            f"{index}: the link {package.filename} leads to {package.url}: the file "
            f"was renamed, or is not on a server. {ELSE}"
        )
    return package.url

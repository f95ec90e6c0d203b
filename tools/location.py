# SPDX-License-Identifier: Apache-2.0
"""Where a base wheel of the user's own is: a path or URL, its sha256 if he names it."""

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tools.errors import ForkError

VARIABLE = "VLLM_PRECOMPILED_WHEEL_LOCATION"
SHA256 = re.compile(r"sha256=([0-9a-fA-F]{64})")


@dataclass(frozen=True)
class Location:
    """`where` is a path or URL; `sha256` is what `#sha256=` behind it said."""

    where: str
    sha256: str | None = None

    @property
    def is_remote(self) -> bool:
        return urlsplit(self.where).scheme in ("http", "https")

    @property
    def path(self) -> Path:
        """Of a URL the path on its server."""
        if _is_url(self.where):
            return Path(unquote(urlsplit(self.where).path))
        return Path(self.where).expanduser()


def parse(text: str) -> Location:
    """A path or URL, with `#sha256=<64 hex digits>` behind it or without.

    A `#` before the end of a path is one of its letters. Raises ForkError.
    """
    end = "#" if _is_url(text) else ".whl#"
    where, mark, fragment = text.partition(end)
    if not mark:
        return Location(text)
    where += mark.removesuffix("#")
    if not (found := SHA256.fullmatch(fragment)):
        raise ForkError(
            f"{VARIABLE}: expected {where}#sha256=<64 hex digits>, found #{fragment} "
            "behind the wheel. Correct it, or leave it out."
        )
    return Location(where, found[1].lower())


def _is_url(text: str) -> bool:
    return urlsplit(text).scheme in ("file", "http", "https")

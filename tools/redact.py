# SPDX-License-Identifier: Apache-2.0
"""Leave out of a text what names a machine, its user, or its folders."""

import getpass
import os
import re
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

Redact = Callable[[Any], Any]
# A path from the root, of two names at least; a URL's is its server's. The last name
# is kept: it says which file a log is about.
PATH = re.compile(
    r"(?<![\w.:/>~-])(?:~|/[^\s/:;,'\"()\[\]<>|=]+)(?:/[^\s/:;,'\"()\[\]<>|=]+)+"
)
ADDRESS = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.])")
MAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|API_?KEY", re.IGNORECASE)
LOOPBACK = "127.0.0.1"


def redact(value: Any, folders: Iterable[Path] = ()) -> Any:
    """A copy of what JSON can hold, without names of this machine and of its user, its
    folders (`folders` are known by a name, the others by their last part), addresses,
    and values of environment variables that are secret."""
    if isinstance(value, dict):
        return {redact(k, folders): redact(v, folders) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [redact(one, folders) for one in value]
    return _text(value, folders) if isinstance(value, str) else value


def _text(text: str, folders: Iterable[Path]) -> str:
    for secret in _secrets():
        text = text.replace(secret, "<secret>")
    for folder in sorted(folders, key=lambda path: -len(str(path))):
        text = text.replace(f"{folder}/", "").replace(str(folder), ".")
    text = PATH.sub(lambda found: f"<folder>/{found[0].rpartition('/')[2]}", text)
    text = MAIL.sub("<mail>", text)
    text = ADDRESS.sub(lambda f: f[0] if f[0] == LOOPBACK else "<address>", text)
    for name, instead in _names():
        text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", instead, text)
    return text


def _names() -> list[tuple[str, str]]:
    """The machine's names and the user's, the longest first."""
    host = socket.gethostname()
    hosts = {host, host.partition(".")[0], socket.getfqdn(), os.environ.get("HOSTNAME")}
    users = {os.environ.get(name) for name in ("USER", "LOGNAME", "SUDO_USER")}
    with suppress(KeyError, OSError):  # a container's user may have no name
        users.add(getpass.getuser())
    found = [(n, "<host>") for n in hosts if n and n != "localhost"]
    found += [(n, "<user>") for n in users if n]
    return sorted(found, key=lambda one: -len(one[0]))


def _secrets() -> list[str]:
    values = [value for name, value in os.environ.items() if SECRET.search(name)]
    return [value for value in values if len(value) >= 8]

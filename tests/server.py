# SPDX-License-Identifier: Apache-2.0
"""tests/sessions.py for tests of engines: tests/groups.py knows them by this import."""

from tests.sessions import (
    END_SECONDS,
    ROOT,
    START_SECONDS,
    Server,
    ServerError,
    is_alive,
    serve,
)

__all__ = [
    "END_SECONDS",
    "ROOT",
    "START_SECONDS",
    "Server",
    "ServerError",
    "is_alive",
    "serve",
]

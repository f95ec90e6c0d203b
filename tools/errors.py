# SPDX-License-Identifier: Apache-2.0


class ForkError(Exception):
    """Something the user can act on: says what was expected, what was found, and
    what to do. Shown without a traceback."""


class DoesNotApply(ForkError):
    """A patch does not apply; `name` is its file's."""

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name

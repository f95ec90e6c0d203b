# SPDX-License-Identifier: Apache-2.0


class ForkError(Exception):
    """Something the user can act on: says what was expected, what was found, and
    what to do. Shown without a traceback."""

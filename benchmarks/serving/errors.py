# SPDX-License-Identifier: Apache-2.0
"""What ends the benchmark with one message."""


class BenchmarkError(Exception):
    """It cannot be measured; the message says why and what to do."""

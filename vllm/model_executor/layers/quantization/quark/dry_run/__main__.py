# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The process; see the package."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    # As a folder it is first there, and its modules may have names of others'.
    sys.path[:] = [each for each in sys.path if Path(each).resolve() != here]
    # vLLM logs to the standard output.
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        from vllm.model_executor.layers.quantization import quark

        # A release of vLLM has the folder, but not all of its modules.
        if str(here.parent) not in quark.__path__:
            quark.__path__.append(str(here.parent))
        from vllm.model_executor.layers.quantization.quark.dry_run import process

        process.answer(sys.stdin, out)
    # Threads of vLLM's have nothing more to do.
    sys.stderr.flush()
    os._exit(0)

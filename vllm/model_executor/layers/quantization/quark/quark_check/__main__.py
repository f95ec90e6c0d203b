# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The command, run as a module or by the path of this folder."""

import sys
from importlib import import_module
from pathlib import Path

if __package__:
    from .cli import main
else:
    folder = Path(__file__).resolve().parent
    # The folder itself is first there; its modules may have names of others'.
    sys.path[:] = [each for each in sys.path if Path(each).resolve() != folder]
    sys.path.insert(0, str(folder.parent))
    main = import_module(f"{folder.name}.cli").main
    sys.path.remove(str(folder.parent))

if __name__ == "__main__":
    sys.exit(main())

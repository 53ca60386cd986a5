"""`python -m olmoe` is the command `olmoe`."""

from __future__ import annotations

import sys

from olmoe.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

"""What the command `mgs` starts: it needs packages of an extra, and says so in one line where they are missing."""

from __future__ import annotations

import sys

from mgs_core import __version__
from mgs_core._errors import BackendError, extra


def main() -> None:
    """Run the command; its version is told without any other package."""
    if sys.argv[1:] == ["--version"]:
        print(f"mgs {__version__}")
        return
    try:
        with extra("app", "The command mgs"):
            from mgs_core.cli import main as run
    except BackendError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    run()

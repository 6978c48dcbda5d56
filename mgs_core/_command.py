"""What the command `mgs` starts: it needs packages of an extra, and says so in one line where they are missing."""

from __future__ import annotations

import sys

from mgs_core._errors import BackendError, extra


def main() -> None:
    """Run the command."""
    try:
        with extra("app", "The command mgs"):
            from mgs_core.cli import main as run
    except BackendError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    run()

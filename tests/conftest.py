"""Test the installed package: the repository root would shadow it."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1].resolve()
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

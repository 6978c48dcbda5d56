"""Run the command `mgs` as `python -m mgs_core`."""

from mgs_core._command import main

if __name__ == "__main__":
    main()

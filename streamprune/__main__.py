"""`python -m streamprune`, and the `streamprune` console script."""

import sys

from streamprune.cli import main


def run() -> None:
    """Runs the command line and ends the process with its exit code."""
    sys.exit(main())


if __name__ == "__main__":
    run()

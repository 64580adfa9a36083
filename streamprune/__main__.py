"""`python -m streamprune`."""

import sys

from streamprune.cli import main

if __name__ == "__main__":
    sys.exit(main())

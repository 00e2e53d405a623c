"""`python -m robustkern`: the command line."""

import sys

from robustkern.cli import main

if __name__ == "__main__":
    sys.exit(main())

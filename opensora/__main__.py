"""`python -m opensora`: the same as the command `opensora`."""

import sys

from opensora.cli import main

if __name__ == "__main__":
    sys.exit(main())

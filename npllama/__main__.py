"""python -m npllama."""

import sys

from npllama.cli import main

if __name__ == "__main__":
    sys.exit(main())

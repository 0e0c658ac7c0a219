"""python -m npllama, and the console script: the command line, which Ctrl-C ends cleanly even while it is imported."""

import sys

INTERRUPTED = 130


def run() -> int:
    """Run the command line; returns the exit code."""
    try:
        from npllama.commands.cli import main

        return main()
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(run())

"""The entry of the command: an interrupt ends it quietly from the first moment on, while it still loads."""

from __future__ import annotations

import os
import signal

EXIT_INTERRUPTED = 130


def main() -> None:
    """Runs the commands with the arguments of this process."""
    # Nothing has been started that would have to end. Whoever starts something takes the signal over.
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(EXIT_INTERRUPTED))
    from deploy.cli import commands

    commands.main()


if __name__ == "__main__":
    main()

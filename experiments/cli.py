"""How a command ends: an error is one sentence for a person, not a traceback."""

import functools
import os
import sys
from collections.abc import Callable


def for_people(command: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    """Turn what a user can mend (a value, a file, unreadable data, Ctrl-C) into a sentence and an exit status.

    TRACEBACK=1 in the environment shows where it came from.
    """

    @functools.wraps(command)
    def run(arguments: list[str]) -> None:
        try:
            command(arguments)
        except KeyboardInterrupt:
            sys.exit("interrupted; run the same command again to go on from the last checkpoint.")
        except (ValueError, OSError, RuntimeError) as error:
            if os.environ.get("TRACEBACK"):
                raise
            # from a data worker the message comes with its traceback, of which the last line is the sentence
            lines = [line for line in str(error).splitlines() if line.strip()]
            sys.exit(f"error: {lines[-1] if lines else type(error).__name__}")

    return run

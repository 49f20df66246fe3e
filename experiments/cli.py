"""How a command begins and ends: its settings as key=value, and an error is one sentence, not a traceback."""

import difflib
import functools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

Settings = TypeVar("Settings")


def settings(schema: type[Settings], arguments: Sequence[str]) -> Settings:
    """The settings of a command that has no page of configs: a dataclass with key=value put over its defaults.

    Raises:
        ValueError: no key=value, an unknown key (the nearest right one is named), a value of the wrong type.
    """
    names = [f.name for f in fields(schema)]  # type: ignore[arg-type]
    for argument in arguments:
        key, sign, _ = argument.partition("=")
        if not sign:
            raise ValueError(f"'{argument}' is not of the form key=value, as in {names[0]}=...")
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
            hint = f"did you mean '{near[0]}'?" if near else f"there are: {', '.join(names)}."
            raise ValueError(f"there is no key '{key}'; {hint}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.from_dotlist(list(arguments)))
        found = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ValueError(str(error).splitlines()[0]) from None
    assert isinstance(found, schema)
    return found


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

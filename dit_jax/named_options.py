"""Errors of functions, in the words of whoever called them by a command or a configuration.

A function's error names its own arguments ('resize'), which its reader cannot type who has only
--config.data.image_folder.resize. Where the one becomes the other, `options_named` says so.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping


def renamed(text: str, names: Mapping[str, str]) -> str:
    """A message with every `name=` replaced, and names that are no English words wherever they are.

    Args:
        text: the message.
        names: the arguments' names, with those to show instead.
    """
    for name, shown in names.items():
        follows = "" if "_" in name else "(?==)"
        text = re.sub(rf"(?<![\w.\-]){re.escape(name)}(?![\w.]){follows}", shown, text)
    return text


@contextlib.contextmanager
def options_named(names: Mapping[str, str]) -> Iterator[None]:
    """Errors that are raised within name options as their reader types them.

    Args:
        names: arguments' names, with those to show instead.
    """
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        known = len(error.args) == 1 and isinstance(error.args[0], str)
        text = renamed(error.args[0], names) if known else None
        if text is None or text == error.args[0]:
            raise
        raise type(error)(text) from error

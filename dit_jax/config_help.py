"""The configuration explained: every key with its default and its meaning, as text."""

from dit_jax import abbreviations, options
from dit_jax.config import nearest_key


def explain(word: str = "") -> str:
    """A table of the keys that have `word` in their name or meaning; '' for all.

    Args:
        word: also one of the field's abbreviations, as lr.

    Raises:
        ValueError: there is none.
    """
    words = [word.lower().removeprefix("config."), *map(str.lower, abbreviations.meant_by(word))]
    rows = [
        (f"config.{path}", repr(known.default), known.meaning)
        for path, known in sorted(options.schema().items())
        if any(w in path.lower() or w in known.meaning.lower() for w in words)
    ]
    if not rows:
        hint = nearest_key(word)
        raise ValueError(f"no key of the configuration has {word!r} in its name or meaning{hint}")
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(
        f"{key:<{widths[0]}}  {default:<{widths[1]}}  {meaning}".rstrip()
        for key, default, meaning in rows
    )

"""The configuration explained: every key with its default and its meaning, as text.

The meanings are the comments of `defaults.py`, read from its source, so that each is written once.
"""

import ast
import inspect
import io
import tokenize

from dit_jax import abbreviations, defaults
from dit_jax.config import flatten, nearest_key


def meanings() -> dict[str, str]:
    """{'model.dit.depth': comment} of every key, '' where its name says it all.

    A key's comment stands at the end of its line or above it; a section's is of the keys in it that
    have none.
    """
    source = inspect.getsource(defaults)
    comments = _comments(source)
    shared, whole = {}, None
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            shared[node.targets[0].id] = node.value
        elif isinstance(node, ast.FunctionDef) and node.name == "_library_config":
            whole = next(n for n in ast.walk(node) if isinstance(n, ast.Dict))  # the outermost
    return dict(_leaves(whole, "", shared, comments))


def _comments(source: str) -> dict[int, str]:
    """Comments by the line they are about."""
    at_ends, alone = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            place = alone if token.line.lstrip().startswith("#") else at_ends
            place[token.start[0]] = token.string.removeprefix("#").strip()
    about = {}
    for line, text in sorted(alone.items()):  # a paragraph moves down to the line below it
        about[line + 1] = f"{about.pop(line, '')} {text}".strip()
    return about | at_ends


def _leaves(node: ast.Dict, prefix: str, shared: dict, comments: dict, section: str = ""):
    for key, value in zip(node.keys, node.values, strict=True):
        if key is None:  # **_SHARED
            yield from _leaves(shared[value.id], prefix, shared, comments, section)
            continue
        comment = comments.get(key.lineno, "") or section
        path = f"{prefix}{key.value}"
        value = shared[value.id] if isinstance(value, ast.Name) else value
        if isinstance(value, ast.Dict):
            yield from _leaves(value, f"{path}.", shared, comments, comment)
        else:
            yield path, comment


def explain(word: str = "") -> str:
    """A table of the keys that have `word` in their name or meaning; '' for all.

    Args:
        word: also one of the field's abbreviations, as lr.

    Raises:
        ValueError: there is none.
    """
    said = meanings()
    words = [word.lower().removeprefix("config."), *map(str.lower, abbreviations.meant_by(word))]
    rows = [
        (f"config.{path}", repr(default), said.get(path, ""))
        for path, default in flatten(defaults.default_config())
        if any(w in path.lower() or w in said.get(path, "").lower() for w in words)
    ]
    if not rows:
        hint = nearest_key(word)
        raise ValueError(f"no key of the configuration has {word!r} in its name or meaning{hint}")
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(
        f"{key:<{widths[0]}}  {default:<{widths[1]}}  {meaning}".rstrip()
        for key, default, meaning in rows
    )

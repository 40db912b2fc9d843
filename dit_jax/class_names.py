"""Names of classes: kept in a workdir beside the configuration, and understood as labels."""

import json
from collections.abc import Sequence
from pathlib import Path

from dit_jax.nearest import nearest
from dit_jax.untrusted import Fields, read_json

FILE = "class_names.json"
_SHOWN = 5


def to_text(names: Sequence[str]) -> str:
    """What the file of a workdir is to hold; "" (no file) if no names are known."""
    if not names:
        return ""
    return json.dumps({"class_names": list(names)}, ensure_ascii=False, indent=2) + "\n"


def load(workdir: Path, num_classes: int) -> tuple[str, ...]:
    """The names of a run's classes, one a label; () if they are not known.

    Raises:
        ValueError: the file is damaged.
    """
    file = Path(workdir) / FILE
    if not file.exists():
        return ()
    names = Fields(read_json(file), file).texts("class_names")
    return names if len(names) == num_classes else ()


def find_label(wanted: int | str, names: Sequence[str], num_classes: int) -> int:
    """The label that a number or a name stands for.

    Args:
        wanted: a number, or a name; of several words separated by commas (as ImageNet's 'tench,
            Tinca tinca') any one will do, and capitals do not matter.
        names: one a label; () if they are not known.
        num_classes: how many there are.

    Raises:
        ValueError: no such class, with those whose names are nearest; or several.
    """
    if isinstance(wanted, int):
        if not 0 <= wanted < num_classes:
            raise ValueError(f"--labels {wanted}: the model's classes are 0 to {num_classes - 1}")
        return wanted
    if not names:
        raise ValueError(
            f"--labels {wanted}: the names of this model's classes are not known; give numbers, 0 "
            f"to {num_classes - 1}"
        )
    labels: dict[str, list[int]] = {}
    for label, name in enumerate(names):
        for word in {name, *(part.strip() for part in name.split(","))}:
            labels.setdefault(word.casefold(), []).append(label)
    found = labels.get(wanted.strip().casefold(), [])
    if len(found) == 1:
        return found[0]
    if found:
        listed = ", ".join(f"{label} ({names[label]})" for label in found[:_SHOWN])
        raise ValueError(f"--labels {wanted}: several classes are called so, {listed}: say which")
    near = nearest(wanted, labels, count=_SHOWN)
    near = list(dict.fromkeys(names[labels[word][0]] for word in near))
    kind = "the nearest names are" if near else "names are, for instance,"
    listed = ", ".join(near or names[:_SHOWN])
    raise ValueError(
        f"--labels {wanted}: no class is called so; {kind} {listed} (or give numbers, 0 to "
        f"{num_classes - 1})"
    )

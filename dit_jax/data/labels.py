"""Labels of classes, as data sources deliver them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Int, Integer


def validate_labels(
    labels: Integer[np.ndarray, " n"],
    num_classes: int,
    describe: Callable[[int], str],
    indices: Int[np.ndarray, " n"] | None = None,
) -> None:
    """Check that every label has a row in a model's label table.

    Args:
        labels: Class indices.
        num_classes: Number of classes; 0 for unlabelled data, whose labels must all be 0.
        describe: Names an example, by its index in the source, for the message.
        indices: The labels' indices in the source; default 0, 1, 2, ...

    Raises:
        ValueError: A label is out of range; names the first such example.
    """
    if labels.size == 0:
        return
    highest = max(num_classes - 1, 0)
    if labels.min() >= 0 and labels.max() <= highest:
        return
    wrong = np.flatnonzero((labels < 0) | (labels > highest))
    row = int(wrong[0])
    index = row if indices is None else int(indices[row])
    expected = f"0..{num_classes - 1}" if num_classes else "0 (the data are unlabelled)"
    others = f" ({wrong.size - 1} more like it)" if wrong.size > 1 else ""
    raise ValueError(
        f"label out of range: {describe(index)} has label {int(labels[row])}{others}, but with "
        f"num_classes={num_classes} labels must be in {expected}. Correct the label, or open the "
        f"source with the right number of classes."
    )

"""What a network is told besides x and t: named arrays, each declared by the network.

A network's configuration declares its conditions, `{"label": Condition(...), ...}`; a call gives
them as a dict of arrays of these names, the batch as their leading axis. Everything else follows
from the declaration: what is checked, what stands for "no condition" in classifier-free guidance,
what is dropped in training, and which ones are times. No other room needs to know their names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

Conditions = dict[str, Any]

_KINDS = {"i": "integer", "u": "integer", "b": "boolean", "f": "floating", "V": "floating"}


class ConditionError(ValueError):
    """Conditions that are not those a network takes."""


@dataclasses.dataclass(frozen=True)
class Condition:
    """One condition, as a network declares it.

    Attributes:
        shape: of one example's array; None where an axis may have any length.
        dtype: the kind of its numbers, 'int32', 'float32' (any floating type goes) or 'bool'.
        required: whether a call without it is an error; else the network says what absence means.
        null: the number that stands for "no condition", for an array of it in every place (an index
            of a class, False for a mask); None for a condition that guidance and dropout leave as
            it is (a second time, the size of a crop).
        null_is_given: "no condition" is an array that comes with the data, such as the embedding of
            an empty prompt; whoever drops the condition has to give it.
        is_time: a time of the process, which the process translates to the network's as it does t.
        limits: smallest and largest integer, ends included; None for any.
        usual: a shape that examples usually have, where an axis may have any length: what plans,
            which see no data, count with.
    """

    shape: tuple[int | None, ...] = ()
    dtype: str = "float32"
    required: bool = True
    null: float | int | bool | None = None
    null_is_given: bool = False
    is_time: bool = False
    limits: tuple[int, int] | None = None
    usual: tuple[int, ...] = ()

    @property
    def can_be_dropped(self) -> bool:
        """Whether there is a value that stands for its absence."""
        return self.null is not None or self.null_is_given

    def describe(self) -> str:
        """Shape and kind, as 'float32 [b, any, 768]'."""
        axes = ", ".join(["b", *("any" if axis is None else str(axis) for axis in self.shape)])
        return f"{self.dtype} [{axes}]"

    def accepts(self, value: Any) -> bool:
        """Whether an array, the batch leading, has the declared shape and kind of numbers."""
        shape, kind = value.shape[1:], _kind(value.dtype)
        return (
            len(value.shape) == len(self.shape) + 1
            and all(axis in (None, size) for axis, size in zip(self.shape, shape, strict=True))
            and kind == _kind(np.dtype(self.dtype))
        )

    def admits(self, other: Condition) -> bool:
        """Whether arrays of another declaration can have this one's shape and kind of numbers."""
        if len(other.shape) != len(self.shape):
            return False
        pairs = zip(self.shape, other.shape, strict=True)
        return all(None in pair or pair[0] == pair[1] for pair in pairs) and _kind(
            np.dtype(other.dtype)
        ) == _kind(np.dtype(self.dtype))


def _kind(dtype: Any) -> str:
    return "floating" if jnp.issubdtype(dtype, jnp.floating) else _KINDS.get(dtype.kind, str(dtype))


Declared = Mapping[str, Condition]


def class_label(num_classes: int, *, null: bool = True) -> dict[str, Condition]:
    """The declaration of a class label: index `num_classes` is "no class", if there is such a row.

    Args:
        num_classes: 0 declares nothing.
        null: whether the network has a row for "no class".
    """
    if not num_classes:
        return {}
    last = num_classes if null else num_classes - 1
    label = Condition((), "int32", null=num_classes if null else None, limits=(0, last))
    return {"label": label}


def second_time() -> dict[str, Condition]:
    """The declaration of "r", a second time; without it r = t."""
    return {"r": Condition(required=False, is_time=True)}


def augmentation(dim: int) -> dict[str, Condition]:
    """The declaration of "augment", what augmentation did to an image; without it nothing."""
    return {"augment": Condition((dim,), required=False)} if dim else {}


def check(declared: Declared, conditions: Mapping[str, Any], batch: int | None = None) -> None:
    """Refuses conditions that are not those declared; looks at shapes only, so it may be traced.

    Args:
        declared: the network's.
        conditions: arrays by name.
        batch: how many examples they have to be of; None if that is not known yet.

    Raises:
        ConditionError: naming all that are unknown, missing or of another shape.
    """
    unknown = sorted(conditions.keys() - declared.keys())
    missing = sorted(
        name
        for name, condition in declared.items()
        if condition.required and name not in conditions
    )
    wrong = []
    for name in (name for name in conditions if name in declared):
        value, wanted = conditions[name], declared[name]
        if not hasattr(value, "shape"):
            wrong.append(
                f"{name} is a {type(value).__name__}, expected an array {wanted.describe()}"
            )
        elif not wanted.accepts(value):
            wrong.append(
                f"{name} is {value.dtype} {list(value.shape)}, expected {wanted.describe()}"
            )
        elif batch is not None and value.shape[0] != batch:
            wrong.append(f"{name} is of {value.shape[0]} examples, expected {batch}")
    if not (unknown or missing or wrong):
        return
    problems = [f"unknown: {', '.join(unknown)}"] * bool(unknown)
    problems += [f"missing: {', '.join(missing)}"] * bool(missing) + wrong
    raise ConditionError(
        f"conditions do not fit the network; {'; '.join(problems)}. It takes {describe(declared)}"
    )


def check_values(declared: Declared, conditions: Mapping[str, Any]) -> None:
    """Refuses integers out of their limits; for arrays of numbers, not while tracing.

    Raises:
        ConditionError: naming the first such value and the limits.
    """
    for name, condition in declared.items():
        if condition.limits is None or name not in conditions:
            continue
        low, high = condition.limits
        values = np.asarray(conditions[name])
        outside = values[(values < low) | (values > high)]
        if outside.size:
            known = f"{low} to {high} and no null {'class' if name == 'label' else name}"
            if condition.null == high:
                known = f"{low} to {high - 1}, and {high} for no {name}"
            raise ConditionError(
                f"{name} {outside.flat[0]} is out of range: the network knows {known}"
            )


def describe(declared: Declared) -> str:
    """The declared conditions in words, for errors."""
    if not declared:
        return "no conditions"
    return ", ".join(
        f"{name} {condition.describe()}{'' if condition.required else ' (optional)'}"
        for name, condition in declared.items()
    )


def as_conditions(declared: Declared, given: Any) -> Conditions:
    """Conditions from what a caller finds convenient: a dict, an array of labels, or None.

    Labels are left out for a network that has no classes, as every data set has labels.
    """
    if given is None:
        return {}
    if isinstance(given, Mapping):
        return dict(given)
    return {"label": np.asarray(given, np.int32)} if "label" in declared else {}


def select(declared: Declared, batch: Mapping[str, Any]) -> Conditions:
    """The conditions of a batch of data, checked.

    A label that an unconditional network has no use for is left out; anything else that the network
    does not take is an error, so that nothing is dropped in silence.

    Raises:
        ConditionError: as `check`.
    """
    found = dict(batch.get("conditions", {}))
    if "label" not in declared:
        found.pop("label", None)
    check(declared, found)
    return found


# -- no condition ----------------------------------------------------------------------------------


def can_guide(declared: Declared) -> bool:
    """Whether there is anything to drop, which is what guidance compares with."""
    return any(condition.can_be_dropped for condition in declared.values())


def require_guidance(declared: Declared, reason: str) -> None:
    """Refuses guidance of a network that does not know "no condition".

    Raises:
        ConditionError: with `reason` in front.
    """
    if can_guide(declared):
        return
    if "label" in declared:
        raise ConditionError(
            f"{reason} needs a null class, and this network has none "
            "(model.dit.null_class=False): it was trained without label dropout. Use "
            "guidance_scale=1"
        )
    raise ConditionError(
        f"{reason} needs a network that knows the absence of its conditions, as a "
        f"class-conditional one does; this one takes {describe(declared)}. Use guidance_scale=1"
    )


def null_values(declared: Declared, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The value that stands for "no condition", an array without a batch axis, of every condition
    that can be dropped.

    Args:
        declared: the network's conditions.
        given: arrays that come with the data.

    Raises:
        ConditionError: one is missing, is of no condition that can be dropped, or has another
            number of axes.
    """
    given = dict(given or {})
    idle = sorted(name for name in given if not (name in declared and declared[name].null_is_given))
    if idle:
        raise ConditionError(
            f"null values of {', '.join(idle)} would do nothing: the network takes "
            f"{describe(declared)}, and asks for null values of none of these"
        )
    values = {}
    for name, condition in declared.items():
        if condition.null_is_given:
            if name not in given:
                raise ConditionError(
                    f"dropping {name} needs its null value, {condition.describe()} without the "
                    "batch (for a text, the embedding of the empty prompt)"
                )
            values[name] = given[name]
            if len(values[name].shape) != len(condition.shape):
                raise ConditionError(
                    f"the null value of {name} is {list(values[name].shape)}, expected "
                    f"{condition.describe()} without the batch"
                )
        elif condition.null is not None:
            values[name] = np.asarray(condition.null, condition.dtype)
    return values


def without(conditions: Mapping[str, Array], nulls: Mapping[str, Any]) -> Conditions:
    """The conditions with every one that has a null value replaced by it; others stay."""
    return {
        name: _filled(nulls[name], value) if name in nulls else value
        for name, value in conditions.items()
    }


def drop(
    conditions: Mapping[str, Array], nulls: Mapping[str, Any], dropped: Bool[Array, " b"]
) -> Conditions:
    """The conditions, null where `dropped`: all of an example's together, as guidance does it."""
    return {
        name: jnp.where(_expanded(dropped, value), _filled(nulls[name], value), value)
        if name in nulls
        else value
        for name, value in conditions.items()
    }


def droppable(conditions: Iterable[str], nulls: Mapping[str, Any]) -> bool:
    """Whether any of the conditions has a null value."""
    return any(name in nulls for name in conditions)


def _expanded(mask: Array, value: Array) -> Array:
    return mask.reshape(mask.shape + (1,) * (value.ndim - 1))


def _filled(null: Any, value: Array) -> Array:
    """A null value for a whole batch: shorter than the axes of `value`, it is followed by zeros, as
    a short prompt is by padding."""
    null = jnp.asarray(null, value.dtype)
    if null.ndim:
        missing = [size - have for size, have in zip(value.shape[1:], null.shape, strict=True)]
        if min(missing) < 0:
            raise ConditionError(
                f"a null value of {list(null.shape)} does not go into {list(value.shape)}"
            )
        null = jnp.pad(null, [(0, count) for count in missing])
    return jnp.broadcast_to(null, value.shape)


def take(conditions: Mapping[str, Any], indices: Any) -> Conditions:
    """Some examples' conditions, by their places in the batch."""
    return jax.tree.map(lambda value: value[indices], dict(conditions))

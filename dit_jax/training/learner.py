"""One network that learns: its conditions, its update, its averages, whatever the objective."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import optax
from jaxtyping import Array, Key

from dit_jax import conditions as conditions_lib
from dit_jax.training import ema as ema_lib
from dit_jax.training.method import Batch


def nulls_of(frozen: Any) -> Mapping[str, Any] | None:
    """What stands for "no condition" where a network does not know it by itself, if given."""
    return (frozen or {}).get("nulls")


def drop_conditions(
    declared: conditions_lib.Declared,
    batch: Batch,
    rate: float,
    key: Key[Array, ""],
    frozen: Any = None,
) -> dict[str, Array]:
    """The conditions of a batch, all of an example's together dropped at `rate`.

    Args:
        declared: the network's.
        batch: of data.
        rate: probability; 0 draws nothing.
        key: of the draw.
        frozen: what a method reads and never trains; its "nulls", if any, stand for "no condition"
            where the network does not know it by itself.
    """
    conditions = conditions_lib.select(declared, batch)
    if not rate or not conditions_lib.can_guide(declared):
        return conditions
    nulls = conditions_lib.null_values(declared, nulls_of(frozen))
    dropped = jax.random.bernoulli(key, rate, batch["image"].shape[:1])
    return conditions_lib.drop(conditions, nulls, dropped)


def require_null_class(network: Any, label_dropout: float) -> None:
    """Refuses to drop labels for a network that has no class to put in their place.

    Raises:
        ValueError: with the values to set.
    """
    label = network.conditions.get("label")
    if label_dropout and label is not None and not label.can_be_dropped:
        raise ValueError(
            f"method.label_dropout={label_dropout}, but model.dit.null_class=False: the network "
            "has no class that stands for none. Set method.label_dropout=0, or "
            "model.dit.null_class=True"
        )


class Learner:
    """What plain denoising and every student do alike.

    A frozen dataclass that is one has the fields `denoiser` (network and process), `optimizer` (an
    optax transformation), `averages` (EMAs to keep) and `label_dropout` (probability of dropping an
    example's conditions). Its states have `step`, `params`, `ema` and `optimizer`.
    """

    def __post_init__(self):
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(f"method.label_dropout={self.label_dropout}: expected 0 to 1")
        require_null_class(self.denoiser.network, self.label_dropout)

    def apply_gradients(self, state: Any, gradients: Any) -> Any:
        """The state after one update: counts the step and updates the averages."""
        updates, optimizer = self.optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        step = state.step + 1
        ema = ema_lib.update(self.averages, state.ema, params, step)
        return dataclasses.replace(state, step=step, params=params, ema=ema, optimizer=optimizer)

    def weights(self, state: Any) -> dict[str, Any]:
        """'raw' and every average by its name."""
        return {**state.ema, "raw": state.params}

    def draw_conditions(
        self, batch: Batch, key: Key[Array, ""], frozen: Any = None
    ) -> dict[str, Array]:
        """The conditions of a batch, some examples' dropped."""
        declared = self.denoiser.network.conditions
        return drop_conditions(declared, batch, self.label_dropout, key, frozen)

"""The functional face of a network: parameters in, arrays out.

A `flax.nnx` module is split once into its static graph and a plain nested dict of arrays; all the
rest of the library sees only that dict, so states are ordinary pytrees and steps pure functions.
"""

import dataclasses
import functools
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Key

from dit_jax.models import dit

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Network:
    """A network's architecture as pure functions; hashable, holds no arrays."""

    config: dit.DiTConfig

    @functools.cached_property
    def _graph(self):
        module = nnx.eval_shape(lambda: self._create(jax.random.key(0)))
        return nnx.split(module)[0]

    def _create(self, key: Key[Array, ""]) -> nnx.Module:
        return dit.DiT(self.config, rngs=nnx.Rngs(params=key))

    def init(self, key: Key[Array, ""]) -> Params:
        """Fresh float32 parameters as a nested dict. Jit it to create them where they will live."""
        return nnx.to_pure_dict(nnx.state(self._create(key), nnx.Param))

    def apply(
        self,
        params: Params,
        x: Float[Array, "b h w c"],
        t: Float[Array, " b"],
        conditions: dict[str, Array],
        *,
        attention: Any = None,
        attention_state: Any = None,
    ):
        """Calls the network with `params`; see the network's own `__call__`."""
        module = nnx.merge(self._graph, params)
        return module(x, t, conditions, attention=attention, attention_state=attention_state)

    def null_conditions(self, conditions: dict[str, Array]) -> dict[str, Array]:
        """Conditions of the same shapes that stand for "no condition"."""
        return {
            name: jax.numpy.full_like(value, self.config.num_classes)
            for name, value in conditions.items()
        }

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of one sample."""
        return (*self.config.input_size, self.config.in_channels)

    @property
    def num_classes(self) -> int:
        """Number of classes, 0 if unconditional."""
        return self.config.num_classes

    @property
    def learn_sigma(self) -> bool:
        """Whether the output carries a learned variance besides the prediction."""
        return self.config.learn_sigma

    @property
    def flops_per_example(self) -> float:
        """Floating-point operations of one example's forward pass."""
        return dit.flops_per_example(self.config)

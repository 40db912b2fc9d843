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

from dit_jax.models import dit, edm

Params = dict[str, Any]
NetworkConfig = dit.DiTConfig | edm.SongUNetConfig | edm.DhariwalUNetConfig

_MODULES = {
    dit.DiTConfig: dit.DiT,
    edm.SongUNetConfig: edm.SongUNet,
    edm.DhariwalUNetConfig: edm.DhariwalUNet,
}


@dataclasses.dataclass(frozen=True)
class Network:
    """A network's architecture as pure functions; hashable, holds no arrays."""

    config: NetworkConfig

    @functools.cached_property
    def _graph(self):
        module = nnx.eval_shape(lambda: self._create(jax.random.key(0)))
        return nnx.split(module)[0]

    def _create(self, key: Key[Array, ""]) -> nnx.Module:
        return _MODULES[type(self.config)](self.config, rngs=nnx.Rngs(params=key))

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
        dropout_keys: Key[Array, " b"] | None = None,
        features: tuple[int, ...] | None = None,
        attention: Any = None,
        attention_state: Any = None,
        spatial: Any = None,
    ):
        """Calls the network with `params`.

        Args:
            params: of `init`.
            x: the (preconditioned) noisy input.
            t: network time, as the process defines it.
            conditions: "label" (int32 [b], `num_classes` for none), "r" (a second network time
                [b], where the network has one; without it, t), "augment" (labels of the
                augmentation [b, augment_dim]); absent ones stand for none.
            dropout_keys: one key an example, so that masks do not depend on the batch; None for no
                dropout.
            features: numbers of feature maps wanted besides, see `feature_shapes`.
            attention: a strategy for the attention seam; by default local attention.
            attention_state: the strategy's state.
            spatial: of U-Nets, how layers see the rows around them (`models.spatial`); by default
                the whole image is at hand.

        Returns:
            float32 output [b, h, w, c]; with `features` (output, maps [b, h', w', c']); with
            `attention_state` (output, new state).
        """
        options = {} if features is None else {"features": features}
        if dropout_keys is not None:
            options["dropout_keys"] = dropout_keys
        if spatial is not None:
            options["spatial"] = spatial
        module = nnx.merge(self._graph, params)
        return module(
            x, t, conditions, attention=attention, attention_state=attention_state, **options
        )

    def features(
        self,
        params: Params,
        x: Float[Array, "b h w c"],
        t: Float[Array, " b"],
        conditions: dict[str, Array],
        indices: tuple[int, ...],
    ) -> tuple[Float[Array, "b _h _w _c"], ...]:
        """Feature maps alone. Under jit whatever follows the last one is never computed."""
        return self.apply(params, x, t, conditions, features=tuple(indices))[1]

    def null_conditions(self, conditions: dict[str, Array]) -> dict[str, Array]:
        """The conditions with "no class" for the label; times and augmentation stay.

        Raises:
            ValueError: the network has no null class.
        """
        if "label" in conditions and not self.null_class:
            raise ValueError(
                "guidance needs a null class, and this network has none (model.null_class=False): "
                "it was trained without label dropout. Use guidance_scale=1"
            )
        return {
            name: jax.numpy.full_like(value, self.config.num_classes) if name == "label" else value
            for name, value in conditions.items()
        }

    @property
    def feature_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """(height, width, channels) of the feature maps there are, from input to output."""
        return self.config.feature_shapes

    @property
    def has_second_time(self) -> bool:
        """Whether it takes a second time r, as average velocities need."""
        return self.config.second_time != "none"

    @property
    def has_dropout(self) -> bool:
        """Whether dropout keys make a difference."""
        return getattr(self.config, "dropout", 0.0) > 0

    @property
    def augment_dim(self) -> int:
        """Number of augmentation labels it takes, 0 for none."""
        return self.config.augment_dim

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of one sample."""
        return (*self.config.input_size, self.config.in_channels)

    @property
    def num_classes(self) -> int:
        """Number of classes, 0 if unconditional."""
        return self.config.num_classes

    @property
    def null_class(self) -> bool:
        """Whether label `num_classes` stands for "no class"."""
        return self.num_classes > 0 and getattr(self.config, "null_class", True)

    @property
    def learn_sigma(self) -> bool:
        """Whether the output carries a learned variance besides the prediction."""
        return self.config.learn_sigma

    @property
    def flops_per_example(self) -> float:
        """Floating-point operations of one example's forward pass."""
        return self.config.flops_per_example

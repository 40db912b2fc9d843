"""Network + process = denoiser: the one object samplers, losses and methods talk to."""

import dataclasses
from typing import Any

from jaxtyping import Array, Float, Key

from dit_jax.diffusion.process import Prediction, Process
from dit_jax.models.network import Params


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """A network read through a process. Times are the process's own; `params` come with each call.

    Attributes:
        network: the architecture, a `models.Network` or what has its face.
        process: the noising process the network was trained on.
    """

    network: Any
    process: Process

    def raw(
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
    ):
        """The network's output for noisy `x` at time `t`, before interpretation.

        Variance channels are kept where the process uses them (DDPM) and dropped elsewhere, as SiT
        does with its doubled output.

        Args:
            params: the network's.
            x: noisy data.
            t: the process's time.
            conditions: as `Network.apply`, but a second time "r" is the process's here.
            dropout_keys: one an example; None for no dropout.
            features: numbers of feature maps wanted besides.
            attention: a strategy for the attention seam.
            attention_state: its state.

        Returns:
            The output; with `features` (output, feature maps); with `attention_state` (output, new
            state).
        """
        x_in, t_network = self.process.network_inputs(x, t)
        out = self.network.apply(
            params,
            x_in,
            t_network,
            self._network_conditions(x, conditions),
            dropout_keys=dropout_keys,
            features=features,
            attention=attention,
            attention_state=attention_state,
        )
        more = None
        if attention_state is not None or features is not None:
            out, more = out
        if self.network.learn_sigma and not self.process.learned_variance:
            out = out[..., : x.shape[-1]]
        return out if more is None else (out, more)

    def _network_conditions(self, x: Array, conditions: dict[str, Array]) -> dict[str, Array]:
        if "r" not in conditions:
            return conditions
        return {**conditions, "r": self.process.network_inputs(x, conditions["r"])[1]}

    def features(
        self,
        params: Params,
        x: Float[Array, "b h w c"],
        t: Float[Array, " b"],
        conditions: dict[str, Array],
        indices: tuple[int, ...],
    ) -> tuple[Float[Array, "b _h _w _c"], ...]:
        """Feature maps of noisy `x` alone, see `Network.feature_shapes`."""
        x_in, t_network = self.process.network_inputs(x, t)
        conditions = self._network_conditions(x, conditions)
        return self.network.features(params, x_in, t_network, conditions, indices)

    def predict(
        self,
        params: Params,
        x: Float[Array, "b h w c"],
        t: Float[Array, " b"],
        conditions: dict[str, Array],
        *,
        dropout_keys: Key[Array, " b"] | None = None,
    ) -> Prediction:
        """The network's prediction of x0 and eps (and of the variance, if learned)."""
        raw = self.raw(params, x, t, conditions, dropout_keys=dropout_keys)
        return self.process.interpret(raw, x, t)

    def predict_with_features(
        self,
        params: Params,
        x: Float[Array, "b h w c"],
        t: Float[Array, " b"],
        conditions: dict[str, Array],
        indices: tuple[int, ...],
        *,
        dropout_keys: Key[Array, " b"] | None = None,
    ) -> tuple[Prediction, tuple[Float[Array, "b _h _w _c"], ...]]:
        """Prediction and feature maps of one evaluation."""
        raw, features = self.raw(
            params, x, t, conditions, dropout_keys=dropout_keys, features=tuple(indices)
        )
        return self.process.interpret(raw, x, t), features

    def x0(self, params, x, t, conditions, *, dropout_keys=None) -> Float[Array, "b h w c"]:
        """The predicted clean image."""
        return self.predict(params, x, t, conditions, dropout_keys=dropout_keys).x0

    def eps(self, params, x, t, conditions, *, dropout_keys=None) -> Float[Array, "b h w c"]:
        """The predicted noise."""
        return self.predict(params, x, t, conditions, dropout_keys=dropout_keys).eps

    def velocity(self, params, x, t, conditions, *, dropout_keys=None) -> Float[Array, "b h w c"]:
        """The predicted velocity, in the process's convention."""
        prediction = self.predict(params, x, t, conditions, dropout_keys=dropout_keys)
        return self.process.velocity(prediction.x0, prediction.eps, t)

    def score(self, params, x, t, conditions, *, dropout_keys=None) -> Float[Array, "b h w c"]:
        """The predicted score, grad log p_t(x) = -eps / sigma."""
        prediction = self.predict(params, x, t, conditions, dropout_keys=dropout_keys)
        return self.process.score(prediction.eps, t)

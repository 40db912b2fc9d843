"""Network + process = denoiser: the one object samplers, losses and methods talk to."""

import dataclasses
from typing import Any

from jaxtyping import Array, Float

from dit_jax.diffusion.process import Prediction, Process
from dit_jax.models.network import Network, Params


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """A network read through a process. Times are the process's own; `params` come with each call.

    Attributes:
        network: the architecture.
        process: the noising process the network was trained on.
    """

    network: Network
    process: Process

    def raw(
        self,
        params: Params,
        x: Float[Array, "b h w c"],
        t: Float[Array, " b"],
        conditions: dict[str, Array],
        *,
        attention: Any = None,
        attention_state: Any = None,
    ):
        """The network's output for noisy `x` at time `t`, before interpretation.

        Variance channels are kept where the process uses them (DDPM) and dropped elsewhere, as SiT
        does with its doubled output. With `attention_state`, returns (output, new state).
        """
        x_in, t_network = self.process.network_inputs(x, t)
        out = self.network.apply(
            params,
            x_in,
            t_network,
            conditions,
            attention=attention,
            attention_state=attention_state,
        )
        state = None
        if attention_state is not None:
            out, state = out
        if self.network.learn_sigma and not self.process.learned_variance:
            out = out[..., : x.shape[-1]]
        return out if attention_state is None else (out, state)

    def predict(
        self,
        params: Params,
        x: Float[Array, "b h w c"],
        t: Float[Array, " b"],
        conditions: dict[str, Array],
    ) -> Prediction:
        """The network's prediction of x0 and eps (and of the variance, if learned)."""
        return self.process.interpret(self.raw(params, x, t, conditions), x, t)

    def x0(self, params, x, t, conditions) -> Float[Array, "b h w c"]:
        """The predicted clean image."""
        return self.predict(params, x, t, conditions).x0

    def eps(self, params, x, t, conditions) -> Float[Array, "b h w c"]:
        """The predicted noise."""
        return self.predict(params, x, t, conditions).eps

    def velocity(self, params, x, t, conditions) -> Float[Array, "b h w c"]:
        """The predicted velocity, in the process's convention."""
        prediction = self.predict(params, x, t, conditions)
        return self.process.velocity(prediction.x0, prediction.eps, t)

    def score(self, params, x, t, conditions) -> Float[Array, "b h w c"]:
        """The predicted score, grad log p_t(x) = -eps / sigma."""
        prediction = self.predict(params, x, t, conditions)
        return self.process.score(prediction.eps, t)

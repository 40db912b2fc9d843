"""Network + process = denoiser: the one object samplers, losses and methods talk to."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from dit_jax.diffusion.process import Prediction, Process
from dit_jax.models.call import Request, Result
from dit_jax.models.network import Params


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """A network read through a process.

    Requests have the process's own times, `t` and those among the conditions alike; the process
    translates all of them to the network's.

    Attributes:
        network: the architecture, a `models.Network` or what has its face.
        process: the noising process the network was trained on.
    """

    network: Any
    process: Process

    def raw(self, params: Params, request: Request) -> Result:
        """The network's output for noisy `request.x`, before interpretation.

        Variance channels are kept where the process uses them (DDPM) and dropped elsewhere, as SiT
        does with its doubled output.
        """
        x, process = request.x, self.process
        x_in, t_network = process.network_inputs(x, request.t)
        conditions = {
            name: process.network_inputs(x, value)[1] if self._is_time(name) else value
            for name, value in request.conditions.items()
        }
        result = self.network.apply(
            params, request.replace(x=x_in, t=t_network, conditions=conditions)
        )
        if self.network.learn_sigma and not process.learned_variance:
            return dataclasses.replace(result, out=result.out[..., : x.shape[-1]])
        return result

    def ahead(self, params: Params, times: Float[Array, " n"], conditions: Any) -> Any:
        """`Network.ahead` for evaluations at the process's `times`; None if there is no such thing.

        Conditions that are times go with each evaluation: with any there is none either.
        """
        known = getattr(self.network, "ahead", None)
        if known is None or any(map(self._is_time, conditions)):
            return None
        no_input = jnp.zeros((times.shape[0], 1, 1, 1))
        return known(params, self.process.network_inputs(no_input, times)[1], conditions)

    def _is_time(self, name: str) -> bool:
        declared = self.network.conditions.get(name)
        return declared is not None and declared.is_time

    def features(self, params: Params, request: Request) -> tuple[Float[Array, "b _h _w _c"], ...]:
        """The feature maps asked for alone. Under jit what follows the last is never computed."""
        return self.raw(params, request).features

    def predict(self, params: Params, request: Request) -> Prediction:
        """The network's prediction of x0 and eps (and of the variance, if learned)."""
        return self.predict_with_features(params, request)[0]

    def predict_with_features(
        self, params: Params, request: Request
    ) -> tuple[Prediction, tuple[Float[Array, "b _h _w _c"], ...]]:
        """Prediction and feature maps of one evaluation."""
        result = self.raw(params, request)
        return self.process.interpret(result.out, request.x, request.t), result.features

    def x0(self, params: Params, request: Request) -> Float[Array, "b h w c"]:
        """The predicted clean image."""
        return self.predict(params, request).x0

    def eps(self, params: Params, request: Request) -> Float[Array, "b h w c"]:
        """The predicted noise."""
        return self.predict(params, request).eps

    def velocity(self, params: Params, request: Request) -> Float[Array, "b h w c"]:
        """The predicted velocity, in the process's convention."""
        prediction = self.predict(params, request)
        return self.process.velocity(prediction.x0, prediction.eps, request.t)

    def score(self, params: Params, request: Request) -> Float[Array, "b h w c"]:
        """The predicted score, grad log p_t(x) = -eps / sigma."""
        return self.process.score(self.predict(params, request).eps, request.t)

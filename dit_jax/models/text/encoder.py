"""The functional face of a text encoder: parameters and token ids in, states out."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Int, Key

from dit_jax.models.structure import Structure, module_of
from dit_jax.models.text.clip import CLIPText, CLIPTextConfig
from dit_jax.models.text.parts import TextStates, hidden_blocks
from dit_jax.models.text.t5 import T5Config, T5Encoder

Params = dict[str, Any]

_MODULES: dict[type, type[nnx.Module]] = {CLIPTextConfig: CLIPText, T5Config: T5Encoder}


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """A text encoder's architecture as pure functions; hashable, holds no arrays.

    Attributes:
        config: a `CLIPTextConfig` or a `T5Config`.
    """

    config: CLIPTextConfig | T5Config

    @functools.cached_property
    def _graphs(self) -> dict[Structure, Any]:
        return {}

    def _graph(self, params: Params) -> Any:
        """The module's static graph, of parameters with or without the factors of a LoRA."""
        structure = Structure.of(params)
        if structure not in self._graphs:
            self._graphs[structure] = nnx.split(module_of(self, structure))[0]
        return self._graphs[structure]

    def create(self, key: Key[Array, ""]) -> nnx.Module:
        """The module with fresh parameters."""
        return _MODULES[type(self.config)](self.config, rngs=nnx.Rngs(params=key))

    def init(self, key: Key[Array, ""]) -> Params:
        """Fresh parameters as a nested dict. Jit it to create them where they will live."""
        return nnx.to_pure_dict(nnx.state(self.create(key), nnx.Param))

    def encode(
        self,
        params: Params,
        ids: Int[Array, "b l"],
        mask: Bool[Array, "b l"] | None = None,
        *,
        hidden: tuple[int, ...] = (),
    ) -> TextStates:
        """The states of prompts' tokens.

        Args:
            params: the parameters, of `init` or `lora.attach`.
            ids: of tokens, padded to one length.
            mask: True for tokens, False for padding, to which then nothing attends; None for none,
                as FLUX and Stable Diffusion encode: they attend to the padding, too.
            hidden: numbers of the blocks whose states are wanted besides, ascending; negative ones
                are counted from the last: SDXL's "penultimate" is -2.

        Raises:
            ValueError: ids that are no integers, a mask of another shape, more tokens than the
                encoder has positions for, or a block that it does not have.
        """
        if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(
                f"ids of shape {ids.shape} and {ids.dtype}: expected integers [batch, length]"
            )
        if mask is not None and (mask.shape != ids.shape or mask.dtype != jnp.bool_):
            raise ValueError(
                f"a mask of shape {mask.shape} and {mask.dtype}: expected bool {list(ids.shape)}, "
                "True where there is a token"
            )
        blocks = hidden_blocks(tuple(hidden), self.config.depth)
        return nnx.merge(self._graph(params), params)(ids, mask, blocks)

"""A text encoder with its tokenizer: prompts in, states out, one compiled program."""

import dataclasses
import functools
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from dit_jax.interop.tensors import InteropError
from dit_jax.interop.tokenizer_files import Prompts, PromptTokenizer
from dit_jax.models.text import TextEncoder
from dit_jax.programs import Program, Programs


@dataclasses.dataclass(frozen=True, eq=False)
class TextPart:
    """An encoder of prompts.

    Attributes:
        title: for messages, as 'CLIP'.
        output: which of its states are wanted, a field of `TextStates`.
        tokenizer: of its prompts.
        encoder: the architecture.
        params: its parameters.
    """

    title: str
    output: str
    tokenizer: PromptTokenizer
    encoder: TextEncoder
    params: Any

    def __call__(
        self,
        prompts: Sequence[str],
        max_length: int | None = None,
        programs: Programs | None = None,
    ) -> Array:
        """The states of prompts, each padded or cut to `max_length` tokens, which a warning tells.

        Nothing is masked: what FLUX and Stable Diffusion were trained with attends to the padding.
        The compiled program is found or kept in `programs`, if given.
        """
        found = self.tokenizer(prompts, max_length)
        for prompt, cut in zip(prompts, found.cut, strict=True):
            if cut:
                warnings.warn(
                    f"{self.title} takes {found.ids.shape[1]} tokens of a prompt; of "
                    f"{_beginning(prompt)} this was cut off: {cut!r}",
                    stacklevel=2,
                )
        # One by one: a program serves any number of prompts, and 512 tokens keep a device busy.
        states = {ids.tobytes(): self._encode(ids[None], programs) for ids in _unlike(found)}
        each = [states[ids.tobytes()] for ids in found.ids]
        return each[0] if len(each) == 1 else jnp.concatenate(each)

    def program(self, length: int | None = None) -> Program:
        """What is compiled for prompts of so many tokens (None: the tokenizer's own limit)."""
        return self._program(self.tokenizer([""], length).ids)

    def _program(self, ids: np.ndarray) -> Program:
        function = functools.partial(_encode, self.encoder, self.output)
        compiled_in = {"encoder": self.encoder.config, "output": self.output}
        return Program(
            f"encode-{self.title}", function, compiled_in, {"params": self.params, "ids": ids}
        )

    def _encode(self, ids: np.ndarray, programs: Programs | None) -> Array:
        if programs is not None:
            return programs.call(self._program(ids))
        return _encode(self.encoder, self.output, self.params, ids)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _encode(
    encoder: TextEncoder, output: str, params: Any, ids: Integer[Array, "n l"]
) -> Float[Array, "n ..."]:
    return getattr(encoder.encode(params, ids), output)


def _unlike(prompts: Prompts) -> list[np.ndarray]:
    """The ids of prompts, of equal ones once."""
    return list({ids.tobytes(): ids for ids in prompts.ids}.values())


def _beginning(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 40 else f"{prompt[:40]}...")


def check_vocabulary(where: Any, title: str, tokenizer: PromptTokenizer, vocab_size: int) -> None:
    """Refuses a tokenizer whose ids the encoder has no embedding for.

    Raises:
        InteropError: they are not of the same model.
    """
    if tokenizer.vocab_size > vocab_size:
        raise InteropError(
            f"{where}: {title}'s tokenizer has ids up to {tokenizer.vocab_size - 1}, its encoder "
            f"embeddings for {vocab_size} of them: they are not of the same model"
        )

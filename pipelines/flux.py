"""FLUX.1 from a diffusers checkpoint: prompts in, pictures out, three compiled programs.

    from dit_jax import FluxPipeline
    pipe = FluxPipeline.from_pretrained("FLUX.1-schnell", dtype="bfloat16")
    pipe("a cat holding a sign", height=1024, width=1024, num_inference_steps=4).images[0].save(...)

The encoders are a program each; from their states to the latents is one (`dit_jax.sampling`), and
from latents to pixels another. torch is not imported. Arguments have the names they have in
diffusers' pipeline of the same name.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from dit_jax.denoiser import Denoiser
from dit_jax.diffusion.process import RectifiedFlow
from dit_jax.diffusion.solvers import Euler
from dit_jax.evaluation import to_uint8
from dit_jax.models import AutoencoderKL
from dit_jax.pipelines import flux_files
from dit_jax.sampling import Sampler, image_keys

PROCESS = RectifiedFlow(network_convention="flux", time_scale=1000.0)
OUTPUT_TYPES = ("pil", "np", "latent")
MAX_PROMPT = 512  # tokens of T5; schnell was trained with half as many
_DEFAULT_LATENTS = 128  # a side: 1024 pixels
_PACKED = 2  # a token is 2 x 2 latents


@dataclasses.dataclass(frozen=True)
class FluxOutput:
    """What a call gives.

    Attributes:
        images: PIL images; or float32 [n, height, width, 3] in [0, 1] ('np'); or latents [n, h, w,
            channels] ('latent').
    """

    images: Any


class FluxPipeline:
    """Text to image, and with `image` editing (FLUX.1 Kontext).

    Args:
        parts: what it is made of, see `from_pretrained`.
    """

    def __init__(self, parts: flux_files.FluxParts):
        self.parts = parts

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        dtype: Any = "auto",
        param_dtype: str = "auto",
        quantization: str = "none",
        layer_loop: str = "auto",
        attention: str = "auto",
    ) -> "FluxPipeline":
        """Reads a pipeline that diffusers, or `save_pretrained`, saved.

        Args:
            source: its folder, or 'hub:owner/name[@revision]'; 'owner/name' means that too.
            dtype: of products: 'float32', 'bfloat16' or 'auto', bfloat16 on accelerators.
            param_dtype: what weights are stored in; 'auto' is bfloat16 where products are computed
                in it, else what the files hold.
            quantization: of the transformer's products, see docs/precision.md.
            layer_loop: of the transformer and the encoders, 'scan', 'unroll' or 'auto'.
            attention: their kernel, see `models.attention.IMPLEMENTATIONS`.

        Raises:
            InteropError: a component or a tokenizer's file is missing, is another model's, or does
                not go with the others; nothing is read before that is known.
        """
        dtype = str(dtype).removeprefix("torch.")
        options = {"layer_loop": layer_loop, "attention": attention, "quantization": quantization}
        return cls(flux_files.load(source, dtype=dtype, param_dtype=param_dtype, **options))

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Writes the folder that diffusers' `FluxPipeline.from_pretrained` loads.

        Tensors have the dtype they are stored in. It appears complete or not at all.

        Raises:
            FileExistsError: `folder` exists.
            InteropError: the weights are quantised.
        """
        flux_files.save(folder, self.parts, overwrite=overwrite)

    @property
    def is_guided(self) -> bool:
        """Whether the network is told a guidance scale: dev and Kontext are, schnell is not."""
        return self.parts.transformer.config.guidance_embedding

    @property
    def title(self) -> str:
        """Which FLUX it is, as 'FLUX.1 dev'."""
        return self.parts.transformer.config.title

    def picture_size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """(height, width) in pixels, 1024 where None is given.

        Raises:
            ValueError: no multiples of 16.
        """
        factor = self.parts.vae.downsampling_factor
        multiple, default = factor * _PACKED, _DEFAULT_LATENTS * factor
        height, width = height or default, width or default
        if min(height, width) < multiple or height % multiple or width % multiple:
            near = [max(multiple, round(side / multiple) * multiple) for side in (height, width)]
            raise ValueError(
                f"height={height}, width={width}: expected multiples of {multiple}, for instance "
                f"{near[0]} and {near[1]}"
            )
        return height, width

    def check(
        self,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        max_sequence_length: int | None = None,
    ) -> None:
        """Refuses what a call would refuse of these arguments, without doing anything.

        Raises:
            ValueError: as a call.
        """
        self._times(num_inference_steps, sigmas, self._latent_size(height, width))
        self._guidance(guidance_scale)
        self._text_length(max_sequence_length)

    def encode_prompt(
        self,
        prompt: str | Sequence[str],
        prompt_2: str | Sequence[str] | None = None,
        *,
        max_sequence_length: int | None = None,
    ) -> tuple[Float[Array, "b l d"], Float[Array, "b p"]]:
        """(T5's states of prompts, CLIP's pooled vectors): what `prompt_embeds` and
        `pooled_prompt_embeds` take.

        Args:
            prompt: one or several.
            prompt_2: for T5, instead.
            max_sequence_length: T5's tokens; default 512, of schnell 256.

        Raises:
            ValueError: as a call.
        """
        prompts = _as_list("prompt", prompt)
        others = prompts if prompt_2 is None else _as_list("prompt_2", prompt_2)
        if len(others) != len(prompts):
            raise ValueError(f"{len(prompts)} of prompt and {len(others)} of prompt_2")
        length = self._text_length(max_sequence_length)
        return self.parts.t5(others, length).tokens, self.parts.clip(prompts).pooled

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        prompt_2: str | Sequence[str] | None = None,
        *,
        image: Any = None,
        negative_prompt: str | None = None,
        negative_prompt_2: str | None = None,
        true_cfg_scale: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        seed: int = 0,
        generator: Key[Array, "*n"] | None = None,
        latents: Any = None,
        prompt_embeds: Any = None,
        pooled_prompt_embeds: Any = None,
        max_sequence_length: int | None = None,
        output_type: str = "pil",
    ) -> FluxOutput:
        """Makes pictures, all of them at once.

        A size, a number of steps or of pictures that is new is compiled for; prompts, scales and
        seeds are inputs.

        Args:
            prompt: one or several, or None with `prompt_embeds`.
            prompt_2: for T5, instead of `prompt`.
            image: of Kontext, what to edit: PIL, or [h, w, 3] bytes, or floats in [0, 1].
            negative_prompt: of guidance by two evaluations, with `true_cfg_scale`; '' by default.
            negative_prompt_2: for T5, instead.
            true_cfg_scale: above 1: that guidance, at twice the cost.
            height: pixels, a multiple of 16; default 1024.
            width: likewise.
            num_inference_steps: default 28, of schnell 4.
            sigmas: times of one's own, before their shift, instead of evenly spaced ones.
            guidance_scale: of which dev and Kontext are told; default 3.5. Not for schnell.
            num_images_per_prompt: pictures of each prompt, one after another.
            seed: picture i depends on it, and on i.
            generator: a key of `jax.random`, or one a picture, instead.
            latents: standard normal noise, instead of the seed's: [n, h, w, channels], or as
                diffusers packs it [n, tokens, 4 channels].
            prompt_embeds: of T5, instead of prompts, with
            pooled_prompt_embeds: of CLIP; see `encode_prompt`.
            max_sequence_length: T5's tokens; default 512, of schnell 256.
            output_type: 'pil', 'np' or 'latent'.

        Raises:
            ValueError: what cannot be done, before anything is compiled: sizes that are no
                multiples, a guidance scale for schnell, arguments that exclude each other.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={output_type!r}: expected one of {OUTPUT_TYPES}")
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt={num_images_per_prompt}: expected at least 1")
        reference = self._reference_pixels(image)
        size = self._latent_size(height, width)
        guidance = self._guidance(guidance_scale)
        times = self._times(num_inference_steps, sigmas, size)
        _check_embeds(prompt, prompt_2, prompt_embeds, pooled_prompt_embeds)
        guided = true_cfg_scale > 1
        if not guided and (negative_prompt, negative_prompt_2) != (None, None):
            raise ValueError("a negative_prompt needs a true_cfg_scale above 1")
        length = {"max_sequence_length": max_sequence_length}
        if prompt_embeds is None:
            embeds = self.encode_prompt(prompt, prompt_2, **length)
        else:
            embeds = prompt_embeds, pooled_prompt_embeds
        text, pooled = (_repeated(array, num_images_per_prompt) for array in embeds)
        count = len(text)
        conditions = {"text": text, "pooled": pooled}
        if guidance is not None:
            conditions["guidance"] = np.full(count, guidance, np.float32)
        if reference is not None:
            encoded = _encode(self.parts.vae, self.parts.vae_params, reference)
            conditions["reference"] = _repeated(encoded, count)
        nulls = None
        if guided:
            against = self.encode_prompt(negative_prompt or "", negative_prompt_2, **length)
            nulls = dict(zip(("text", "pooled"), (array[0] for array in against), strict=True))
        made = self.sampler(size)(
            self.parts.params,
            _keys(generator, seed, count),
            conditions,
            times,
            true_cfg_scale if guided else 1.0,
            nulls=nulls,
            noise=None if latents is None else self._unpacked(latents, count, size),
        )
        return FluxOutput(made if output_type == "latent" else self._pictures(made, output_type))

    def sampler(self, size: tuple[int, int]) -> Sampler:
        """From noise to latents of (height, width), the one compiled program."""
        return Sampler(Denoiser(self.parts.transformer, PROCESS), Euler(), size=size)

    def decode(self, latents: Any) -> Float[np.ndarray, "n h w 3"]:
        """The pixels of latents, in about [-1, 1]; one at a time, so that memory does not grow."""
        vae, params = self.parts.vae, self.parts.vae_params
        return np.concatenate([np.asarray(_decode(vae, params, one[None])) for one in latents])

    def _pictures(self, latents: Array, output_type: str) -> Any:
        pixels = self.decode(latents)
        if output_type == "np":
            return np.clip(pixels / 2 + 0.5, 0.0, 1.0)
        from PIL import Image

        return [Image.fromarray(image) for image in to_uint8(pixels)]

    def _latent_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        factor = self.parts.vae.downsampling_factor
        height, width = self.picture_size(height, width)
        return height // factor, width // factor

    def _text_length(self, length: int | None) -> int:
        """T5's tokens."""
        length = length or (MAX_PROMPT if self.is_guided else MAX_PROMPT // 2)
        if not 1 < length <= MAX_PROMPT:
            raise ValueError(f"max_sequence_length={length}: expected 2 to {MAX_PROMPT}")
        return length

    def _guidance(self, scale: float | None) -> float | None:
        """What the network is told of guidance."""
        if self.is_guided:
            return 3.5 if scale is None else float(scale)
        if scale:
            raise ValueError(
                f"guidance_scale={scale}: this FLUX (schnell) is not told a guidance scale; leave "
                "it out (for guidance by two evaluations, true_cfg_scale)"
            )
        return None

    def _times(
        self, steps: int | None, sigmas: Sequence[float] | None, size: tuple[int, int]
    ) -> np.ndarray:
        tokens = size[0] * size[1] // _PACKED**2
        if sigmas is None:
            default = 28 if self.is_guided else 4
            return self.parts.times(default if steps is None else steps, tokens)
        if steps not in (None, len(sigmas)):
            raise ValueError(f"num_inference_steps={steps}, but {len(sigmas)} sigmas are given")
        return self.parts.times.shifted(sigmas, tokens)

    def _reference_pixels(self, image: Any) -> np.ndarray | None:
        """[1, h, w, 3] in [-1, 1] of an image to be edited."""
        if image is None:
            return None
        pixels = np.asarray(image)
        factor = self.parts.vae.downsampling_factor * _PACKED
        shape = pixels.shape
        if pixels.ndim != 3 or shape[2] != 3 or shape[0] % factor or shape[1] % factor:
            raise ValueError(
                f"image of shape {list(shape)}: expected [height, width, 3] with sides that are "
                f"multiples of {factor}: resize it"
            )
        pixels = pixels.astype(np.float32) / (255 if pixels.dtype == np.uint8 else 1)
        return (2 * pixels - 1)[None]

    def _unpacked(self, latents: Any, count: int, size: tuple[int, int]) -> np.ndarray:
        """Noise as [n, h, w, channels], from that or from diffusers' tokens."""
        noise, (h, w) = np.asarray(latents, np.float32), size
        channels = self.parts.transformer.config.in_channels
        tokens = (count, h // _PACKED * (w // _PACKED), channels * _PACKED**2)
        if noise.shape == tokens:
            noise = noise.reshape(count, h // _PACKED, w // _PACKED, channels, _PACKED, _PACKED)
            noise = noise.transpose(0, 1, 4, 2, 5, 3).reshape(count, h, w, channels)
        if noise.shape != (count, h, w, channels):
            raise ValueError(
                f"latents of shape {list(noise.shape)}: expected {[count, h, w, channels]}, or "
                f"packed {list(tokens)}"
            )
        return noise


@functools.partial(jax.jit, static_argnums=0)
def _decode(vae: AutoencoderKL, params: Any, latents: Array) -> Array:
    return vae.decode(params, vae.from_latents(latents))


@functools.partial(jax.jit, static_argnums=0)
def _encode(vae: AutoencoderKL, params: Any, pixels: np.ndarray) -> Array:
    return vae.to_latents(vae.encode(params, pixels)[0])


def _repeated(array: Any, count: int) -> Any:
    """Every example so many times, one after another."""
    return array if count == 1 else jnp.repeat(jnp.asarray(array), count, axis=0)


def _as_list(name: str, prompts: str | Sequence[str]) -> list[str]:
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts or not all(isinstance(text, str) for text in prompts):
        raise ValueError(f"{name}: expected a string or a list of strings")
    return prompts


def _check_embeds(prompt: Any, prompt_2: Any, embeds: Any, pooled: Any) -> None:
    """Refuses anything but prompts, or both of their embeddings."""
    if (embeds is None) != (pooled is None):
        raise ValueError("prompt_embeds and pooled_prompt_embeds: expected both, or neither")
    if (prompt is None) == (embeds is None):
        raise ValueError("expected either a prompt, or prompt_embeds and pooled_prompt_embeds")
    if embeds is not None and prompt_2 is not None:
        raise ValueError("prompt_2 would do nothing beside prompt_embeds")


def _keys(generator: Any, seed: int, count: int) -> Array:
    """One key a picture."""
    if generator is None:
        return image_keys(seed, np.arange(count))
    if not (
        hasattr(generator, "dtype") and jax.dtypes.issubdtype(generator.dtype, jax.dtypes.prng_key)
    ):
        raise ValueError(
            f"generator is a {type(generator).__name__}: expected a key (jax.random.key(0)), or "
            "give seed"
        )
    if generator.ndim == 0:
        return jax.vmap(lambda i: jax.random.fold_in(generator, i))(np.arange(count))
    if generator.shape != (count,):
        raise ValueError(f"generator of {generator.shape} keys: expected one, or {count}")
    return generator

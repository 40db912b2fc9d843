"""FLUX.1 from a diffusers checkpoint: prompts in, pictures out, four compiled programs.

    from dit_jax import FluxPipeline
    pipe = FluxPipeline.from_pretrained("FLUX.1-schnell", dtype="bfloat16")
    pipe("a cat holding a sign", height=1024, width=1024, num_inference_steps=4).images[0].save(...)

The encoders are a program each; from their states to the latents is one (`dit_jax.sampling`), and
from latents to pixels another. torch is not imported. Arguments have the names they have in
diffusers' pipeline of the same name.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from dit_jax.diffusion.process import RectifiedFlow
from dit_jax.evaluation import to_uint8
from dit_jax.evaluation.files import to_pil
from dit_jax.interop.found_model import FoundModel
from dit_jax.interop.tensors import InteropError
from dit_jax.parallel.sampling import ImageParallel
from dit_jax.pipelines import flux_files, flux_inputs
from dit_jax.pipelines.adapters import Adaptable, Adapters, adapted_networks
from dit_jax.pipelines.divided import Divided
from dit_jax.pipelines.execution import Draw, Execution, Latents, Pixels
from dit_jax.programs import Programs
from dit_jax.quantities import counted

PROCESS = RectifiedFlow(network_convention="flux", time_scale=1000.0)
OUTPUT_TYPES = ("pil", "np", "latent")
MAX_PROMPT = 512  # tokens of T5; schnell was trained with half as many
_DEFAULT_LATENTS = 128  # a side: 1024 pixels


@dataclasses.dataclass(frozen=True)
class FluxOutput:
    """What a call gives.

    Attributes:
        images: PIL images; or float32 [n, height, width, channels] in [0, 1] ('np'); or latents
            [n, h, w, channels] ('latent').
    """

    images: Any


class FluxPipeline(Adaptable):
    """Text to image, and with `image` editing (FLUX.1 Kontext).

    Args:
        parts: what it is made of, see `from_pretrained`.
        execution: how it runs.
    """

    def __init__(self, parts: flux_files.FluxParts, execution: Execution = Execution()):  # noqa: B008
        self.parts, self.execution = parts, execution
        self.latents = Latents(parts.transformer, parts.params, PROCESS, execution)
        self.pixels = Pixels(parts.vae, parts.vae_params, execution)
        self.texts = {"clip": parts.clip, "t5": parts.t5}
        self.adapters = Adapters(adapted_networks(parts, execution.divided))

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        transformer: str | Path | FoundModel | None = None,
        dtype: Any = "auto",
        param_dtype: str = "auto",
        quantization: str = "none",
        layer_loop: str = "auto",
        attention: str = "auto",
        offload: bool = False,
        mesh: Mesh | None = None,
        parallel: ImageParallel | None = None,
        vae_devices: int | None = None,
        vae_tile: int | None = None,
        step_cache: float = 0.0,
        programs: Programs | str | Path | None = None,
    ) -> "FluxPipeline":
        """Reads a pipeline that diffusers, or `save_pretrained`, saved.

        Args:
            source: its folder, or 'hub:owner/name[@revision]'; 'owner/name' means that too.
            transformer: another one in its place: a training run's workdir, or what else
                `interop.models.open_model` reads; what that returned, too.
            dtype: of products: 'float32', 'bfloat16' or 'auto', bfloat16 on accelerators.
            param_dtype: what weights are stored in; 'auto' is bfloat16 where products are computed
                in it, else what the files hold.
            quantization: of the transformer's products, see docs/precision.md.
            layer_loop: of the transformer and the encoders, 'scan', 'unroll' or 'auto'.
            attention: their kernel, see `models.attention.IMPLEMENTATIONS`.
            offload: whether the encoders' weights stay in host memory, from which they are copied
                to the device for as long as prompts are encoded.
            mesh: of `dit_jax.parallel.mesh.create_mesh`, over which the weights of the transformer
                and the text encoders are divided as they are read.
            parallel: see `Execution`, as what follows.
            vae_devices: devices that decode an image.
            vae_tile: side of tiles that are decoded one by one.
            step_cache: threshold under which blocks are skipped.
            programs: a folder of compiled programs. They are code: name only one that you trust.

        Raises:
            InteropError: a component or a tokenizer's file is missing, is another model's, or does
                not go with the others; nothing is read before that is known.
            ValueError: ways of execution that exclude each other.
        """
        if programs is not None and not isinstance(programs, Programs):
            programs = Programs(programs, lambda line: None)
        divided = None if mesh is None else Divided(mesh)
        execution = Execution(parallel, vae_devices, vae_tile, step_cache, programs, divided)
        dtype = str(dtype).removeprefix("torch.")
        options = {"layer_loop": layer_loop, "attention": attention, "quantization": quantization}
        storage = {"param_dtype": param_dtype, "offload": offload, "divided": divided}
        parts = flux_files.load(source, dtype=dtype, transformer=transformer, **storage, **options)
        return cls(parts, execution)

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Writes the folder that diffusers' `FluxPipeline.from_pretrained` loads.

        Tensors have the dtype they are stored in. It appears complete or not at all.

        Raises:
            FileExistsError: `folder` exists.
            InteropError: the weights are quantised, or there are LoRA adapters beside them.
        """
        if self.adapters.weights:
            raise InteropError(
                f"the LoRA {', '.join(self.adapters.weights)} would not be saved: call "
                "unload_lora_weights() first, or merge it (docs/lora.md)"
            )
        flux_files.save(folder, self.parts, overwrite=overwrite)

    @property
    def is_guided(self) -> bool:
        """Whether the network is told a guidance scale: dev and Kontext are, schnell is not."""
        return self.parts.transformer.config.guidance_embedding

    @property
    def default_steps(self) -> int:
        """Of the solver: 28, of schnell 4."""
        return 28 if self.is_guided else 4

    @property
    def default_guidance(self) -> float | None:
        """The scale that the network is told, 3.5; None of schnell, which is told none."""
        return 3.5 if self.is_guided else None

    @property
    def title(self) -> str:
        """Which FLUX it is, as 'FLUX.1 dev'."""
        return self.parts.transformer.config.title

    @property
    def side_multiple(self) -> int:
        """What the sides of pictures are multiples of, in pixels: 16."""
        return self.parts.vae.downsampling_factor * flux_inputs.PACKED

    @property
    def channels(self) -> int:
        """Of pictures: 3, of a grey pipeline 1."""
        return self.parts.vae.config.out_channels

    def picture_size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """(height, width) in pixels, 1024 where None is given.

        Raises:
            ValueError: no multiples of 16.
        """
        default = _DEFAULT_LATENTS * self.parts.vae.downsampling_factor
        return flux_inputs.picture_size(height, width, default, self.side_multiple)

    def reference_pixels(
        self, image: Any, *, auto_resize: bool = True
    ) -> Float[np.ndarray, "1 h w 3"] | None:
        """What Kontext is shown of an image, in [-1, 1]; None of none.

        Args:
            image: as of a call, like what follows.
            auto_resize: likewise.

        Raises:
            ValueError: it is too small, or none of RGB; the pipeline makes no pictures of RGB.
        """
        if image is not None and self.channels != 3:
            raise ValueError(
                "an image can be edited by a pipeline of RGB pictures alone, and those of this one "
                f"have {counted(self.channels, 'channel')}"
            )
        return flux_inputs.reference_pixels(image, self.side_multiple, auto_resize)

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
        length = self._text_length(max_sequence_length)
        flux_inputs.check_prompts(prompt, prompt_2, None, None)
        prompts = flux_inputs.as_list("prompt", prompt)
        others = prompts if prompt_2 is None else flux_inputs.as_list("prompt_2", prompt_2)
        programs = self.execution.programs
        text = self.texts["t5"](others, length, programs)
        return text, self.texts["clip"](prompts, None, programs)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        prompt_2: str | Sequence[str] | None = None,
        *,
        image: Any = None,
        auto_resize: bool = True,
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
        first_image: int = 0,
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
            auto_resize: show it the image at that of the sizes it was trained on whose aspect ratio
                is nearest; False: at its own, less what is over multiples of 16.
            negative_prompt: of guidance by two evaluations, with `true_cfg_scale`, one for all
                pictures; '' by default.
            negative_prompt_2: for T5, instead.
            true_cfg_scale: above 1: that guidance, at twice the cost.
            height: pixels, a multiple of 16; default 1024.
            width: likewise.
            num_inference_steps: default 28, of schnell 4.
            sigmas: times of one's own, before their shift, instead of evenly spaced ones.
            guidance_scale: of which dev and Kontext are told; default 3.5. Not for schnell.
            num_images_per_prompt: pictures of each prompt, one after another.
            seed: picture i depends on it, and on i; beside `generator` or `latents` it does
                nothing.
            first_image: the number i of the first one, under a seed or one key.
            generator: a key of `jax.random`, or one a picture, instead of the seed.
            latents: standard normal noise, instead of all these: [n, h, w, channels], or as
                diffusers packs it [n, tokens, 4 channels].
            prompt_embeds: of T5 [n, l, d], instead of prompts, with
            pooled_prompt_embeds: of CLIP [n, p]; see `encode_prompt`.
            max_sequence_length: T5's tokens; default 512, of schnell 256.
            output_type: 'pil', 'np' or 'latent'.

        Raises:
            ValueError: what cannot be done, before anything is compiled: sizes that are no
                multiples, a guidance scale for schnell, arguments that exclude each other.
        """
        if image is None and not auto_resize:
            raise ValueError("auto_resize=False would do nothing without an image")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={output_type!r}: expected one of {OUTPUT_TYPES}")
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt={num_images_per_prompt}: expected at least 1")
        flux_inputs.check_negative(negative_prompt, negative_prompt_2, true_cfg_scale)
        size, times, guidance, length = self._settings(
            height, width, num_inference_steps, sigmas, guidance_scale, max_sequence_length
        )
        count = num_images_per_prompt * flux_inputs.check_prompts(
            prompt, prompt_2, prompt_embeds, pooled_prompt_embeds
        )
        flux_inputs.check_source(generator, latents, seed, first_image, count)
        noise = None
        if latents is not None:
            channels = self.parts.transformer.config.in_channels
            noise = flux_inputs.unpacked(latents, count, size, channels)
        reference = self.reference_pixels(image, auto_resize=auto_resize)

        embeds = prompt_embeds, pooled_prompt_embeds
        if prompt_embeds is None:
            embeds = self.encode_prompt(prompt, prompt_2, max_sequence_length=length)
        text, pooled = (flux_inputs.repeated(e, num_images_per_prompt) for e in embeds)
        conditions = {"text": text, "pooled": pooled}
        if guidance is not None:
            conditions["guidance"] = np.full(count, guidance, np.float32)
        if reference is not None:
            encoded = self.pixels.encode(reference)
            conditions["reference"] = flux_inputs.repeated(encoded, count)
        draw = Draw(size, times, conditions)
        if true_cfg_scale > 1:
            against = (negative_prompt or "", negative_prompt_2)
            states = self.encode_prompt(*against, max_sequence_length=length)
            nulls = {"text": states[0][0], "pooled": states[1][0]}
            draw = dataclasses.replace(draw, scale=true_cfg_scale, nulls=nulls)
        if self.execution.programs is not None and generator is None and latents is None:
            made = self.latents.by_number(draw, seed, first_image)
        else:
            keys = flux_inputs.keys_of(generator, seed, first_image, count)
            made = self.latents.by_keys(draw, keys, noise)
        return FluxOutput(made if output_type == "latent" else self._pictures(made, output_type))

    def compile(
        self,
        height: int | None = None,
        width: int | None = None,
        *,
        num_images: int = 1,
        num_inference_steps: int | None = None,
        max_sequence_length: int | None = None,
    ) -> tuple[str, ...]:
        """Compiles ahead of time what calls of these sizes need, into the folder `programs`.

        Args:
            height: as of a call, like what is not named here.
            width: likewise.
            num_images: pictures at once.
            num_inference_steps: likewise.
            max_sequence_length: likewise.

        Returns:
            How an image is split over devices, in words.

        Raises:
            ValueError: there is no folder; what cannot be done.
        """
        if self.execution.programs is None:
            raise ValueError("nowhere to keep what is compiled: from_pretrained(programs=FOLDER)")
        size, times, guidance, length = self._settings(
            height, width, num_inference_steps, None, None, max_sequence_length
        )
        config, ready = self.parts.transformer.config, self.execution.programs.ready
        for program in (self.texts["t5"].program(length), self.texts["clip"].program()):
            ready(program)
        conditions = {
            "text": jax.numpy.zeros((num_images, length, config.text_dim)),
            "pooled": jax.numpy.zeros((num_images, config.pooled_dim)),
        }
        if guidance is not None:
            conditions["guidance"] = np.full(num_images, guidance, np.float32)
        draw = Draw(size, times, conditions)
        ready(self.latents.program(draw))
        ready(self.pixels.program(self._blank(size)))
        return self.latents.notes(draw)

    def check(
        self,
        draws: int = 1,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        max_sequence_length: int | None = None,
    ) -> tuple[str, ...]:
        """Refuses what a call of so many pictures would refuse, without compiling anything.

        Args:
            draws: pictures at once.
            height: as of a call, like what follows.
            width: likewise.
            num_inference_steps: likewise.
            sigmas: likewise.
            guidance_scale: likewise.
            max_sequence_length: likewise.

        Returns:
            How an image is split over devices, in words.

        Raises:
            ValueError: as a call.
        """
        size, times, _, _ = self._settings(
            height, width, num_inference_steps, sigmas, guidance_scale, max_sequence_length
        )
        return self.latents.notes(Draw(size, times, {"pooled": np.zeros((draws, 1))}))

    def decode(self, latents: Any) -> Float[np.ndarray, "n h w c"]:
        """The pixels of latents, in about [-1, 1]; one at a time, so that memory does not grow."""
        return self.pixels.decode(latents)

    def _settings(
        self,
        height: int | None,
        width: int | None,
        steps: int | None,
        sigmas: Sequence[float] | None,
        guidance_scale: float | None,
        max_sequence_length: int | None,
    ) -> tuple[tuple[int, int], np.ndarray, float | None, int]:
        """(size of the latents, times, what the network is told of guidance, T5's tokens)."""
        factor = self.parts.vae.downsampling_factor
        height, width = self.picture_size(height, width)
        size = (height // factor, width // factor)
        return (
            size,
            self._times(steps, sigmas, size[0] * size[1] // flux_inputs.PACKED**2),
            self._guidance(guidance_scale),
            self._text_length(max_sequence_length),
        )

    def _times(self, steps: int | None, sigmas: Sequence[float] | None, tokens: int) -> np.ndarray:
        if sigmas is None:
            return self.parts.times(self.default_steps if steps is None else steps, tokens)
        if steps not in (None, len(sigmas)):
            raise ValueError(f"num_inference_steps={steps}, but {len(sigmas)} sigmas are given")
        return self.parts.times.shifted(sigmas, tokens)

    def _guidance(self, scale: float | None) -> float | None:
        if self.is_guided:
            return self.default_guidance if scale is None else float(scale)
        if scale:
            raise ValueError(
                f"guidance_scale={scale}: this FLUX (schnell) is not told a guidance scale; leave "
                "it out (for guidance by two evaluations, true_cfg_scale)"
            )
        return None

    def _text_length(self, length: int | None) -> int:
        length = length or (MAX_PROMPT if self.is_guided else MAX_PROMPT // 2)
        if not 1 < length <= MAX_PROMPT:
            raise ValueError(f"max_sequence_length={length}: expected 2 to {MAX_PROMPT}")
        return length

    def _blank(self, size: tuple[int, int]) -> Any:
        blank = np.zeros((1, *size, self.parts.transformer.config.in_channels), np.float32)
        return self.pixels.placed(blank)

    def _pictures(self, latents: Array, output_type: str) -> Any:
        pixels = self.decode(latents)
        if output_type == "np":
            return np.clip(pixels / 2 + 0.5, 0.0, 1.0)
        return [to_pil(image) for image in to_uint8(pixels)]

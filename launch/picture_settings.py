"""What a picture of launch/serve.py is made of: settings that come from outside, checked."""

import dataclasses
import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import PngImagePlugin

import dit_jax
from dit_jax import ranges
from dit_jax.evaluation.files import to_pil
from dit_jax.nearest import did_you_mean
from dit_jax.pipelines.flux import FluxPipeline
from dit_jax.pipelines.flux_inputs import is_text
from dit_jax.ranges import Range

MAX_PROMPT = 10_000  # characters; encoders take 512 tokens at most
MAX_STEPS = 200
MAX_IMAGES = 16
METADATA = "dit_jax"  # key of the settings in a PNG file


class SettingError(ValueError):
    """A value that cannot be used.

    Attributes:
        setting: which; '' for none in particular.
    """

    def __init__(self, setting: str, message: str):
        super().__init__(message)
        self.setting = setting


@dataclasses.dataclass(frozen=True)
class Settings:
    """Pictures of one prompt.

    Attributes:
        prompt: what they show.
        height: in pixels.
        width: in pixels.
        steps: of the solver.
        guidance_scale: of which the network is told; None for its own, or where it is told none.
        seed: picture i depends on it and on i.
        num_images: how many.
        lora: weights of the pipeline's LoRA by name; 0 for not used.
    """

    prompt: str
    height: int
    width: int
    steps: int
    guidance_scale: float | None
    seed: int
    num_images: int
    lora: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def size(self) -> str:
        """'768 wide, 512 high'."""
        return f"{self.width} wide, {self.height} high"

    @property
    def program(self) -> tuple[int, int, int]:
        """What is compiled for: other settings do not need a program of their own."""
        return self.height, self.width, self.steps

    @property
    def call(self) -> dict[str, Any]:
        """Arguments of the pipeline's call, of its `check` too."""
        return {
            "height": self.height,
            "width": self.width,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance_scale,
        }


@dataclasses.dataclass(frozen=True)
class Reader:
    """Reads settings, and refuses those that the pipeline or this server cannot do.

    Attributes:
        pipeline: that makes the pictures.
        defaults: where nothing is said.
        max_pixels: of a picture.
    """

    pipeline: FluxPipeline
    defaults: Settings
    max_pixels: int

    def __call__(self, given: Mapping[str, Any]) -> Settings:
        """Settings of what a request gives; what it leaves out is as in `defaults`.

        Raises:
            SettingError: an unknown name, or a value of another type or out of its range.
        """
        names = [field.name for field in dataclasses.fields(Settings)]
        for name in given:
            if name not in names:
                hint = did_you_mean(name, names) or f": expected {', '.join(names)}"
                raise SettingError("", f"unknown setting {name!r}{hint}")
        if "prompt" not in given:
            raise SettingError("prompt", "prompt: expected text, none is given")
        if isinstance(given.get("lora"), Mapping):
            given = {**given, "lora": {**self.defaults.lora, **given["lora"]}}
        settings = dataclasses.replace(self.defaults, **given)
        self.check(settings)
        return settings

    def check(self, settings: Settings) -> None:
        """Refuses what cannot be made.

        Raises:
            SettingError: as a call.
        """
        prompt = settings.prompt
        if not isinstance(prompt, str):
            raise SettingError("prompt", f"prompt: expected text, not {_named(prompt)}")
        if not is_text(prompt):
            raise SettingError(
                "prompt", "prompt: expected text that UTF-8 can write, without lone surrogates"
            )
        if len(prompt) > MAX_PROMPT:
            raise SettingError(
                "prompt", f"prompt: {len(prompt):,} characters, expected at most {MAX_PROMPT:,}"
            )
        _require("height", settings.height, ranges.COUNT)
        _require("width", settings.width, ranges.COUNT)
        _require("steps", settings.steps, Range(1, MAX_STEPS, whole=True))
        _require("seed", settings.seed, ranges.SEED)
        _require("num_images", settings.num_images, Range(1, MAX_IMAGES, whole=True))
        self._check_guidance(settings.guidance_scale)
        self._check_lora(settings.lora)
        self._check_size(settings.height, settings.width)

    def _check_guidance(self, scale: Any) -> None:
        if scale is None:
            return
        if not self.pipeline.is_guided:
            raise SettingError(
                "guidance_scale",
                f"guidance_scale={scale}: {self.pipeline.title} is not told a guidance scale; "
                "leave it out",
            )
        _require("guidance_scale", scale, ranges.GUIDANCE)

    def _check_lora(self, weights: Any) -> None:
        known = self.defaults.lora
        if not isinstance(weights, Mapping):
            raise SettingError("lora", f"lora: {_named(weights)} given, expected weights by name")
        for name, weight in weights.items():
            if name not in known:
                hint = did_you_mean(name, known) or f": there are {', '.join(known) or 'none'}"
                raise SettingError(
                    "lora",
                    f"lora: {name!r} was not loaded (launch/serve.py --lora=FILE){hint}",
                )
            _require("lora", weight, ranges.FINITE)

    def _check_size(self, height: int, width: int) -> None:
        multiple = self.pipeline.side_multiple
        try:
            self.pipeline.picture_size(height, width)
        except ValueError as error:
            wrong = "height" if height % multiple or height < multiple else "width"
            raise SettingError(wrong, str(error)) from error
        if height * width > self.max_pixels:
            raise SettingError(
                "height" if height > width else "width",
                f"{width} wide and {height} high are {height * width:,} pixels: expected at most "
                f"{self.max_pixels:,} (launch/serve.py --max_pixels)",
            )


def png(pixels: np.ndarray, settings: Settings, number: int, title: str) -> bytes:
    """A PNG file of bytes [h, w, channels] that says how picture `number` of some was made."""
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Software", f"dit-jax {dit_jax.__version__}")
    texts.add_itxt("Description", settings.prompt)
    record = dataclasses.asdict(settings) | {"image": number, "pipeline": title}
    texts.add_itxt(METADATA, json.dumps(record, ensure_ascii=False))
    file = io.BytesIO()
    to_pil(pixels).save(file, "PNG", pnginfo=texts)
    return file.getvalue()


def _require(name: str, value: Any, wanted: Range) -> None:
    if value not in wanted:
        raise SettingError(name, f"{name}: {_named(value)} given, expected {wanted}")


def _named(value: Any) -> str:
    if value == "":
        return "nothing is"
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 40 else f"{text[:40]}..."

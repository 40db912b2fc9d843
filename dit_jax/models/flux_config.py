"""The shape and execution of a FLUX transformer, and the published ones by name."""

import dataclasses
from typing import Any

from dit_jax import conditions as conditions_lib
from dit_jax.models import attention as attention_lib
from dit_jax.models import cpu_kernels, stack
from dit_jax.models.transformer_config import TransformerConfig
from dit_jax.options import option
from dit_jax.ranges import COUNT, POSITIVE

ROTARY_AXES = 3  # which image (the noisy one, a reference), row, column
ROTARY_THETA = 10_000.0


@dataclasses.dataclass(frozen=True)
class FluxConfig(TransformerConfig):
    """Shape and execution of a FLUX transformer, by default FLUX.1 schnell's.

    Latents of any height and width go that are multiples of 2. `layer_loop`: see
    `stack.resolve_layer_loop`; it is that of both stacks.
    """

    image_size: int | tuple[int, int] = 128
    in_channels: int = 16
    num_classes: int = 0
    hidden_size: int = option(3072, "width of the blocks", COUNT)
    depth: int = option(19, "blocks with a stream for the text and one for the image", COUNT)
    single_depth: int = option(38, "blocks with one stream for both, after these", COUNT)
    num_heads: int = option(24, "of attention", COUNT)
    mlp_ratio: float = option(4.0, "width of a block's MLP over hidden_size", POSITIVE)
    text_dim: int = option(4096, "width of a token of the text: 4096 for T5 XXL", COUNT)
    pooled_dim: int = option(768, "width of the vector of the whole text: 768 for CLIP L", COUNT)
    guidance_embedding: bool = option(
        False, "whether the network is told a guidance scale, as FLUX.1 dev is"
    )
    rotary_channels: tuple[int, ...] = option(
        (), "of a head by image, row and column; empty: an eighth, and the rest by halves", COUNT
    )
    text_length: int = option(512, "tokens of text in plans and counts of operations", COUNT)
    layer_loop: str = option("auto", "scan | unroll | auto: by backend")

    patch_size, learn_sigma = 2, False  # no options, and the same in all
    stacks = ("double_blocks", "single_blocks")

    def __post_init__(self):
        for name in ("hidden_size", "depth", "single_depth", "num_heads", "text_dim", "pooled_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.flux.{name}={getattr(self, name)}: expected at least 1")
        if self.in_channels < 1:
            raise ValueError(f"model.in_channels={self.in_channels}: expected at least 1")
        if any(side < 1 or side % self.patch_size for side in self.input_size):
            key = "image_size" if isinstance(self.image_size, int) else "input_size"
            raise ValueError(
                f"model.{key}={self.image_size}: FLUX takes latents whose height and width are "
                f"multiples of {self.patch_size} (images of multiples of 16 pixels)"
            )
        self._refuse_other_conditions()
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"model.flux.hidden_size={self.hidden_size} must be a multiple of "
                f"model.flux.num_heads={self.num_heads}"
            )
        self._check_rotary_channels()
        stack.resolve_layer_loop(self.layer_loop)
        stack.rematerialised(lambda: None, self.remat)
        cpu_kernels.resolve_custom_gradients(self.custom_gradients)
        dtype = self.precision.dtype("hidden")
        attention_lib.resolve_implementation(self.attention, dtype, self.head_dim)

    def _refuse_other_conditions(self) -> None:
        """FLUX is told a text, and has no parameters for anything else."""
        for key, idle in (("num_classes", 0), ("second_time", "none"), ("augment_dim", 0)):
            if getattr(self, key) != idle:
                raise ValueError(
                    f"model.{key}={getattr(self, key)!r}: FLUX is told a text and one time, and "
                    f"nothing else; set model.{key}={idle!r}"
                )

    def _check_rotary_channels(self) -> None:
        channels, head_dim = self.rotary_channels, self.head_dim
        if not channels and (head_dim % 4 or head_dim < 8):
            raise ValueError(
                f"model.flux.hidden_size={self.hidden_size} over model.flux.num_heads="
                f"{self.num_heads}: {head_dim} channels a head are not shared out among image, row "
                "and column by themselves; expected a multiple of 4 from 8 on, or say how by "
                "model.flux.rotary_channels"
            )
        fits = len(channels) == ROTARY_AXES and sum(channels) == head_dim
        if channels and not (fits and all(count > 0 and count % 2 == 0 for count in channels)):
            raise ValueError(
                f"model.flux.rotary_channels={tuple(channels)}: expected {ROTARY_AXES} even "
                f"numbers whose sum is the {head_dim} channels of a head"
            )

    @property
    def title(self) -> str:
        """'FLUX.1 dev', 'FLUX.1 schnell', or the shape."""
        if self.shape == PUBLISHED:
            return f"FLUX.1 {'dev' if self.guidance_embedding else 'schnell'}"
        return (
            f"FLUX of {self.depth} and {self.single_depth} blocks, width {self.hidden_size}, "
            f"{self.num_heads} heads"
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """(width, blocks of two streams, of one stream, heads)."""
        return self.hidden_size, self.depth, self.single_depth, self.num_heads

    @property
    def mlp_hidden(self) -> int:
        """Width of a block's MLP."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def axes_channels(self) -> tuple[int, ...]:
        """Channels of a head turned by image, row and column: (16, 56, 56) of FLUX.1's 128."""
        if self.rotary_channels:
            return tuple(self.rotary_channels)
        first = max(4, 4 * round(self.head_dim / 32))
        rest = (self.head_dim - first) // 2
        return first, rest, rest

    @property
    def out_channels(self) -> int:
        """Channels of the output: the input's."""
        return self.in_channels

    @property
    def conditions(self) -> dict[str, conditions_lib.Condition]:
        """What it is told.

        `text`: the states of the T5 encoder, padding included, as FLUX attends to it. `pooled`:
        CLIP's vector of the whole prompt. `guidance`: the scale that the network imitates.
        `reference`: latents of an image to be edited (FLUX.1 Kontext), of any even height and
        width.
        """
        guidance = {"guidance": conditions_lib.Condition()} if self.guidance_embedding else {}
        reference = conditions_lib.Condition((None, None, self.in_channels), required=False)
        usual = {"null_is_given": True, "usual": (self.text_length, self.text_dim)}
        return {
            "text": conditions_lib.Condition((None, self.text_dim), **usual),
            "pooled": conditions_lib.Condition((self.pooled_dim,), null_is_given=True),
            **guidance,
            "reference": reference,
        }

    @property
    def feature_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """(rows, columns, width) of the image's tokens after each block of both stacks."""
        return ((*self.grid, self.hidden_size),) * (self.depth + self.single_depth)

    @property
    def stack_depths(self) -> tuple[int, ...]:
        """Blocks of each of the two stacks."""
        return self.depth, self.single_depth

    def stack_shape(self, size: tuple[int, int]) -> tuple[int, int]:
        """(tokens, width) of the image's activations for latents of (height, width)."""
        rows, columns = (side // self.patch_size for side in size)
        return rows * columns, self.hidden_size

    @property
    def flops_per_example(self) -> float:
        """Floating-point operations of one forward pass of one example, a multiply-add being two.

        2 x (tokens x weights that each sees + weights of the conditioning path) + attention's
        4 x tokens^2 x width a block; tokens are the image's and `text_length` of text.
        """
        dim, (rows, columns) = self.hidden_size, self.grid
        image, text = rows * columns, self.text_length
        blocks, tokens = self.depth + self.single_depth, image + text
        weights = tokens * blocks * (4 * dim * dim + 2 * dim * self.mlp_hidden)
        weights += image * 2 * self.patch_size**2 * self.in_channels * dim
        weights += text * self.text_dim * dim
        embedded = (256, self.pooled_dim, *([256] if self.guidance_embedding else []))
        weights += sum(size * dim + dim * dim for size in embedded)
        weights += (12 * self.depth + 3 * self.single_depth + 2) * dim * dim
        return 2 * weights + 4 * blocks * tokens**2 * dim

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> "FluxConfig":
        """One of `PRESETS`, for instance 'flux_dev'.

        Raises:
            ValueError: there is no such one.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown model {name!r}: expected one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})


PUBLISHED = (3072, 19, 38, 24)
PRESETS: dict[str, dict[str, Any]] = {
    "flux_dev": {"guidance_embedding": True},
    "flux_schnell": {"text_length": 256},
    # For tests and CPUs: everything is there, and small.
    "flux_tiny": {
        "image_size": 8,
        "in_channels": 4,
        "hidden_size": 32,
        "depth": 2,
        "single_depth": 2,
        "num_heads": 2,
        "text_dim": 16,
        "pooled_dim": 12,
        "text_length": 8,
    },
}

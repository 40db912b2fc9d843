"""Configurations of EDM's U-Nets."""

import dataclasses
import math
from typing import ClassVar

from dit_jax import conditions as conditions_lib
from dit_jax.models import attention as attention_lib
from dit_jax.models import cpu_kernels, edm_plan, layers, stack
from dit_jax.models.edm_layers import BlockStyle
from dit_jax.models.linear import Initialization, Precision, precision_of
from dit_jax.models.network_options import NetworkOptions
from dit_jax.nearest import one_of
from dit_jax.options import option, same_option
from dit_jax.ranges import COUNT, PERIOD, SHARE_BELOW_ONE, Range


@dataclasses.dataclass(frozen=True)
class UNetConfig(NetworkOptions):
    """What both networks have in common. Its input is a square.

    `learn_sigma`: whether a second half of output channels is there, iDDPM's variance; it follows
    from the process and is no key.
    """

    image_size: int = 32
    in_channels: int = 3
    num_classes: int = 0
    learn_sigma: bool = False
    model_channels: int = option(128, "width, before the multipliers", COUNT)
    channel_mult: tuple[int, ...] = option(
        (2, 2, 2), "multiplier of each resolution, from the input's down by halves", COUNT
    )
    channel_mult_emb: int = option(4, "multiplier of the embedding", COUNT)
    num_blocks: int = option(4, "residual blocks a resolution", COUNT)
    attn_resolutions: tuple[int, ...] = option(
        (16,), "sides at which blocks have attention", PERIOD
    )
    dropout: float = option(0.10, "rate inside the blocks, in training", SHARE_BELOW_ONE)
    size: tuple[int, int] | None = None

    layers_are_named_by_size: ClassVar[bool] = True

    def __post_init__(self):
        for name in ("image_size", "in_channels", "model_channels", "num_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)}: expected at least 1")
        for name in ("num_classes", "augment_dim"):
            if getattr(self, name) < 0:
                raise ValueError(f"model.{name}={getattr(self, name)}: expected 0 or more")
        if not self.channel_mult or min(self.channel_mult) < 1 or self.channel_mult_emb < 1:
            raise ValueError(
                f"channel_mult={self.channel_mult}, channel_mult_emb={self.channel_mult_emb}: "
                "expected at least one resolution and multipliers of at least 1"
            )
        coarsest = self.side_multiple
        for name, sides in (("image_size", (self.image_size,)), ("input_size", self.size or ())):
            if any(side < 1 or side % coarsest for side in sides):
                given = sides if name == "input_size" else sides[0]
                raise ValueError(
                    f"model.{name}={given}: channel_mult={self.channel_mult} halves it "
                    f"{len(self.channel_mult) - 1} times; choose a multiple of {coarsest}"
                )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: expected 0 to below 1")
        if self.second_time not in layers.SECOND_TIMES:
            expected = one_of(self.second_time, layers.SECOND_TIMES)
            raise ValueError(f"model.second_time={self.second_time!r}: {expected}")
        for layer in (*self.encoder, *self.decoder):
            edm_plan.require_group_width(layer)
            edm_plan.require_heads(layer, self.style)
        if self.quantization != "none":
            raise ValueError(
                f"model.quantization={self.quantization!r}: a U-Net works in convolutions, "
                "which are not quantised; expected 'none'"
            )
        stack.rematerialised(lambda: None, self.remat)
        cpu_kernels.resolve_custom_gradients(self.custom_gradients)
        dtype = self.precision.dtype("hidden")
        for layer in edm_plan.attention_layers(self):
            head_dim = layer.out_channels // self.style.num_heads(layer.out_channels)
            attention_lib.resolve_implementation(self.attention, dtype, head_dim)

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) of the input."""
        return self.size or (self.image_size, self.image_size)

    @property
    def side_multiple(self) -> int:
        """What both sides of an input are multiples of: its coarsest maps are of whole pixels."""
        return 2 ** (len(self.channel_mult) - 1)

    def at_size(self, size: tuple[int, int]) -> "UNetConfig":
        """The same network for inputs of another (height, width); its layers keep their names.

        Raises:
            ValueError: it cannot halve both as often as it does.
        """
        return dataclasses.replace(self, size=tuple(size))

    def map_size(self, side: int) -> tuple[int, int]:
        """(height, width) of the maps of a layer whose `side` is told for a square `image_size`."""
        height, width = self.input_size
        return (height * side // self.image_size, width * side // self.image_size)

    @property
    def precision(self) -> Precision:
        """What is computed and stored in what."""
        return precision_of(self.dtype, self.param_dtype)

    @property
    def conditions(self) -> dict[str, conditions_lib.Condition]:
        """What it takes: a label, a second time and augmentation, as configured."""
        return {
            **conditions_lib.class_label(self.num_classes),
            **(conditions_lib.second_time() if self.second_time != "none" else {}),
            **conditions_lib.augmentation(self.augment_dim),
        }

    @property
    def out_channels(self) -> int:
        """Channels of the output: twice the input's when the variance is learned."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def emb_channels(self) -> int:
        """Width of the embedding."""
        return self.model_channels * self.channel_mult_emb

    @property
    def noise_channels(self) -> int:
        """Width of the features of time."""
        return self.model_channels

    @property
    def encoder(self) -> tuple[edm_plan.Layer, ...]:
        """Its layers, from the input on."""
        return edm_plan.encoder(self)

    @property
    def decoder(self) -> tuple[edm_plan.Layer, ...]:
        """Its layers, to the output."""
        return edm_plan.decoder(self)

    @property
    def feature_kind(self) -> str:
        """'maps': the feature maps are those of convolutions."""
        return "maps"

    @property
    def feature_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """(height, width, channels) of the encoder's output at each resolution."""
        return tuple(
            (*self.map_size(layer.side), layer.out_channels)
            for layer in self.encoder
            if layer.is_feature
        )

    @property
    def flops_per_example(self) -> float:
        """Operations of one forward pass, see `edm_plan.flops_per_example`."""
        return edm_plan.flops_per_example(self)


@dataclasses.dataclass(frozen=True)
class SongUNetConfig(UNetConfig):
    """Shape and execution of a DDPM++ (the defaults, EDM's for CIFAR-10) or an NCSN++.

    `image_size`: its side, after which layers are named and `attn_resolutions` chosen. `size`:
    (height, width) of the input where it is not that square. Attention has one head.
    """

    embedding_type: str = option("positional", "features of time: positional | fourier (NCSN++)")
    channel_mult_noise: int = option(1, "multiplier of the features of time; 2 for NCSN++", COUNT)
    encoder_type: str = option("standard", "standard | skip | residual (NCSN++)")
    decoder_type: str = option("standard", "standard | skip")
    resample_filter: tuple[float, ...] = option(
        (1, 1), "of down- and upsampling; (1, 3, 3, 1) for NCSN++", Range(whole=True)
    )

    def __post_init__(self):
        for name, choices in (
            ("embedding_type", ("positional", "fourier")),
            ("encoder_type", ("standard", "residual", "skip")),
            ("decoder_type", ("standard", "skip")),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"model.song_unet.{name}={value!r}: {one_of(value, choices)}")
        if self.channel_mult_noise < 1:
            raise ValueError(
                f"model.song_unet.channel_mult_noise={self.channel_mult_noise}: expected at least 1"
            )
        taps = self.resample_filter
        if not taps or len(taps) % 2 or sum(taps) == 0:
            raise ValueError(
                f"model.song_unet.resample_filter={taps}: expected an even number of taps of sum "
                "not 0, such as (1, 1) or (1, 3, 3, 1)"
            )
        _require_even("model.song_unet.model_channels", self.noise_channels, 4)
        super().__post_init__()

    @property
    def title(self) -> str:
        """What EDM calls it, and its width."""
        kind = "NCSN++" if self.embedding_type == "fourier" else "DDPM++"
        return f"{kind} of {self.model_channels} channels, {self.image_size} pixels"

    @property
    def noise_channels(self) -> int:
        """Width of the features of time."""
        return self.model_channels * self.channel_mult_noise

    @property
    def style(self) -> BlockStyle:
        """Of its residual blocks."""
        return BlockStyle(
            channels_per_head=0,
            dropout=self.dropout,
            skip_scale=math.sqrt(0.5),
            epsilon=1e-6,
            resample_filter=self.resample_filter,
            resample_proj=True,
            adaptive_scale=False,
            init=Initialization(),
            init_zero=Initialization(scale=1e-10),
            init_attn=Initialization(scale=0.2),
        )


@dataclasses.dataclass(frozen=True)
class DhariwalUNetConfig(UNetConfig):
    """Shape and execution of an ADM (the defaults are EDM's for ImageNet at 64 pixels).

    Attention has heads of 64 channels.
    """

    image_size: int = 64
    num_classes: int = 1000
    model_channels: int = same_option(UNetConfig, "model_channels", 192)
    channel_mult: tuple[int, ...] = same_option(UNetConfig, "channel_mult", (1, 2, 3, 4))
    num_blocks: int = same_option(UNetConfig, "num_blocks", 3)
    attn_resolutions: tuple[int, ...] = same_option(UNetConfig, "attn_resolutions", (32, 16, 8))

    def __post_init__(self):
        _require_even("model.dhariwal_unet.model_channels", self.model_channels, 2)
        super().__post_init__()

    @property
    def title(self) -> str:
        """What it is called, and its width."""
        return f"ADM of {self.model_channels} channels, {self.image_size} pixels"

    @property
    def style(self) -> BlockStyle:
        """Of its residual blocks."""
        kaiming = Initialization(mode="fan_in", scale=1 / 3, random_bias=True)
        zeros = Initialization(scale=0.0)
        return BlockStyle(dropout=self.dropout, init=kaiming, init_zero=zeros, init_attn=kaiming)


def _require_even(name: str, channels: int, least: int) -> None:
    if channels % 2 or channels < least:
        raise ValueError(
            f"{name}: features of time of width {channels} are not pairs of cosine and sine; "
            f"expected an even number of at least {least}"
        )

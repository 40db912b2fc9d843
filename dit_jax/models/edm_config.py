"""Configurations of EDM's U-Nets."""

import dataclasses
import math
from typing import ClassVar

from dit_jax import conditions as conditions_lib
from dit_jax.models import attention as attention_lib
from dit_jax.models import cpu_kernels, edm_plan, layers, stack
from dit_jax.models.edm_layers import BlockStyle
from dit_jax.models.linear import Initialization, Precision, precision_of


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """What both networks have in common; see `SongUNetConfig` for the meaning."""

    image_size: int = 32
    in_channels: int = 3
    num_classes: int = 0
    learn_sigma: bool = False
    model_channels: int = 128
    channel_mult: tuple[int, ...] = (2, 2, 2)
    channel_mult_emb: int = 4
    num_blocks: int = 4
    attn_resolutions: tuple[int, ...] = (16,)
    dropout: float = 0.10
    augment_dim: int = 0
    second_time: str = "none"
    remat: str = "none"
    attention: str = "auto"
    custom_gradients: str = "auto"
    dtype: str = "auto"
    param_dtype: str = "auto"
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
            raise ValueError(
                f"model.second_time={self.second_time!r}: expected one of {layers.SECOND_TIMES}"
            )
        for layer in (*self.encoder, *self.decoder):
            edm_plan.require_group_width(layer)
            edm_plan.require_heads(layer, self.style)
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

    Attributes:
        image_size: side of the input, after which layers are named and `attn_resolutions` chosen.
        in_channels: channels of the input.
        num_classes: classes, without the null class; 0 for an unconditional network.
        learn_sigma: whether a second half of output channels is there (iDDPM's variance).
        model_channels: width, before the multipliers.
        channel_mult: multiplier of each resolution, from the input's down by halves.
        channel_mult_emb: multiplier of the embedding.
        num_blocks: residual blocks a resolution.
        attn_resolutions: sides at which blocks have attention, of one head.
        dropout: rate inside the blocks, in training.
        augment_dim: number of augmentation labels; 0 for none.
        second_time: 'r' or 't-r' for a network that sees a second time (MeanFlow), else 'none'.
        remat: 'none', 'block', or 'dots', which also saves the results of convolutions.
        attention: kernel of the local attention, see `attention.resolve_implementation`.
        custom_gradients: of attention, see `DiTConfig`.
        dtype: of convolutions and matrix products, see `DiTConfig`.
        param_dtype: what parameters are stored in, see `DiTConfig`.
        size: (height, width) of the input where it is not the square of `image_size`.
        embedding_type: features of time: 'positional' (DDPM++) or 'fourier' (NCSN++).
        channel_mult_noise: multiplier of those features: 1 (DDPM++) or 2 (NCSN++).
        encoder_type: 'standard' (DDPM++), 'residual' (NCSN++) or 'skip'.
        decoder_type: 'standard' (both) or 'skip'.
        resample_filter: (1, 1) (DDPM++) or (1, 3, 3, 1) (NCSN++).
    """

    embedding_type: str = "positional"
    channel_mult_noise: int = 1
    encoder_type: str = "standard"
    decoder_type: str = "standard"
    resample_filter: tuple[float, ...] = (1, 1)

    def __post_init__(self):
        for name, choices in (
            ("embedding_type", ("positional", "fourier")),
            ("encoder_type", ("standard", "residual", "skip")),
            ("decoder_type", ("standard", "skip")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"model.song_unet.{name}={getattr(self, name)!r}: expected one of {choices}"
                )
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

    Attributes: those of `SongUNetConfig` without the last five; attention has heads of 64 channels.
    """

    image_size: int = 64
    num_classes: int = 1000
    model_channels: int = 192
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    num_blocks: int = 3
    attn_resolutions: tuple[int, ...] = (32, 16, 8)

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

"""What every network is configured by, whatever its architecture."""

import dataclasses

from dit_jax.options import option, register_section
from dit_jax.ranges import COUNT, PERIOD


@dataclasses.dataclass(frozen=True)
class NetworkOptions:
    """Input, conditions and execution of a network: the keys config.model has for all of them.

    Of `second_time` see MeanFlow; of `remat` `stack.rematerialised`, where 'dots' also saves the
    results of matrix products and convolutions; of `attention`
    `attention.resolve_implementation`; of `custom_gradients` `cpu_kernels`, whose backward passes
    are written by hand and have no forward mode. dtypes are 'float32', 'bfloat16', 'float16' or
    'auto'; what stays float32 in either says `linear.Precision`. Of `quantization` see
    `models.quantization`.
    """

    image_size: int | tuple[int, int] = option(
        32, "input side: latents are 32 for 256 pixels, 64 for 512", COUNT
    )
    in_channels: int = option(
        4, "of images or latents: 1 grey, 3 RGB, 4 latents of SD's VAE", COUNT
    )
    num_classes: int = option(1000, "0: unconditional", PERIOD)
    second_time: str = option("none", "none | r | t-r: what else of time the network sees")
    augment_dim: int = option(0, "labels of config.augmentation that the network sees", PERIOD)
    remat: str = option("auto", "none | activations | dots | block | auto: what fits")
    attention: str = option("auto", "einsum | xla | cudnn | cpu | auto: by backend")
    custom_gradients: str = option("auto", "on | off (where jax.jvp is needed) | auto: on on CPUs")
    dtype: str = option("auto", "of matrix products; auto: bfloat16 on accelerators")
    param_dtype: str = option(
        "auto",
        "float32 | bfloat16 | auto: what parameters are stored in; auto: as the sampled "
        "checkpoint's file. Training: float32 (or auto) only",
    )
    quantization: str = option(
        "none",
        "none | fp8 (8-bit floats of one scale an array) | fp8_rowwise (one a row) | te (fp8 by "
        "Transformer Engine) | int8 (weights alone, not for training): of the products in a "
        "transformer's blocks",
    )


@dataclasses.dataclass(frozen=True)
class ModelOptions(NetworkOptions):
    """Keys of config.model, whatever the network."""

    input_size: tuple[int, ...] = option(
        (),
        "(height, width) if not a square of image_size, whose layers' names a U-Net keeps",
        COUNT,
        size=True,
    )


register_section("model", ModelOptions, "name", "dit")

"""An AutoencoderKL that changes nothing, for models that diffuse pixels.

diffusers' DiTPipeline always decodes. For a model of pixels the pipeline gets an autoencoder of
the usual class whose weights make it the identity, up to rounding: +x and -x side by side, so that
the last SiLU gives silu(x) - silu(-x) = x exactly, beside two large constants +K and -K, which fix
the variance that the last normalisation divides by to nearly K^2 whatever x is.
"""

from typing import Any

import numpy as np

from dit_jax.interop.parameters import abstract_params, flatten, unflatten
from dit_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig

# Larger: x^2 / K^2 of the variance matters less; smaller: rounding beside K does.
_CONSTANT = 256.0
# Largest deviation from the identity for pixels in [-1, 1] (tests/interop/test_pipelines.py).
TOLERANCE = 1e-4


def pixel_autoencoder(channels: int) -> tuple[AutoencoderKL, dict[str, Any]]:
    """The identity on images of `channels` channels in [-1, 1], within `TOLERANCE`.

    Returns:
        The autoencoder (one level: latents are as large as images) and its parameters. Encoding
        gives the image as mean and a negligible variance.
    """
    width = 2 * channels + 2
    autoencoder = AutoencoderKL(
        AutoencoderKLConfig(
            scaling_factor=1.0,
            in_channels=channels,
            out_channels=channels,
            latent_channels=channels,
            block_out_channels=(width,),
            layers_per_block=1,
            norm_num_groups=1,
            use_quant_conv=False,
            use_post_quant_conv=False,
            mid_block_add_attention=False,
            dtype="float32",
        )
    )
    shapes = dict(flatten(abstract_params(autoencoder)))
    params = {path: np.zeros(leaf.shape, np.float32) for path, leaf in shapes.items()}
    spread = _CONSTANT * np.sqrt(2 / width)  # square root of the variance over all channels
    for half in ("encoder", "decoder"):
        spread_out = np.zeros((3, 3, channels, width), np.float32)
        for channel in range(channels):
            spread_out[1, 1, channel, 2 * channel : 2 * channel + 2] = 1, -1
        params[f"{half}.conv_in.kernel"] = spread_out
        params[f"{half}.conv_in.bias"][-2:] = _CONSTANT, -_CONSTANT
        params[f"{half}.conv_norm_out.scale"][:-2] = spread
        gathered = params[f"{half}.conv_out.kernel"]
        for channel in range(channels):
            gathered[1, 1, 2 * channel : 2 * channel + 2, channel] = 1, -1
    params["encoder.conv_out.bias"][channels:] = -30.0  # the logarithm of the variance
    # Residual blocks have zero weights and so add nothing; scales of 1 keep them finite.
    for path in params:
        if path.endswith(".scale") and "conv_norm_out" not in path:
            params[path] = np.ones_like(params[path])
    return autoencoder, unflatten((path, params[path]) for path in params)

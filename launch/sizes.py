"""Heights and widths that commands are given, in pixels of the finished image, as a model's inputs.

A model of latents takes inputs smaller than its images by the factor of its autoencoder.
"""

import warnings
from pathlib import Path
from typing import Any

import ml_collections

from dit_jax import config as config_lib
from dit_jax import experiment
from dit_jax.interop.autoencoder_kl import read_autoencoder_config

# Pixels a latent's side by the latent's channels, of Stable Diffusion's VAEs and of FLUX's and
# SD3's: for commands that need no VAE but for this number.
_USUAL_FACTORS = {4: 8, 16: 8}


def at_size(
    config: ml_collections.ConfigDict, height: int | None, width: int | None
) -> ml_collections.ConfigDict:
    """An experiment's configuration for images of another size; see `size_overrides`."""
    if height is None and width is None:
        return config
    config = config_lib.resolve(config)
    vae = Path(config.autoencoder.path) if config.autoencoder.path else None
    with config.unlocked():
        for path, value in size_overrides(config, height, width, vae).items():
            section, _, key = path.partition(".")
            config[section][key] = value
    return config


def pixels_per_side(config: ml_collections.ConfigDict, vae: Path | None) -> tuple[int, str]:
    """Pixels of the image to one of the model's inputs, along a side, and what was assumed.

    Args:
        config: of the model.
        vae: which decodes its latents; None for none, or not known.

    Raises:
        ValueError: latents of which nobody says how large their images are.
    """
    channels = config.model.in_channels
    if vae is not None:
        with warnings.catch_warnings():  # whoever decodes with it reads it again, and warns
            warnings.simplefilter("ignore")
            return read_autoencoder_config(vae).downsampling_factor, ""
    if channels in (1, 3):
        return 1, ""
    if channels not in _USUAL_FACTORS:
        raise ValueError(
            f"the model makes latents of {channels} channels, and no VAE says how many pixels they "
            "are: set config.autoencoder.path, or give the size in latents, as config.model."
            "input_size"
        )
    factor = _USUAL_FACTORS[channels]
    return factor, f"no VAE was named: taking {factor} x {factor} pixels for a latent"


def size_overrides(
    config: ml_collections.ConfigDict,
    height: int | None,
    width: int | None,
    vae: Path | None = None,
) -> dict[str, Any]:
    """The configuration value that --height and --width stand for; {} where neither is given.

    Args:
        config: of the model, complete.
        height: of the image, in pixels; None for the configured one.
        width: of the image, in pixels; None for the configured one.
        vae: see `pixels_per_side`.

    Raises:
        ValueError: the model takes no such size, with the nearest that it takes.
    """
    if height is None and width is None:
        return {}
    network = experiment.build_network(config)
    factor, note = pixels_per_side(config, vae)
    multiple = network.side_multiple * factor
    latents = f", of {factor} pixels a latent" if factor > 1 else ""
    sides = []
    for flag, given, configured in zip(
        ("--height", "--width"), (height, width), network.sample_shape[:2], strict=True
    ):
        if given is None:
            sides.append(configured)
            continue
        if given % multiple:
            below, above = given // multiple * multiple, (given // multiple + 1) * multiple
            nearest = f"{below} or {above}" if below else f"{above}"
            raise ValueError(
                f"{flag}={given}: {network.config.title}{latents} makes images whose sides are "
                f"multiples of {multiple} pixels: give {nearest}"
            )
        sides.append(given // factor)
    network.at_size(tuple(sides))  # which may refuse it for reasons of its own
    if note:
        print(f"note: {note}", flush=True)
    return {"model.input_size": tuple(sides)}

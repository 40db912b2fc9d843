"""Keys of the configuration that belong to no one object: of the run and of the commands.

All others stand beside what they configure; see `dit_jax.options`.
"""

import dataclasses

from dit_jax.options import option, register_section
from dit_jax.ranges import COUNT, LARGEST_COUNT, PERIOD, SEED, Range

_DEVICES = Range(1, LARGEST_COUNT, also=(-1,), whole=True)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Keys in no section."""

    name: str = option("", "shown in logs and reports")
    seed: int = option(0, "of initialisation, noise, and data order", SEED)


@dataclasses.dataclass(frozen=True)
class Training:
    """Of the training command and its loop."""

    num_steps: int = option(400_000, "updates in all; a longer run continues", COUNT)
    batch_size: int = option(256, "over all devices", COUNT)
    num_microbatches: int = option(1, "gradient accumulation: the batch in so many parts", COUNT)
    log_every: int = option(100, "steps between lines of metrics", COUNT)
    preview_every: int = option(0, "steps between sample grids; 0: none", PERIOD)
    preview_images: int = option(64, "of a sample grid", COUNT, needs="preview_every")
    checkpoint_every: int = option(5_000, "steps between checkpoints; 0: the last only", PERIOD)
    keep_last: int = option(2, "most recent checkpoints kept", COUNT)
    keep_every: int = option(0, "also keep checkpoints at multiples of this; 0: none", PERIOD)
    tensorboard: bool = option(True, "write events for TensorBoard")
    wandb: bool = option(False, "log to Weights & Biases")


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """Of whatever shows latents as images."""

    path: str = option("", "the VAE that decodes latents, a diffusers folder; empty: none")
    batch_size: int = option(16, "images decoded at once, over all devices", COUNT)
    tile: int = option(
        0, "side in latents of tiles to decode large images by; 0: whole images", PERIOD
    )


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Of the evaluation command."""

    num_images: int = option(1000, "samples that launch/evaluate.py scores", COUNT)


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each axis; of one of them -1: all that the others leave."""

    data: int = option(-1, "parts of a batch, each with the whole state", _DEVICES)
    fsdp: int = option(1, "parts of a batch among which the state is divided too", _DEVICES)
    tensor: int = option(1, "parts of the network's matrices", _DEVICES)
    sequence: int = option(1, "parts of an image, by rows", _DEVICES)


register_section("", Experiment)
register_section("training", Training)
register_section("autoencoder", Autoencoder)
register_section("evaluation", Evaluation)
register_section("mesh", Mesh)

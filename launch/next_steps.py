"""What to do with a training run that has ended: the command that launch/train.py names."""

from pathlib import Path

import ml_collections

from dit_jax import experiment
from dit_jax.interop import hub
from dit_jax.interop.autoencoder_kl import read_autoencoder_config
from dit_jax.launch.sampling import pipeline_of

_DEFAULT_VAE = "hub:stabilityai/sd-vae-ft-mse"
_HUB_FACTOR = 8  # of published FLUX pipelines, pixels a latent


def after_training(config: ml_collections.ConfigDict, directory: Path) -> list[str]:
    """The command line that makes something of a run: pictures, or what pictures are made with.

    Args:
        config: of the run, resolved.
        directory: its workdir.
    """
    if config.model.name != "flux":
        sample = ["python", "launch/sample.py", f"--workdir={directory}", "--out=samples.png"]
        decoded = config.model.in_channels in (1, 3) or config.autoencoder.path
        return sample if decoded else [*sample, f"--vae={_DEFAULT_VAE}"]
    # Prompts are for pipelines, of which a run has the transformer, or its change, alone.
    if config.lora.rank:
        return ["python", "launch/convert.py", "--to=lora", str(directory), "lora.safetensors"]
    pipeline = pipeline_of(directory, config)
    if not pipeline:
        return ["python", "launch/convert.py", "--to=diffusers", str(directory), "transformer"]
    return [
        *("python", "launch/sample.py", f"--pretrained={pipeline}", f"--workdir={directory}"),
        *("--prompt=a cat", *_as_trained(config, pipeline), "--out=cat.png"),
    ]


def _as_trained(config: ml_collections.ConfigDict, pipeline: str) -> list[str]:
    """Sizes, steps and tokens as the run has them, which a pipeline knows others of."""
    factor = _HUB_FACTOR
    if not pipeline.startswith(hub.PREFIX):
        factor = read_autoencoder_config(Path(pipeline) / "vae").downsampling_factor
    height, width, _ = experiment.build_network(config).sample_shape
    options = [f"--height={height * factor}", f"--width={width * factor}"]
    options.append(f"--steps={config.sampling.steps}")
    text = experiment.open_data(config, "train").info.declared.get("text")
    length = text.shape[0] if text else None
    return [*options, *([f"--max_sequence_length={length}"] if length else [])]

"""What a run holds that trained a LoRA: its adapter, or its network with the change folded in."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from dit_jax import experiment
from dit_jax.interop.found_model import FoundModel
from dit_jax.interop.tensors import InteropError
from dit_jax.models import Network
from dit_jax.models.lora import Adapter, to_adapter
from dit_jax.training import workdir
from dit_jax.training.lora import LoraOptions
from dit_jax.training.saved_weights import RunWeights


def merged(factors: FoundModel, base: FoundModel, options: LoraOptions) -> FoundModel:
    """The network of a run with its factors folded into the kernels, one parameter at a time.

    Args:
        factors: what the run's checkpoint holds.
        base: its network.
        options: the run's.
    """
    adapted = {path.removesuffix(".lora_a") for path in factors.paths if path.endswith(".lora_a")}

    def read(name: str, dtype: Any = np.float32) -> np.ndarray:
        layer = name.removesuffix(".kernel")
        if layer == name or layer not in adapted:
            return base.read(name, dtype)
        a, b = (factors.read(f"{layer}.lora_{part}") for part in "ab")
        change = np.float32(options.scale) * np.matmul(a, b)
        return base.finiteness.look(name, (base.read(name) + change).astype(dtype))

    return dataclasses.replace(factors, read=read, paths=base.paths, finiteness=base.finiteness)


def open_adapter(path: Path, weights: str = "", step: int | None = None) -> tuple[Network, Adapter]:
    """The adapter that a run has trained, and whose it is, for `lora.save_lora`.

    Args:
        path: the workdir.
        weights: 'raw', 'ema' or an average's name; '': as configured.
        step: of a checkpoint; None: the newest.

    Raises:
        InteropError: the run has trained no LoRA.
        CheckpointError: there are no such weights.
    """
    prepared = experiment.prepare(workdir.load_config(path))
    config = prepared.config
    if not config.lora.rank:
        raise InteropError(f"{path} is a run that trains a whole network: it has no LoRA")
    saved = RunWeights(path, prepared.method, weights or config.sampling.weights).open(step)
    adapter = to_adapter(saved.load(), prepared.method.lora.scale, path.name)
    return experiment.build_network(config), adapter

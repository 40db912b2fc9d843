"""What 'auto' stands for in an experiment, where the devices meant are not those at hand."""

from typing import Any

import ml_collections

from dit_jax import experiment
from dit_jax.models import attention, cpu_kernels, linear, stack


def accelerator_config(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The experiment with 'auto' as on an accelerator, for virtual CPU devices.

    Attention stays one that CPUs can compile, which keeps its scores for the backward pass.
    """
    config = config.copy_and_resolve_references()
    model, own = config.model, config.model.get(config.model.name, {})
    wanted = {"custom_gradients": "off", "dtype": "bfloat16", "attention": "xla"}
    choices = [(model, key, value) for key, value in wanted.items()]
    if "layer_loop" in own:
        choices.append((own, "layer_loop", "scan"))
    with config.unlocked():
        for section, key, value in choices:
            if section[key] == "auto" or (key == "attention" and section[key] == "cudnn"):
                section[key] = value
    return config


def made(config: ml_collections.ConfigDict, given: ml_collections.ConfigDict) -> dict[str, str]:
    """What 'auto' of an experiment stands for on the target (`dit_jax.target`), by key.

    Args:
        config: the experiment that is compiled, resolved.
        given: as it was given: only keys that are 'auto' there, or were changed, are told.
    """
    name, model = config.model.name, config.model
    network = experiment.build_network(config).config
    dtype = linear.resolve_dtype(model.dtype)
    custom = cpu_kernels.resolve_custom_gradients(model.custom_gradients)
    found: dict[str, Any] = {
        "dtype": dtype.name,
        "custom_gradients": "on" if custom else "off",
    }
    if hasattr(network, "head_dim"):
        found["attention"] = attention.resolve_implementation(
            model.attention, dtype, network.head_dim, custom_gradients=custom
        )
    if model.remat != "auto":
        found["remat"] = model.remat
    own = model.get(name, {})
    if "layer_loop" in own:
        found[f"{name}.layer_loop"] = stack.resolve_layer_loop(own.layer_loop, remat=model.remat)
    before = given.model
    return {
        f"config.model.{key}": value
        for key, value in found.items()
        if _at(before, key) == "auto" or _at(before, key) != _at(model, key)
    }


def _at(section: ml_collections.ConfigDict, path: str) -> Any:
    for key in path.split("."):
        section = section[key]
    return section

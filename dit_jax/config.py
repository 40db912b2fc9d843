"""The configuration: every key with its default and meaning, and the door where mistakes stop.

An experiment starts from `default_config()` and states only what differs. Where one of several
things is chosen by `name`, each has a namespace of its own (`process.ddpm`, `process.edm`, ...);
setting a key of a namespace that was not chosen is an error, since it would do nothing.
"""

import difflib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections

AnyConfig = Mapping | ml_collections.ConfigDict  # the latter is not registered as the former


def default_config() -> ml_collections.ConfigDict:
    """The default experiment: DiT-XL/2 on 256-pixel ImageNet latents, as in the paper."""
    return ml_collections.ConfigDict(
        {
            "name": "",  # shown in logs and reports
            "seed": 0,  # of initialisation, noise, and data order
            "model": {
                "name": "dit",
                "image_size": 32,  # input side: latents are 32 for 256 pixels, 64 for 512
                "in_channels": 4,
                "patch_size": 2,
                "hidden_size": 1152,
                "depth": 28,
                "num_heads": 16,
                "mlp_ratio": 4.0,
                "num_classes": 1000,  # 0: unconditional
                "learn_sigma": True,
                "time_frequency_spacing": "original",  # original | diffusers
                "mlp_norm_epsilon": 1e-6,  # 1e-5 in diffusers' default DiT
                "layer_loop": "auto",  # scan | unroll | auto: by backend
                "remat": "none",  # none | block | dots
                "attention": "auto",  # einsum | xla | cudnn | cpu | auto: by backend
                "custom_gradients": "auto",  # on | off (where jax.jvp is needed) | auto: on on CPUs
                "dtype": "auto",  # of matrix products; auto: bfloat16 on accelerators
            },
            "process": {
                "name": "ddpm",  # ddpm | flow | edm
                "ddpm": {
                    "num_timesteps": 1000,
                    "beta_start": 1e-4,
                    "beta_end": 2e-2,
                    "prediction": "eps",  # eps | x0 | velocity
                },
                "flow": {
                    "network_convention": "sit",  # sit | flux
                    "time_scale": 1.0,  # multiplies the time the network sees
                },
                "edm": {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0},
            },
            "timesteps": {
                # uniform | log_normal | logit_normal | speed | speed_first_release
                "name": "uniform",
                "log_normal": {"mean": -1.2, "std": 1.2},
                "logit_normal": {"mean": 0.0, "std": 1.0},
                "speed": {  # as in the paper; for flow and edm, by the process's own increments
                    "asymmetric": True,
                    "weighted": True,
                    "dual": True,
                    "k": 5.0,
                    "tau": 0,  # index from which the process counts as converged; 0: by process
                    "lam": 0.6,
                },
                "speed_first_release": {"asymmetric": True, "weighted": True, "dual": True},
            },
            "loss": {
                "weighting": "none",  # none | p2 | min_snr
                "p2": {"k": 1.0, "gamma": 1.0},
                "min_snr": {"gamma": 5.0},
                "vlb_weight": 1.0,  # of the variance term, when model.learn_sigma
            },
            "method": {
                "name": "denoising",
                "label_dropout": 0.1,  # share of labels, if any, replaced by the null class
            },
            "data": {
                "name": "latents",  # digits | image_folder | jpeg_npz | latents | tfds
                "horizontal_flip": False,  # mirror half of the training images
                "num_workers": 0,  # processes that read and decode; 0: a thread of this one
                "latents": {"path": "", "moments": "sample"},
                "image_folder": {
                    "path": "",
                    "resize": "adm",  # adm: scale and centre-crop to model.image_size | none
                    "test_fraction": 0.0,  # share held out where the folder has no test/
                    "verify": "fast",  # fast | full | none: looking for corrupt files
                    "index_cache": "",  # where the result of that is kept; empty: beside the data
                },
                "jpeg_npz": {"path": ""},  # with {split} where the split's name stands
                "tfds": {"dataset": "", "data_dir": "", "resize": "adm"},
            },
            "optimizer": {
                "name": "adamw",  # adamw | lion
                "learning_rate": 1e-4,
                "schedule": "constant",  # constant | cosine | linear, after the warm-up
                "warmup_steps": 0,
                "final_learning_rate": 0.0,  # of cosine and linear, at training.num_steps
                "weight_decay": 0.0,
                "gradient_clip_norm": 0.0,  # 0: no clipping
                "adamw": {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8},
                "lion": {"beta1": 0.9, "beta2": 0.99},
            },
            "ema": {
                "decays": (0.9999,),  # constant decays, each its own average
                "power_stds": (),  # EDM2 power-function averages by relative width, e.g. 0.05
            },
            "training": {
                "num_steps": 400_000,
                "batch_size": 256,  # over all devices
                "num_microbatches": 1,  # gradient accumulation: the batch in so many parts
                "log_every": 100,
                "preview_every": 0,  # steps between sample grids; 0: none
                "preview_images": 64,
                "checkpoint_every": 5_000,
                "keep_last": 2,  # most recent checkpoints kept
                "keep_every": 0,  # also keep checkpoints at multiples of this; 0: none
                "tensorboard": True,
                "wandb": False,
            },
            "sampling": {
                "solver": "ddpm",  # ddpm | ddim | euler | heun | dpmpp_2m
                "steps": 250,
                "guidance_scale": 1.0,
                "guidance_interval": (),  # (low, high) in process time; empty: always
                "guidance_channels": "all",  # all | first3 (the original DiT's)
                "spacing": "",  # of the times (diffusion.schedules); empty: by solver and process
                "shift": 1.0,  # of flow's times, above 1 towards noise
                "rho": 7.0,  # of EDM's times
                "ddpm": {"variance": "auto", "clip_denoised": False},
                "ddim": {"eta": 0.0, "clip_denoised": False},
                "heun": {"s_churn": 0.0, "s_min": 0.0, "s_max": 1e9, "s_noise": 1.0},
                "batch_size": 64,  # images sampled at once, over all devices
                "weights": "ema",  # ema: the first average; or raw, or an average's own name
            },
            "autoencoder": {
                "path": "",  # the VAE that decodes latents, a diffusers folder; empty: none
                "batch_size": 16,  # images decoded at once, over all devices
                "tile": 0,  # side in latents of tiles to decode large images by; 0: whole images
            },
            "evaluation": {"num_images": 1000},  # samples that launch/evaluate.py scores
            "mesh": {"data": -1},  # devices over which a batch is split; -1: all
        },
        convert_dict=True,
    ).lock()


# Sections in which one of several namespaces is chosen, and the key that chooses.
_SELECTORS = {
    "process": "name",
    "timesteps": "name",
    "loss": "weighting",
    "data": "name",
    "optimizer": "name",
    "sampling": "solver",
}


class ConfigError(ValueError):
    """A configuration that cannot mean what it says."""


def flatten(config: AnyConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields ('model.depth', 28) pairs of every leaf."""
    for key, value in config.items():
        path = f"{prefix}{key}"
        if isinstance(value, AnyConfig):
            yield from flatten(value, path + ".")
        else:
            yield path, tuple(value) if isinstance(value, list) else value


def nearest_key(key: str) -> str:
    """The documented key closest to a mistyped one, as a hint to append to an error."""
    known = [path for path, _ in flatten(default_config())]
    match = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not match:  # right name, wrong section
        leaf = key.rpartition(".")[2]
        match = [path for path in known if path.rpartition(".")[2] == leaf]
        match = match or difflib.get_close_matches(leaf, known, n=1, cutoff=0.4)
    return f"; did you mean config.{match[0]}?" if match else ""


def resolve(config: AnyConfig) -> ml_collections.ConfigDict:
    """Fills a partial configuration with the defaults and refuses what could not take effect.

    Args:
        config: an experiment's configuration, complete or not.

    Returns:
        A complete, locked configuration.

    Raises:
        ConfigError: an unknown key (with the nearest valid name), a value of another type, a key
            set in a namespace that was not chosen.
    """
    resolved = default_config()
    defaults = dict(flatten(resolved))
    for path, value in flatten(config):
        if path not in defaults:
            raise ConfigError(f"unknown key config.{path}{nearest_key(path)}")
        default = defaults[path]
        if isinstance(default, tuple) and not isinstance(value, tuple):
            value = (value,)
        if isinstance(default, float) and type(value) is int:
            value = float(value)
        if type(value) is not type(default):
            raise ConfigError(
                f"config.{path}={value!r} is of type {type(value).__name__}, expected "
                f"{type(default).__name__} (default {default!r})"
            )
        section, _, leaf = path.rpartition(".")
        parent = resolved
        for part in section.split(".") if section else ():
            parent = parent[part]
        parent[leaf] = value
    _refuse_unused(resolved, defaults)
    return resolved


def _refuse_unused(config: ml_collections.ConfigDict, defaults: dict[str, Any]) -> None:
    for section, selector in _SELECTORS.items():
        chosen = config[section][selector]
        for path, value in flatten(config[section]):
            namespace, dot, _ = path.partition(".")
            full = f"{section}.{path}"
            if dot and namespace != chosen and value != defaults[full]:
                raise ConfigError(
                    f"config.{full}={value!r} would do nothing: config.{section}.{selector} is "
                    f"{chosen!r}. Set config.{section}.{selector}={namespace!r} or leave it out"
                )
    if config.optimizer.schedule == "constant" and config.optimizer.final_learning_rate:
        raise ConfigError(
            "config.optimizer.final_learning_rate would do nothing with schedule='constant': "
            "set config.optimizer.schedule to 'cosine' or 'linear'"
        )
    if config.model.learn_sigma and config.process.name == "edm":
        raise ConfigError(
            "config.model.learn_sigma=True would do nothing with config.process.name='edm', which "
            "has no learned variance: set config.model.learn_sigma=False"
        )
    learned_variance = config.model.learn_sigma and config.process.name == "ddpm"
    if not learned_variance and config.loss.vlb_weight != defaults["loss.vlb_weight"]:
        raise ConfigError(
            "config.loss.vlb_weight would do nothing: it needs config.process.name='ddpm' and "
            "config.model.learn_sigma=True"
        )


def differences(old: AnyConfig, new: AnyConfig) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ, as {'model.depth': (old, new)}; absent values are None."""
    old, new = dict(flatten(old)), dict(flatten(new))
    return {
        key: (old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    }


def to_json(config: ml_collections.ConfigDict) -> str:
    """The configuration as JSON text."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str) -> ml_collections.ConfigDict:
    """Reads `to_json`'s text back, checked like any other configuration."""
    return resolve(json.loads(text))

"""From a configuration to the objects it names: network, process, method, sampler, data."""

from dit_jax.experiment.data import (
    open_data,
    require_augmented,
)
from dit_jax.experiment.door import (
    Prepared,
    effect_error,
    prepare,
    resolve_config,
)
from dit_jax.experiment.method import (
    METHODS,
    MethodOptions,
    build_augmentation,
    build_averages,
    build_denoising,
    build_method,
    build_optimizer,
    build_timesteps,
    register_method,
)
from dit_jax.experiment.network import (
    architecture,
    build_denoiser,
    build_network,
    build_process,
    network_differences,
    network_of,
    require_same_network,
    require_trainable,
    size_setting,
    unguidable,
)
from dit_jax.experiment.sampling import (
    SamplingPlan,
    build_sampling,
)

__all__ = [
    "METHODS",
    "MethodOptions",
    "Prepared",
    "SamplingPlan",
    "architecture",
    "build_augmentation",
    "build_averages",
    "build_denoiser",
    "build_denoising",
    "build_method",
    "build_network",
    "build_optimizer",
    "build_process",
    "build_sampling",
    "build_timesteps",
    "effect_error",
    "network_differences",
    "network_of",
    "open_data",
    "prepare",
    "register_method",
    "require_augmented",
    "require_same_network",
    "require_trainable",
    "resolve_config",
    "size_setting",
    "unguidable",
]

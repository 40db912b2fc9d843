"""An experiment's programs, traced from shapes and shardings: no array is ever made."""

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from dit_jax import experiment
from dit_jax.models.quantization import STORED
from dit_jax.parallel.mesh import DataParallel
from dit_jax.parallel.planning.compilers import PROGRAM_NAME
from dit_jax.parallel.sampling import ImageParallel
from dit_jax.sampling import image_keys
from dit_jax.training.method import Method

_STEPS = 5040  # by which the shares of phases are counted; divisible by all periods up to 10

# Fields of a state by what they are for; others keep their name.
_TITLES = {"params": "parameters", "ema": "averages", "optimizer": "optimizer", "step": "step"}


@dataclasses.dataclass(frozen=True)
class Planned:
    """One program that runs.

    Attributes:
        name: the phase of training, or 'sample'.
        share: of the runs that are of this program.
        lower: traces it; called where 'auto' means what it shall.
        least_traffic: bytes that one device reads and writes whatever the program does.
    """

    name: str
    share: float
    lower: Callable[[], Any]
    least_traffic: float


@dataclasses.dataclass(frozen=True)
class Needs:
    """What an experiment runs and holds.

    Attributes:
        mesh: names and sizes of its axes.
        batch_parts: parts into which a batch is divided.
        held: bytes of one device, by what they are for.
        whole: the same, of all devices together without copies.
        num_parameters: of the network.
        programs: those that run.
        model_flops: of one run over all devices, by the network's own formula.
        batch_size: examples a run.
        notes: on how an image is shared.
    """

    mesh: dict[str, int]
    batch_parts: int
    held: dict[str, int]
    whole: dict[str, int]
    num_parameters: int
    programs: list[Planned]
    model_flops: float
    batch_size: int
    notes: tuple[str, ...] = ()


def shaped(tree: Any, shardings: Any) -> Any:
    """Shapes with shardings, which stand for arrays."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )


def bytes_per_device(tree: Any) -> int:
    """What one device holds of a tree of `shaped`."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def whole_bytes(tree: Any) -> int:
    """What a tree of shapes is without copies."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _fields(state: Any) -> dict[str, Any]:
    """The fields of a state by title."""
    return {
        _TITLES.get(field.name, field.name.replace("_", " ")): getattr(state, field.name)
        for field in dataclasses.fields(state)
    }


def plan_training(
    config: ml_collections.ConfigDict, placement: DataParallel, method: Method
) -> Needs:
    """The updates of a method, one a phase.

    Args:
        config: resolved.
        placement: over the devices meant.
        method: of `config.method`.

    Raises:
        ValueError: mesh, batch and devices do not go together.
    """
    experiment.require_trainable(config)
    training = config.training
    placement.check_batch_size(training.batch_size, training.num_microbatches)
    state = jax.eval_shape(method.init, jax.random.key(config.seed))
    shardings = placement.state_shardings(state)
    state = shaped(state, shardings)
    key = _key(placement)
    frozen = {name: _frozen_model(config, name, placement) for name in method.frozen_names}
    batch = _batch(config, placement)
    trees = {**_fields(state), **frozen, "batch": batch}
    held = {name: bytes_per_device(tree) for name, tree in trees.items()}
    traffic = 2 * bytes_per_device(state) + bytes_per_device((frozen, batch))
    shares = collections.Counter(method.phase(step) for step in range(_STEPS))
    planned = []
    for phase in method.phases:

        def update(state, batch, key, frozen, phase=phase):
            key = jax.random.fold_in(key, state.step)
            return method.update(state, batch, key, frozen, phase)

        options = {"donate_argnums": 0, "out_shardings": (shardings, None)}
        lower = _lowering(placement, update, options, state, batch, key, frozen or None)
        planned.append(Planned(phase, shares[phase] / _STEPS, lower, traffic))
    return Needs(
        dict(placement.mesh.shape),
        placement.batch_parts,
        held,
        {name: whole_bytes(tree) for name, tree in trees.items()},
        _count(state.params),
        planned,
        method.flops_per_example * training.batch_size,
        training.batch_size,
    )


def plan_sampling(config: ml_collections.ConfigDict, placement: DataParallel) -> Needs:
    """The sampler of `config.sampling` for one batch, whole images on each device.

    Args:
        config: resolved.
        placement: over the devices meant.

    Raises:
        ValueError: mesh, batch and devices do not go together.
    """
    size = config.sampling.batch_size
    if remainder := size % placement.batch_parts:
        raise ValueError(
            f"a batch of {size} is not divisible by {placement.batch_parts} devices: set "
            f"--config.sampling.batch_size={size - remainder + placement.batch_parts}"
        )
    plan = experiment.build_sampling(config)
    params = _sampled_params(config, plan)
    params = shaped(params, placement.state_shardings(params))
    return _sampling_needs(config, placement, plan, params)


def plan_parallel_sampling(
    config: ml_collections.ConfigDict, parallel: ImageParallel, devices: Sequence[jax.Device]
) -> Needs:
    """The sampler of `config.sampling` for one batch of images that devices share.

    Args:
        config: resolved.
        parallel: how they share an image.
        devices: meant.

    Raises:
        ValueError: network, plan and devices do not go together.
    """
    parallel = dataclasses.replace(parallel, devices=tuple(devices))
    placement = parallel.distribute(
        experiment.build_sampling(config), batch_size=config.sampling.batch_size
    )
    params = _sampled_params(config, placement.plan)
    params = shaped(params, placement.param_shardings(params))
    return _sampling_needs(config, placement, placement.plan, params)


def _sampled_params(config: ml_collections.ConfigDict, plan: experiment.SamplingPlan) -> Any:
    """The shapes of parameters as they are sampled with: quantised, if their products are."""
    params = jax.eval_shape(plan.network.init, jax.random.key(config.seed))
    if config.model.quantization in STORED:
        params = jax.eval_shape(plan.network.quantize, params)
    return jax.eval_shape(plan.network.as_sampled, params)


def _sampling_needs(config, placement, plan, params) -> Needs:
    size = config.sampling.batch_size
    keys = jax.eval_shape(lambda: image_keys(0, np.arange(size)))
    keys = shaped(keys, placement.split)
    told = needed_conditions(plan.network, size)
    # Values of integers are checked before tracing, so they are there.
    numbers = {
        name: np.zeros(array.shape, array.dtype)
        for name, array in told.items()
        if not np.issubdtype(array.dtype, np.floating)
    }
    arrays = {name: array for name, array in told.items() if name not in numbers}
    held = {"parameters": bytes_per_device(params)}

    def sample(params, keys, arrays):
        return plan.bind(params)(keys, numbers | arrays)

    # Guidance evaluates twice as many examples at once: weights are read once all the same.
    traffic = plan.evaluations * held["parameters"]
    lower = _lowering(placement, sample, {}, params, keys, arrays)
    guided = 1 if plan.guidance_scale == 1.0 else 2
    return Needs(
        dict(placement.mesh.shape),
        getattr(placement, "batch_parts", placement.num_devices),
        held,
        {"parameters": whole_bytes(params)},
        _count(params),
        [Planned("sample", 1.0, lower, traffic)],
        plan.network.flops_per_example * guided * plan.evaluations * size,
        size,
        getattr(placement, "notes", ()),
    )


def _count(params: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _key(placement: DataParallel) -> jax.ShapeDtypeStruct:
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=placement.replicated)


def _frozen_model(config: ml_collections.ConfigDict, name: str, placement: DataParallel) -> Any:
    """The shapes of a teacher or of what else is only read: of the student's network."""
    config = config.copy_and_resolve_references()
    if name == "teacher":
        with config.unlocked():
            config.model.second_time = "none"
    network = experiment.build_network(config)
    params = jax.eval_shape(network.init, jax.random.key(0))
    return shaped(params, placement.state_shardings(params))


def _batch(config: ml_collections.ConfigDict, placement: DataParallel) -> dict[str, Any]:
    """The shapes of a batch, as the data sources of `dit_jax.data` make them."""
    size = config.training.batch_size
    shape = experiment.build_network(config).sample_shape
    arrays = {"image": ((size, *shape), np.float32)}
    if config.method.name == "kd":
        steps = config.sampling.steps
        name, states = ("noise", ()) if steps == 1 else ("path", (steps,))
        arrays[name] = ((size, *states, *shape), np.float32)
    batch = {
        name: jax.ShapeDtypeStruct(
            shape, dtype, sharding=placement.batch_sharding(name, len(shape))
        )
        for name, (shape, dtype) in arrays.items()
    }
    conditions = needed_conditions(experiment.build_network(config), size)
    shardings = jax.tree.map(lambda _: placement.split, conditions)
    return {**batch, "conditions": shaped(conditions, shardings)}


def needed_conditions(network: Any, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of what a network has to be told of `size` examples.

    Raises:
        ValueError: of a condition whose size is the data's, and that says no usual one.
    """
    needed = {name: c for name, c in network.conditions.items() if c.required}
    for name, condition in needed.items():
        if None in condition.shape and not condition.usual:
            raise ValueError(
                f"the condition {name!r} has the shape {condition.shape}, of which the data decide "
                "a size, and its declaration names no usual one: such a network cannot be planned"
            )
    return {
        name: jax.ShapeDtypeStruct((size, *(c.usual or c.shape)), np.dtype(c.dtype))
        for name, c in needed.items()
    }


def _lowering(
    placement: Any, function: Callable, options: dict[str, Any], *inputs: Any
) -> Callable[[], Any]:
    def planned_program(*inputs):
        return function(*inputs)

    planned_program.__name__ = PROGRAM_NAME

    def lower():
        with placement.tracing():
            return jax.jit(planned_program, **options).lower(*inputs)

    return lower

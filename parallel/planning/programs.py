"""Compiles an experiment's programs for devices that are not there.

Shapes and shardings stand for all arrays: `jax.jit(...).lower(shapes).compile()`. What a GPU or TPU
would choose is set in place of what 'auto' means on CPUs (`accelerator_config`), and collectives
are read from the program as it leaves XLA's partitioner: later passes of the CPU backend turn
bfloat16 into float32.
"""

import collections
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from dit_jax import experiment
from dit_jax.parallel.mesh import DataParallel
from dit_jax.parallel.planning.program import Program
from dit_jax.sampling import image_keys
from dit_jax.training.method import Method

_STEPS = 5040  # by which the shares of phases are counted; divisible by all periods up to 10
PROGRAM_NAME = "planned_program"  # by which XLA's files are found

# Fields of a state by what they are for; others keep their name.
_TITLES = {"params": "parameters", "ema": "averages", "optimizer": "optimizer", "step": "step"}


def accelerator_config(
    config: ml_collections.ConfigDict,
) -> tuple[ml_collections.ConfigDict, dict[str, str]]:
    """The experiment with 'auto' as on an accelerator, and what was set, by key.

    Attention stays one that CPUs can compile, which keeps its scores for the backward pass.
    """
    config = config.copy_and_resolve_references()
    model, own = config.model, config.model.get(config.model.name, {})
    wanted = {"custom_gradients": "off", "dtype": "bfloat16", "attention": "xla"}
    choices = [("config.model", model, key, value) for key, value in wanted.items()]
    if "layer_loop" in own:
        choices.append((f"config.model.{model.name}", own, "layer_loop", "scan"))
    chosen = {}
    with config.unlocked():
        for path, section, key, value in choices:
            is_kernel = key == "attention" and section[key] == "cudnn"
            if section[key] == "auto" or is_kernel:
                section[key] = value
                chosen[f"{path}.{key}"] = value
    return config, chosen


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One program and what was found in it; of one device, in bytes and operations.

    Attributes:
        name: the phase of training, or 'sample'.
        share: of the runs that are of this program.
        temporaries: bytes beside the arguments: activations, gradients, gathered weights.
        flops: of matrix products and convolutions.
        least_traffic: bytes that are read from and written to memory whatever the program does.
        program: as the partitioner left it.
        compile_seconds: how long it took.
    """

    name: str
    share: float
    temporaries: int
    flops: float
    least_traffic: float
    program: Program
    compile_seconds: float


@dataclasses.dataclass(frozen=True)
class Needs:
    """What an experiment runs and holds.

    Attributes:
        placement: over the virtual devices.
        held: bytes of one device, by what they are for.
        whole: the same, of all devices together without copies.
        num_parameters: of the network.
        programs: those that run.
        model_flops: of one run over all devices, by the network's own formula.
        batch_size: examples a run.
    """

    placement: DataParallel
    held: dict[str, int]
    whole: dict[str, int]
    num_parameters: int
    programs: list[Compiled]
    model_flops: float
    batch_size: int


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
    config: ml_collections.ConfigDict, placement: DataParallel, method: Method, programs: Path
) -> Needs:
    """Compiles the updates of a method, one a phase.

    Args:
        config: of `accelerator_config`, resolved.
        placement: over the virtual devices.
        method: of `config.method`.
        programs: where XLA writes.

    Raises:
        ValueError: mesh, batch and devices do not go together.
    """
    experiment.require_trainable(config)
    training = config.training
    placement.check_batch_size(training.batch_size, training.num_microbatches)
    key = jax.random.key(config.seed)
    state = jax.eval_shape(method.init, key)
    shardings = placement.state_shardings(state)
    state = shaped(state, shardings)
    frozen = {name: _frozen_model(config, name, placement) for name in method.frozen_names}
    batch = _batch(config, placement)
    trees = {**_fields(state), **frozen, "batch": batch}
    held = {name: bytes_per_device(tree) for name, tree in trees.items()}
    traffic = 2 * bytes_per_device(state) + bytes_per_device((frozen, batch))
    shares = collections.Counter(method.phase(step) for step in range(_STEPS))
    compiled = []
    for phase in method.phases:

        def planned_program(state, batch, key, frozen, phase=phase):
            key = jax.random.fold_in(key, state.step)
            return method.update(state, batch, key, frozen, phase)

        jitted = jax.jit(planned_program, donate_argnums=0, out_shardings=(shardings, None))
        lower = _lowering(placement, jitted, state, batch, key, frozen or None)
        share = shares[phase] / _STEPS
        compiled.append(compile_program(lower, phase, share, traffic, programs))
    return Needs(
        placement,
        held,
        {name: whole_bytes(tree) for name, tree in trees.items()},
        sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params)),
        compiled,
        method.flops_per_example * training.batch_size,
        training.batch_size,
    )


def plan_sampling(
    config: ml_collections.ConfigDict, placement: DataParallel, programs: Path
) -> Needs:
    """Compiles the sampler of `config.sampling` for one batch.

    Args:
        config: of `accelerator_config`, resolved.
        placement: over the virtual devices.
        programs: where XLA writes.

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
    network = plan.sampler.denoiser.network
    params = jax.eval_shape(network.init, jax.random.key(config.seed))
    params = shaped(params, placement.state_shardings(params))
    labels = np.arange(size, dtype=np.int32) % max(config.model.num_classes, 1)
    keys = jax.eval_shape(lambda: image_keys(0, np.arange(size)))
    keys = shaped(keys, placement.split)
    held = {"parameters": bytes_per_device(params)}

    def planned_program(params, keys):
        return plan.bind(params)(keys, labels)

    # Guidance evaluates twice as many examples at once: weights are read once all the same.
    traffic = plan.evaluations * held["parameters"]
    lower = _lowering(placement, jax.jit(planned_program), params, keys)
    guided = 1 if plan.guidance_scale == 1.0 else 2
    return Needs(
        placement,
        held,
        {"parameters": whole_bytes(params)},
        sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)),
        [compile_program(lower, "sample", 1.0, traffic, programs)],
        network.flops_per_example * guided * plan.evaluations * size,
        size,
    )


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
    declared = experiment.build_network(config).conditions
    batch["conditions"] = {
        name: jax.ShapeDtypeStruct((size, *c.shape), np.dtype(c.dtype), sharding=placement.split)
        for name, c in declared.items()
        if c.required
    }
    return batch


def _lowering(placement: DataParallel, jitted: Any, *inputs: Any) -> Callable[[], Any]:
    def lower():
        with placement.tracing():
            return jitted.lower(*inputs)

    return lower


def compile_program(
    lower: Callable[[], Any], name: str, share: float, traffic: float, programs: Path
) -> Compiled:
    """Lowers and compiles a program called `PROGRAM_NAME`, and reads it.

    Args:
        lower: traces it.
        name: for people.
        share: of the runs that are of this program.
        traffic: see `Compiled.least_traffic`.
        programs: where XLA writes the program that leaves its partitioner.

    Raises:
        RuntimeError: XLA has not written it there.
    """
    started = time.perf_counter()
    before = set(programs.iterdir())
    compiled = lower().compile()
    seconds = time.perf_counter() - started
    text = compiled.as_text()
    if jax.device_count() > 1:
        written = sorted(set(programs.glob("*after_spmd-partitioning*")) - before)
        if not written:
            raise RuntimeError(
                f"XLA wrote no partitioned program to {programs}: this version of JAX "
                f"({jax.__version__}) names its passes otherwise than 0.10 does"
            )
        text = written[-1].read_text()
    memory = compiled.memory_analysis()
    returned = memory.output_size_in_bytes - memory.alias_size_in_bytes
    program = Program(text)
    temporaries = memory.temp_size_in_bytes + returned
    return Compiled(name, share, temporaries, program.work().flops, traffic, program, seconds)

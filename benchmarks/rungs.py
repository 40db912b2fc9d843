"""The rungs of the ladder: what makes sampling fast, each a switch that is on or off."""

import dataclasses
import functools
import importlib.util
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from dit_jax import conditions as conditions_lib
from dit_jax import experiment
from dit_jax.config import default_config
from dit_jax.diffusion import guided
from dit_jax.diffusion.samplers import Step
from dit_jax.interop.models import open_model
from dit_jax.launch import loading, spelling, wiring
from dit_jax.models import Request
from dit_jax.models.quantization import STORED
from dit_jax.parallel.planning.programs import needed_conditions
from dit_jax.programs import Programs
from dit_jax.sampling import image_keys
from dit_jax.training import workdir

SWITCHES = {
    "compiled": "all steps are one program; else one evaluation is, and Python does the rest",
    "bfloat16": "parameters and matrix products in bfloat16 instead of float32",
    "fused attention": "the fastest kernel there is, instead of scores in memory",
    "layers apart": "every layer's weights are arrays of their own, in an unrolled loop",
    "quantized": "matrix products of 8-bit operands",
    "kept program": "loaded from a file instead of compiled",
    "step cache": "blocks are skipped where their result hardly changes",
}


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is sampled.

    Attributes:
        workdir: a trained run; '' where something else is given.
        config: a file of configs/, whose network gets random parameters; '' otherwise.
        pretrained: a checkpoint or a pipeline's folder, see `interop.open_model`; '' otherwise.
        network: its name in configurations, as 'dit'.
        changes: configuration values that are not the switches', by key.
        solver: of `sampling`.
        steps: its steps.
        batch_size: images at once.
        guidance_scale: 1 for none.
        quantization: of the switch 'quantized'.
        threshold: of the switch 'step cache'.
        programs: a folder, for the switch 'kept program'.
    """

    workdir: str
    config: str
    pretrained: str
    network: str
    changes: dict[str, Any]
    solver: str
    steps: int
    batch_size: int
    guidance_scale: float
    quantization: str
    threshold: float
    programs: str


@dataclasses.dataclass(frozen=True)
class Setting:
    """A row of the table.

    Attributes:
        name: of the row.
        group: 'ladder', each rung on top of those before; 'alone', on the compiled sampler; 'off',
            all but one.
        on: the switches that are on.
    """

    name: str
    group: str
    on: tuple[str, ...]


def settings(switches: tuple[str, ...]) -> dict[str, list[Setting]]:
    """The rows by group, that which the group is compared with first."""
    ladder = [Setting("baseline", "ladder", ())]
    ladder += [Setting(f"+ {name}", "ladder", switches[: n + 1]) for n, name in enumerate(switches)]
    rest = [name for name in switches if name != "compiled"]
    alone = [Setting("compiled", "alone", ("compiled",))]
    alone += [Setting(f"{name} alone", "alone", ("compiled", name)) for name in rest]
    off = [Setting("all", "off", switches)]
    off += [
        Setting(f"all but {name}", "off", tuple(s for s in switches if s != name)) for name in rest
    ]
    return {"ladder": ladder, "alone": alone, "off": off}


def overrides(work: Workload, on: tuple[str, ...]) -> dict[str, Any]:
    """Configuration values by key."""
    dtype = "bfloat16" if "bfloat16" in on else "float32"
    values = {
        "sampling.solver": work.solver,
        "sampling.steps": work.steps,
        "sampling.guidance_scale": work.guidance_scale,
        "sampling.guidance_interval": (),
        "sampling.batch_size": work.batch_size,
        "model.dtype": dtype,
        "model.param_dtype": dtype,
        "model.attention": "auto" if "fused attention" in on else "einsum",
        "model.quantization": work.quantization if "quantized" in on else "none",
        **work.changes,
    }
    if "layers apart" in on:
        values[f"model.{work.network}.layer_loop"] = "unroll"
    if "step cache" in on:
        values |= {"cache.name": "first_block", "cache.first_block.threshold": work.threshold}
    return values


def load(work: Workload, on: tuple[str, ...]) -> tuple[ml_collections.ConfigDict, Any]:
    """Configuration and parameters, on the device."""
    values = overrides(work, on)
    if work.config:
        config = config_of(work.config)
        config = experiment.resolve_config(wiring.override(config.to_dict(), values))
        params = random_parameters(experiment.build_network(config))
    else:
        if work.workdir:
            model = loading.load_model(Path(work.workdir), overrides=values)
        else:
            model = loading.load_found(open_model(work.pretrained), overrides=values)
        config, params = model.config, model.params
    return config, experiment.build_network(config).as_sampled(params)


def check(work: Workload, settings: Sequence[Setting]) -> None:
    """Refuses rows that cannot be sampled, before any of them is.

    Raises:
        ValueError: a row's configuration cannot work, which is named.
        InteropError, WorkdirError, FileNotFoundError: there is no such network.
    """
    values = source_config(work).to_dict()
    values["mesh"] = default_config().mesh.to_dict()  # of this machine
    names = {(): ""}  # without switches first: what is wrong with all rows
    for setting in settings:
        names.setdefault(setting.on, setting.name)
    for on, name in names.items():
        # Which devices multiply in 8 bits, and what samples but does not train, is known elsewhere.
        changes = {**overrides(work, on), "model.quantization": "none"}
        try:
            experiment.resolve_config(wiring.override(values, changes))
        except ValueError as error:
            if not on:
                raise
            without = f"--without {shlex.quote(on[-1])}"
            raise ValueError(f"the row '{name}': {error} ({without})") from error


def source_config(work: Workload) -> ml_collections.ConfigDict:
    """The configuration of what is sampled, before any switch; no weights are read."""
    if work.workdir:
        return workdir.load_config(Path(work.workdir))
    if work.pretrained:
        return open_model(work.pretrained).config
    return config_of(work.config)


def conditions(network: Any, batch_size: int) -> dict[str, np.ndarray]:
    """What a network is told of a batch: all classes in turn, or arrays drawn at random.

    A guidance scale that is told to the network is 3.5, FLUX.1's usual one.
    """
    random, told = np.random.default_rng(0), {}
    for name, array in needed_conditions(network, batch_size).items():
        if name == "label":
            told[name] = wiring.balanced_labels(batch_size, network.num_classes)
        elif name == "guidance":
            told[name] = np.full(array.shape, 3.5, array.dtype)
        else:
            told[name] = random.standard_normal(array.shape).astype(array.dtype)
    return told


def config_of(name: str) -> ml_collections.ConfigDict:
    """What `get_config()` of a Python file returns, or of an experiment known by its name.

    Raises:
        FileNotFoundError: it is not there.
    """
    path = Path(name)
    if not (path.is_file() and path.suffix == ".py"):
        path = spelling.experiment_file(name)
    if path is None:
        raise FileNotFoundError(
            f"--config={name}: no such file; expected one of configs/, as digits"
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def random_parameters(network: Any) -> Any:
    """All drawn at random: a network as it is initialised returns zeros.

    Values are the same under all switches but for the dtype.
    """

    def draw(key):
        leaves, structure = jax.tree.flatten(network.init(key))
        keys = jax.random.split(key, len(leaves))
        noise = [0.02 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
        drawn = [(x + n).astype(x.dtype) for x, n in zip(leaves, noise, strict=True)]
        params = jax.tree.unflatten(structure, drawn)
        return network.quantize(params) if network.config.quantization in STORED else params

    return jax.jit(draw)(jax.random.key(0))


def sampler(
    work: Workload, on: tuple[str, ...]
) -> tuple[Callable[[], np.ndarray], Callable[[], float]]:
    """How one batch is made under some switches.

    Returns:
        A function that makes the batch, and one that tells the share of evaluations in which all
        blocks ran.
    """
    config, params = load(work, on)
    plan = experiment.build_sampling(config)
    told = conditions(plan.network, work.batch_size)
    indices = np.arange(work.batch_size)
    keys = image_keys(0, indices)

    def computed() -> float:
        if not plan.has_cache:
            return 1.0
        return float(plan.bind_counted(params)(keys, told)[1].mean())

    if "compiled" not in on:
        draw = host_loop(plan, params)
    elif "kept program" in on:
        programs = Programs(Path(work.programs))
        numbers = (0, indices.astype(np.uint32))
        return lambda: programs.call(plan.program(params, *numbers, told)), computed
    else:
        draw = plan.bind(params)
    return lambda: draw(keys, told), computed


def host_loop(plan: experiment.SamplingPlan, params: Any) -> Callable[..., Any]:
    """A sampler as it is written at first: Python takes the steps, a compiled network is called.

    Between two evaluations the solver's arithmetic runs operation by operation.
    """
    chosen = plan.sampler
    denoiser, solver, process = chosen.denoiser, chosen.solver, chosen.denoiser.process
    scale, declared = plan.guidance_scale, denoiser.network.conditions
    nulls = {} if scale == 1.0 else conditions_lib.null_values(declared)

    @functools.partial(jax.jit, static_argnames="with_guidance")
    def evaluate(params, x, t, conditions, scale, with_guidance):
        def raw(x, t, conditions, carry):
            request = Request(x, jnp.broadcast_to(t, x.shape[:1]), conditions)
            return denoiser.raw(params, request).out, carry

        if with_guidance:
            null = conditions_lib.without(conditions, nulls)
            raw = guided(raw, null, scale, channels=chosen.guided_channels)
        return raw(x, t, conditions, None)[0]

    def draw(keys, told):
        conditions = {name: jnp.asarray(value) for name, value in told.items()}

        def denoise(x, t, carry, r=None):
            r = {} if r is None else {"r": jnp.broadcast_to(r, x.shape[:1])}
            out = evaluate(params, x, t, {**conditions, **r}, scale, scale != 1.0)
            return process.interpret(out, x, t), carry

        noise_keys = jax.vmap(lambda key: jax.random.fold_in(key, 0))(keys)
        step_keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)
        noise = jax.vmap(lambda key: jax.random.normal(key, chosen.sample_shape))(noise_keys)
        times = jnp.asarray(plan.times, jnp.float32)
        x, count = noise * process.start_scale(times[0]), len(times) - 1
        state, carry = solver.init(process, x), None
        for index in range(count):
            step_key = jax.vmap(lambda key, i=index: jax.random.fold_in(key, i))(step_keys)
            step = Step(times[index], times[index + 1], step_key, count)
            x, state, carry = solver.step(process, denoise, x, step, state, carry)
        return x

    return draw


def timed(draw: Callable[[], Any]) -> float:
    """Seconds of one batch, after one that is not timed."""
    jax.block_until_ready(draw())
    started = time.perf_counter()
    jax.block_until_ready(draw())
    return time.perf_counter() - started

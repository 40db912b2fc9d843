"""Derivatives forwards through the networks, held against double-precision finite differences."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_jax.denoiser import Denoiser
from dit_jax.diffusion import EDM, RectifiedFlow
from dit_jax.diffusion.timesteps import LogNormal, Uniform
from dit_jax.distill.mean_flow import MeanFlow
from dit_jax.distill.scm import SCM
from dit_jax.distill.student import Student
from dit_jax.models import DiTConfig, Network, Request
from dit_jax.models.edm import SongUNetConfig
from tests.distill.float64 import in_float64
from tests.long import long
from tests.models.conftest import perturbed

BATCH, SIZE, CHANNELS = 8, 8, 2
SIGMA_DATA = 0.5
COMMON = {"image_size": SIZE, "in_channels": CHANNELS, "custom_gradients": "off"}
NETWORKS = {
    "dit": DiTConfig(
        **COMMON,
        hidden_size=32,
        depth=2,
        num_heads=2,
        num_classes=3,
        learn_sigma=False,
        layer_loop="unroll",
    ),
    "song_unet": SongUNetConfig(
        **COMMON,
        model_channels=16,
        channel_mult=(1, 2),
        num_blocks=1,
        attn_resolutions=(4,),
        dropout=0.0,
        num_classes=3,
    ),
}
PROCESSES = {
    "edm": EDM(SIGMA_DATA),
    "flow": RectifiedFlow("flux"),
    "flow1000": RectifiedFlow("flux", 1000.0),
}
EXECUTIONS = [
    ("dit", {"layer_loop": loop, "remat": remat})
    for loop in ("unroll", "scan")
    for remat in ("none", "block", "dots")
] + [("song_unet", {"remat": remat}) for remat in ("none", "block", "dots")]
# Each of them under one method, under both with DIT_JAX_LONG=1.
TRIG_FLOW = [case if i % 2 == 0 else long(*case) for i, case in enumerate(EXECUTIONS)]
MEAN_FLOW = [case if i % 2 == 1 else long(*case) for i, case in enumerate(EXECUTIONS)]


def _normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def _denoiser(name, process, **changes):
    config = dataclasses.replace(NETWORKS[name], **changes)
    return Denoiser(Network(config), PROCESSES[process])


def _params(denoiser):
    """Every parameter random, also those that start at zero."""
    return perturbed(jax.jit(denoiser.network.init)(jax.random.key(0)), jax.random.key(1), 0.05)


def _examples():
    return {
        "x0": SIGMA_DATA * _normal(1, BATCH, SIZE, SIZE, CHANNELS),
        "eps": _normal(2, BATCH, SIZE, SIZE, CHANNELS),
        "conditions": {"label": jnp.arange(BATCH) % 4},
        "dropout_keys": jax.random.split(jax.random.key(3), BATCH),
    }


def _relative(a, b):
    return np.linalg.norm(np.asarray(a) - b) / np.linalg.norm(b)


def _scm(denoiser, **options):
    return SCM(Student(denoiser, optax.adam(1e-3)), LogNormal(denoiser.process), **options)


def _scm_examples(method, angle):
    """Noisy x on known angles, and the velocity of its data and noise."""
    examples = _examples()
    ratio = SIGMA_DATA * jnp.tan(angle)
    examples["t"] = method.trig.process.time_from_sigma_ratio(ratio)
    given = examples["x0"], examples["eps"], examples["t"]
    return examples, method.trig.add_noise(*given), method.trig.velocity(*given)


ANGLES = jnp.linspace(0.05, 1.5, BATCH)


def _trig_reference(name, process):
    """cos sin dF / d angle on the path through data and noise, from its definition."""
    denoiser = _denoiser(name, process)
    params, method = _params(denoiser), _scm(denoiser)
    examples, x, _ = _scm_examples(method, ANGLES)

    def output(x, t):
        return method.trig.output(denoiser, params, Request(x, t, examples["conditions"]))

    output = in_float64(output, x, examples["t"])
    x0, eps = (np.asarray(examples[k], np.float64) for k in ("x0", "eps"))

    def at(angle):
        cos, sin = (f(angle)[:, None, None, None] for f in (np.cos, np.sin))
        ratio = SIGMA_DATA * np.tan(angle)
        t = ratio if process == "edm" else ratio / (1 + ratio)
        return output(cos * x0 + sin * SIGMA_DATA * eps, t)

    angle, step = np.asarray(ANGLES, np.float64), 1e-6
    slope = (at(angle + step) - at(angle - step)) / (2 * step)
    return (np.cos(angle) * np.sin(angle))[:, None, None, None] * slope, at(angle)


_REFERENCES = {}


def _cached(reference, *arguments):
    key = (reference.__name__, *arguments)
    if key not in _REFERENCES:
        _REFERENCES[key] = reference(*arguments)
    return _REFERENCES[key]


def _trig_tangent(denoiser, params, **options):
    method = _scm(denoiser, **options)
    examples, x, velocity = _scm_examples(method, ANGLES)
    return jax.jit(method.output_and_tangent)(params, x, velocity, examples)


@pytest.mark.parametrize("name,execution", TRIG_FLOW)
def test_trig_flow_tangent_is_the_derivative_along_the_path(name, execution):
    denoiser = _denoiser(name, "edm", **execution)
    f, tangent = _trig_tangent(denoiser, _params(denoiser))
    expected, expected_f = _cached(_trig_reference, name, "edm")
    assert _relative(f, expected_f) < 1e-5
    assert _relative(tangent, expected) < 1e-4


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("process", ["flow", "flow1000"])
def test_trig_flow_tangent_of_a_rectified_flow(name, process):
    denoiser = _denoiser(name, process)
    _, tangent = _trig_tangent(denoiser, _params(denoiser))
    assert _relative(tangent, _cached(_trig_reference, name, process)[0]) < 1e-3


@pytest.mark.parametrize("name", NETWORKS)
def test_finite_differences_of_the_method_come_near(name):
    denoiser = _denoiser(name, "edm")
    options = {"derivative": "finite_difference", "finite_difference_step": 1e-2}
    _, tangent = _trig_tangent(denoiser, _params(denoiser), **options)
    assert _relative(tangent, _cached(_trig_reference, name, "edm")[0]) < 1e-2


def test_the_tangent_has_the_dropout_of_the_output():
    denoiser = _denoiser("song_unet", "edm", dropout=0.3)
    params = _params(denoiser)
    f, tangent = _trig_tangent(denoiser, params)
    options = {"derivative": "finite_difference", "finite_difference_step": 1e-2}
    other_f, difference = _trig_tangent(denoiser, params, **options)
    assert _relative(f, np.asarray(other_f)) < 1e-5
    assert _relative(tangent, np.asarray(difference)) < 1e-2
    without = _cached(_trig_reference, "song_unet", "edm")[0]
    assert _relative(tangent, without) > 0.1


def _mean_flow(denoiser):
    process = denoiser.process
    student = Student(denoiser, optax.adam(1e-3))
    return MeanFlow(student, timesteps=Uniform(process), end_timesteps=Uniform(process))


def _mean_flow_examples():
    examples = _examples()
    x0, eps = examples.pop("x0"), examples.pop("eps")
    t = jnp.linspace(0.05, 1.0, BATCH)
    time = t[:, None, None, None]
    return {**examples, "t": t, "r": 0.4 * t, "x": (1 - time) * x0 + time * eps}, eps - x0


def _mean_flow_reference(name, process):
    """du/dt in the direction (v, 1, 0) of (x, t, r)."""
    denoiser = _denoiser(name, process, second_time="t-r")
    params = _params(denoiser)
    examples, velocity = _mean_flow_examples()

    def u(x, t, r):
        conditions = {**examples["conditions"], "r": r}
        return denoiser.velocity(params, Request(x, t, conditions))

    arguments = examples["x"], examples["t"], examples["r"]
    u = in_float64(u, *arguments)
    x, t, r, v = (np.asarray(a, np.float64) for a in (*arguments, velocity))
    step = 1e-6
    slope = (u(x + step * v, t + step, r) - u(x - step * v, t - step, r)) / (2 * step)
    return slope, u(x, t, r)


@pytest.mark.parametrize("name,execution", MEAN_FLOW)
def test_mean_flow_tangent_is_the_total_derivative(name, execution):
    denoiser = _denoiser(name, "flow", second_time="t-r", **execution)
    examples, velocity = _mean_flow_examples()
    method = _mean_flow(denoiser)
    u, slope = jax.jit(method.average_velocity)(_params(denoiser), examples, velocity)
    expected, expected_u = _cached(_mean_flow_reference, name, "flow")
    assert _relative(u, expected_u) < 1e-5
    assert _relative(slope, expected) < 1e-4


def _sharded(params):
    """Parameters over 8 devices, each along its largest axis that 8 divides."""
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))

    def place(leaf):
        divisible = [side if side % 8 == 0 else 0 for side in leaf.shape]
        spec = [None] * leaf.ndim
        if any(divisible):
            spec[int(np.argmax(divisible))] = "data"
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

    params = jax.tree.map(place, params)
    assert sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(params)) > 5
    return params, NamedSharding(mesh, PartitionSpec("data"))


SHARDED_EXECUTIONS = [
    ("dit", {"layer_loop": "unroll"}),
    ("dit", {"layer_loop": "scan", "remat": "block"}),
    ("song_unet", {"channel_mult": (1,), "attn_resolutions": (8,)}),
]


@pytest.mark.parametrize("name,execution", SHARDED_EXECUTIONS)
def test_sharded_parameters_give_the_same_tangents(name, execution):
    second_time = {"second_time": "t-r"}
    trig, average = (
        _denoiser(name, "edm", **execution),
        _denoiser(name, "flow", **second_time, **execution),
    )
    method = _scm(trig)
    examples, x, velocity = _scm_examples(method, ANGLES)
    cases = [
        (method.output_and_tangent, _params(trig), (x, velocity, examples)),
        (_mean_flow(average).average_velocity, _params(average), _mean_flow_examples()),
    ]
    for function, params, arguments in cases:
        params = jax.device_put(params, jax.devices()[0])
        expected = jax.jit(function)(params, *arguments)
        shards, rows = _sharded(params)
        found = jax.jit(function)(shards, *jax.device_put(arguments, rows))
        for a, b in zip(found, expected, strict=True):
            assert _relative(a, np.asarray(b)) < 1e-5


def test_hand_written_gradients_have_no_forward_mode_error():
    denoiser = _denoiser("dit", "edm", custom_gradients="on")
    with pytest.raises(TypeError, match="forward-mode"):
        _trig_tangent(denoiser, _params(denoiser))

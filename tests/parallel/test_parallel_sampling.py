"""One image on many devices is the image of one device, and displaced patches are DistriFusion's.

What is exact equals a single device; what is displaced equals a plain Python loop over devices with
a buffer of stale keys and values for each.
"""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_jax.denoiser import Denoiser
from dit_jax.diffusion import RectifiedFlow
from dit_jax.diffusion.samplers import make_solver, schedule
from dit_jax.diffusion.solvers import Step
from dit_jax.experiment import SamplingPlan
from dit_jax.models import DiTConfig, Network, Request, layers
from dit_jax.models.attention import einsum_attention
from dit_jax.parallel.sampling import ImageParallel
from dit_jax.sampling import Sampler, image_keys
from tests.long import long
from tests.models.conftest import random_inputs, random_params

# 15 rows of 4 patches: divisible by 3 devices, not by 2, 4 and 8.
CONFIG = DiTConfig(
    image_size=(30, 8),
    in_channels=3,
    hidden_size=48,
    depth=3,
    num_heads=24,
    num_classes=7,
    learn_sigma=False,
)
LABELS = np.array([1, 3], np.int32)
TOLERANCE = 1e-4


def make_plan(layer_loop="scan", steps=4, solver="euler", scale=2.0, **options):
    network = Network(dataclasses.replace(CONFIG, layer_loop=layer_loop))
    process = RectifiedFlow()
    sampler = Sampler(Denoiser(network, process), make_solver(solver))
    return SamplingPlan(sampler, schedule(process, steps), scale, **options)


def draw(plan, params, labels=LABELS):
    keys = image_keys(0, np.arange(len(labels)))
    return np.asarray(plan.bind(params)(keys, labels))


def spread(plan, params, parallel, labels=LABELS):
    """Images of a plan on many devices."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # too few steps to pay
        placement = parallel.distribute(plan, batch_size=len(labels))
    return np.asarray(placement.bind(params)(image_keys(0, np.arange(len(labels))), labels))


@pytest.fixture(scope="module")
def params():
    return random_params(Network(CONFIG))


@pytest.fixture(scope="module")
def inputs():
    """Of one evaluation of 2 images."""
    return random_inputs(CONFIG)


@pytest.fixture(scope="module")
def evaluated(params, inputs):
    return np.asarray(jax.jit(Network(CONFIG).apply)(params, Request(*inputs)).out)


EXACT = [  # rows that divide evenly (3 devices) and rows that do not
    *((mode, 3, {}, "scan") for mode in ("synchronous", "ulysses", "ring", "tensor")),
    *((mode, 8, {}, "scan") for mode in ("synchronous", "ulysses", "ring", "tensor")),
    ("ring", 8, {"ulysses": 2}, "scan"),
    ("synchronous", 4, {}, "unroll"),
    ("ulysses", 4, {"ulysses": 2}, "unroll"),
    ("tensor", 4, {}, "unroll"),
    *(long(mode, 2, {}, "scan") for mode in ("synchronous", "ulysses", "ring", "tensor")),
    long("synchronous", 4, {}, "scan"),
    long("ulysses", 4, {}, "unroll"),
]


@pytest.mark.parametrize(("mode", "devices", "options", "layer_loop"), EXACT)
def test_exact_modes_are_the_single_device(
    params, inputs, evaluated, mode, devices, options, layer_loop
):
    parallel = ImageParallel(mode, patch_devices=devices, **options)
    placement = parallel.distribute(make_plan(layer_loop), batch_size=2)
    network = placement.plan.sampler.denoiser.network
    placed = placement.place(params)
    out = jax.jit(network.apply)(placed, Request(*inputs)).out
    np.testing.assert_allclose(out, evaluated, atol=TOLERANCE)
    for name in ("qkv", "proj"):
        kernel = placed["blocks"]["attn"][name]["kernel"]
        parts = devices if mode == "tensor" else 1
        assert kernel.addressable_shards[0].data.size * parts == kernel.size
    used = placement.mesh.size
    assert len(out.sharding.device_set) == used >= devices


@pytest.fixture(scope="module")
def single(params):
    """Guided images of one device."""
    return draw(make_plan(), params)


@pytest.mark.parametrize(
    ("mode", "devices", "options"),
    [
        ("synchronous", 4, {"split_guidance": True}),
        ("tensor", 3, {"split_guidance": True}),
        ("synchronous", 1, {"split_guidance": True}),
    ],
)
def test_exact_sampling_with_guidance_is_the_single_device(params, single, mode, devices, options):
    images = spread(make_plan(), params, ImageParallel(mode, patch_devices=devices, **options))
    np.testing.assert_allclose(images, single, atol=TOLERANCE)


def test_an_interval_of_guidance_and_odd_batches(params):
    plan = make_plan(guidance_interval=(0.3, 0.8))
    labels = np.array([4, 5, 6], np.int32)
    expected = draw(plan, params, labels)
    images = spread(plan, params, ImageParallel("synchronous", patch_devices=2), labels)
    np.testing.assert_allclose(images, expected, atol=TOLERANCE)


@pytest.mark.parametrize("layer_loop", ["scan", "unroll"])
def test_warming_up_all_the_way_is_synchronous_bit_for_bit(params, layer_loop):
    plan = make_plan(layer_loop)
    synchronous = spread(plan, params, ImageParallel("synchronous", patch_devices=4))
    warm = ImageParallel("displaced", patch_devices=4, warmup_steps=4)
    np.testing.assert_array_equal(spread(plan, params, warm), synchronous)
    if layer_loop == "unroll":
        return
    one_step = ImageParallel("displaced", patch_devices=4, warmup_steps=1)
    assert np.abs(spread(plan, params, one_step) - synchronous).max() > 100 * TOLERANCE


def test_a_displaced_step_with_the_state_of_its_own_input_is_exact(params, inputs, evaluated):
    placement = ImageParallel("displaced", patch_devices=4, warmup_steps=1).distribute(
        make_plan(steps=8), batch_size=2
    )
    network = placement.plan.sampler.denoiser.network
    placed = placement.place(params)

    @jax.jit
    def twice(params, x, t, conditions):
        carried, request = network.carried(2, x.shape[1:3]), Request(x, t, conditions)
        first = carried.warmup.apply(params, request.replace(carry=carried.state))
        again = network.apply(params, request.replace(carry=first.carry))
        return again.out, first.carry, again.carry

    out, state, new = twice(placed, *inputs)
    np.testing.assert_allclose(out, evaluated, atol=TOLERANCE)
    for name in ("k", "v"):
        own = state.layers[name]
        assert own.shape == (3, 2, 64, 24, 2)
        assert own.addressable_shards[0].data.shape == (3, 1, 16, 24, 2)
        np.testing.assert_allclose(new.layers[name][:, :, :60], own[:, :, :60], atol=TOLERANCE)
        # Everyone's of the first layer, gathered for the next evaluation.
        assert state.first[name].addressable_shards[0].data.shape == (1, 64, 24, 2)
        np.testing.assert_array_equal(state.first[name], own[0])
        np.testing.assert_array_equal(new.first[name], new.layers[name][0])


class Buffers:
    """DistriFusion with one Python loop over devices: for each a list of every layer's keys and
    values of all devices, its own entry fresh at once, the others' when the step is over."""

    def __init__(self, params, devices):
        network = Network(CONFIG)
        self.model = nnx.merge(network.graph(params), params)
        self.blocks = [
            nnx.merge(
                nnx.split(self.model.blocks)[0],
                jax.tree.map(lambda leaf, i=i: leaf[i], nnx.split(self.model.blocks)[1]),
            )
            for i in range(CONFIG.depth)
        ]
        rows, columns = CONFIG.grid
        own = -(-rows // devices)
        bounds = [(min(i * own, rows), min((i + 1) * own, rows)) for i in range(devices)]
        self.rows = bounds
        self.columns = columns
        self.positions = layers.sincos_position_embedding(CONFIG.hidden_size, CONFIG.grid)
        # buffers[device][layer][source]: (k, v) of what `device` has of `source`.
        self.buffers = [[[None] * devices for _ in self.blocks] for _ in range(devices)]

    def evaluate(self, x, t, labels, synchronous):
        """The output; devices one after the other, in step where `synchronous`."""
        p, sent = CONFIG.patch_size, {}
        condition = self.model._condition(t, {"label": labels})
        tokens = []
        for first, last in self.rows:
            slab = self.model.x_embedder(layers.patchify(x[:, first * p : last * p], p))
            tokens.append(slab + self.positions[None, first * self.columns : last * self.columns])
        for number, block in enumerate(self.blocks):
            if synchronous:  # first everyone's keys and values, then everyone's attention
                for device, own in enumerate(tokens):
                    block(own, condition, self._keep(device, number, sent))
                for device in range(len(tokens)):
                    for source in range(len(tokens)):
                        self.buffers[device][number][source] = sent[source, number]
            for device, own in enumerate(tokens):
                attend = self._attend(device, number, sent)
                tokens[device], _ = block(own, condition, attend)
        for (source, number), kv in sent.items():  # what was sent during the step has arrived
            for device in range(len(tokens)):
                self.buffers[device][number][source] = kv
        outs = [self.model.final_layer(own, condition) for own in tokens]
        return layers.unpatchify(jnp.concatenate(outs, axis=1), p, CONFIG.grid)

    def _keep(self, device, number, sent):
        def attention(q, k, v, state):
            sent[device, number] = (k, v)
            return einsum_attention(q, k, v), state

        return attention

    def _attend(self, device, number, sent):
        def attention(q, k, v, state):
            buffer = self.buffers[device][number]
            buffer[device] = sent[device, number] = (k, v)
            keys, values = (jnp.concatenate(part, axis=1) for part in zip(*buffer, strict=True))
            return einsum_attention(q, keys, values), state

        return attention


def slow_images(plan, params, devices, warmup_steps):
    """Images of `plan`, step by step, by `Buffers`."""
    solver, process = plan.sampler.solver, plan.sampler.denoiser.process
    scale, steps = plan.guidance_scale, len(plan.times) - 1
    buffers = Buffers(params, devices)
    keys = image_keys(0, np.arange(len(LABELS)))
    prior = jax.vmap(lambda key: jax.random.fold_in(key, 0))(keys)
    x = jax.vmap(lambda key: jax.random.normal(key, (30, 8, 3)))(prior)
    labels = jnp.concatenate([LABELS, np.full_like(LABELS, CONFIG.num_classes)])
    synchronous = False

    def denoise(x, t, carry):
        doubled = jnp.concatenate([x, x])
        x_in, t_in = process.network_inputs(doubled, jnp.broadcast_to(t, doubled.shape[:1]))
        raw = buffers.evaluate(x_in, t_in, labels, synchronous)
        conditional, unconditional = jnp.split(raw, 2)
        raw = unconditional + scale * (conditional - unconditional)
        return process.interpret(raw, x, t), carry

    state = solver.init(process, x)
    for index in range(steps):
        synchronous = index < warmup_steps
        t, s = (jnp.float32(plan.times[index + i]) for i in range(2))
        if solver.evaluations_per_step == 1:
            x, state, _ = solver.step(process, denoise, x, Step(t, s, keys, steps), state, None)
        else:  # Heun in plain words: `solver.step` traces its second evaluation
            velocity = denoise(x, t, None)[0]
            slope = process.velocity(velocity.x0, velocity.eps, t)
            end = x + (s - t) * slope
            if s > process.clean_time:
                second = denoise(end, s, None)[0]
                slope = (slope + process.velocity(second.x0, second.eps, s)) / 2
                end = x + (s - t) * slope
            x = end
    return np.asarray(x)


@pytest.mark.parametrize(
    ("layer_loop", "solver", "devices", "warmup_steps", "options"),
    [
        ("scan", "heun", 4, 1, {}),
        ("unroll", "euler", 3, 2, {"split_guidance": True}),
    ],
)
def test_displaced_is_a_slow_loop_with_a_buffer_for_every_device(
    params, layer_loop, solver, devices, warmup_steps, options
):
    plan = make_plan(layer_loop, solver=solver)
    parallel = ImageParallel(
        "displaced", patch_devices=devices, warmup_steps=warmup_steps, **options
    )
    images = spread(plan, params, parallel)
    expected = slow_images(plan, params, devices, warmup_steps)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(images / scale, expected / scale, atol=1e-5)


def test_naive_devices_see_their_own_rows_alone(params, inputs):
    plan = make_plan("unroll")
    placement = ImageParallel("naive", patch_devices=4).distribute(plan, batch_size=2)
    apply = jax.jit(placement.plan.sampler.denoiser.network.apply)
    out = np.asarray(apply(placement.place(params), Request(*inputs)).out)
    x, t, conditions = inputs
    changed = x.at[:, 8:].add(1.0)  # all but the first device's four rows of patches
    other = np.asarray(apply(placement.place(params), Request(changed, t, conditions)).out)
    np.testing.assert_array_equal(other[:, :8], out[:, :8])
    assert np.abs(other[:, 8:] - out[:, 8:]).max() > 0.05 and np.isfinite(out).all()
    # The last device's three rows, alone, as an attention among them alone.
    buffers = Buffers(params, 4)
    for layer in range(CONFIG.depth):
        for device in range(4):
            for source in range(4):
                empty = jnp.zeros((2, 0, 24, 2))
                buffers.buffers[device][layer][source] = (empty, empty)
    expected = buffers.evaluate(x, t, conditions["label"], synchronous=False)
    np.testing.assert_allclose(out, expected, atol=TOLERANCE)


ERRORS = [
    ({"mode": "pipeline", "patch_devices": 2}, "parallel='pipeline': expected one of displaced, "),
    ({"patch_devices": 0}, "patch_devices=0: expected at least 1"),
    ({"patch_devices": 1}, "patch_devices=1 splits nothing"),
    ({"patch_devices": 2, "warmup_steps": 0}, "warmup_steps=0: expected at least 1"),
    ({"mode": "ring", "patch_devices": 2, "warmup_steps": 2}, "would do nothing with parallel='r"),
    ({"patch_devices": 2, "ulysses": 2}, "ulysses_devices=2 would do nothing"),
    ({"mode": "ulysses", "patch_devices": 4, "ulysses": 3}, "does not divide patch_devices=4"),
    ({"patch_devices": 4, "warmup_steps": 5}, "warmup_steps=5 is more than the 4 steps"),
    ({"mode": "naive", "patch_devices": 9}, "patch_devices=9 needs 9 devices; there are 8"),
    (
        {"mode": "naive", "patch_devices": 5, "split_guidance": True},
        "patch_devices=5 x 2 guidance branches needs 10 devices",
    ),
    ({"mode": "ulysses", "patch_devices": 5}, "24 attention heads cannot be split over 5 Ulysses"),
    ({"mode": "tensor", "patch_devices": 5}, "24 attention heads cannot be split over patch_dev"),
    ({"mode": "naive", "patch_devices": 7}, None),
    ({"mode": "naive", "patch_devices": 6}, "Use patch_devices=5"),
]


@pytest.mark.parametrize(("options", "message"), ERRORS)
def test_what_cannot_work_is_refused(options, message):
    if message is None:  # 15 rows over 7 devices: 3 each would leave two without any
        message = "15 rows of patches do not go over 7 devices: with 3 rows each, 2 would have none"
    with pytest.raises(ValueError) as error:
        ImageParallel(**options).distribute(make_plan())
    assert message in str(error.value)


def test_networks_and_plans_that_do_not_fit_are_refused():
    parallel = ImageParallel("synchronous", patch_devices=2, split_guidance=True)
    with pytest.raises(ValueError, match="split_guidance would do nothing with a guidance scale"):
        parallel.distribute(make_plan(scale=1.0))
    network = ImageParallel("naive", patch_devices=3).distribute(make_plan())
    network = network.plan.sampler.denoiser.network
    with pytest.raises(ValueError, match="a network on many devices takes no features"):
        network.apply(None, Request(None, None, None, features=(0,)))


def test_padding_unused_devices_and_few_steps_are_said():
    plan = make_plan(steps=50)
    placement = ImageParallel("naive", patch_devices=3).distribute(plan, batch_size=3)
    unused, exchanged = placement.notes
    assert unused == "5 of 8 devices are not used: 3 images at once over groups of 3"
    assert exchanged.startswith("a device receives in one evaluation: naive 0 MiB (for comparison")
    placement = ImageParallel("naive", patch_devices=4).distribute(plan, batch_size=2)
    assert placement.mesh.shape == {"guidance": 1, "data": 2, "ulysses": 1, "ring": 4}
    assert "15 rows of patches over 4 devices: padded to 16, 4 a device" in placement.notes[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ImageParallel("displaced", patch_devices=3).distribute(plan)
    for steps, warmup, message in (
        (6, None, r"4 of 6 steps \(67%\) are synchronous, at most 33% of the .* expect images"),
        (10, 4, r"4 of 10 steps \(40%\) are synchronous, at most 60% of the communication"),
        (10, 10, r"10 of 10 steps \(100%\) are synchronous, all of them: nothing is displaced"),
    ):
        parallel = ImageParallel("displaced", patch_devices=3, warmup_steps=warmup)
        with pytest.warns(UserWarning, match=message):
            parallel.distribute(make_plan(steps=steps))

"""What the compiled program of a displaced evaluation waits for, and what it sends."""

import dataclasses

import jax
import numpy as np
import pytest

from dit_jax import sampling
from dit_jax.models import Network, Request
from dit_jax.models.dit import DiTConfig
from dit_jax.parallel.planning.program import Program
from dit_jax.parallel.sampling import ImageParallel
from dit_jax.parallel.sequence import exchanged_bytes
from dit_jax.sampling import image_keys
from tests.models.conftest import random_inputs
from tests.parallel.test_parallel_sampling import make_plan

DEVICES, BATCH = 4, 2
CONFIG = DiTConfig(
    image_size=16,
    in_channels=3,
    hidden_size=32,
    depth=3,
    num_heads=4,
    num_classes=7,
    learn_sigma=False,
)
ACTIVATION_BYTES = BATCH * 64 * 32 * 4


def place(mode, config, steps=50, **options):
    """A plan for `config` on 4 of the devices."""
    plan = make_plan(steps=steps)
    denoiser = dataclasses.replace(plan.sampler.denoiser, network=Network(config))
    sampler = dataclasses.replace(plan.sampler, denoiser=denoiser)
    devices = tuple(jax.devices()[:DEVICES])
    parallel = ImageParallel(mode, patch_devices=DEVICES, devices=devices, **options)
    return parallel.distribute(dataclasses.replace(plan, sampler=sampler), batch_size=BATCH)


def compile_evaluation(mode, layer_loop="scan", config=CONFIG, **options):
    """One evaluation on 4 of the devices, compiled but never run."""
    config = dataclasses.replace(config, layer_loop=layer_loop)
    placement = place(mode, config, **options)
    network = placement.plan.sampler.denoiser.network
    params = jax.eval_shape(network.init, jax.random.key(0))
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement.replicated),
        params,
    )

    def evaluate(params, state, x, t, conditions):
        if state is None:
            return network.apply(params, Request(x, t, conditions)).out
        result = network.apply(params, Request(x, t, conditions, carry=state))
        return result.out, result.carry

    state = jax.jit(lambda: network.carried(BATCH, config.input_size).state)()
    compiled = jax.jit(evaluate).lower(params, state, *random_inputs(config, batch=BATCH)).compile()
    return Program(compiled.as_text())


@pytest.fixture(scope="module")
def displaced():
    return {loop: compile_evaluation("displaced", loop) for loop in ("scan", "unroll")}


def is_product(instruction):
    return instruction.opcode in ("dot", "convolution") or "matmul" in instruction.text


def gathers(program):
    return [i for i in program.instructions() if i.collective == "all-gather"]


def products(program):
    return [i for i in program.instructions() if is_product(i)]


def test_no_collective_of_a_displaced_step_waits_for_its_activations(displaced):
    """But the next step's: of keys and values of its first layer, which this step makes."""
    for program in displaced.values():
        assert gathers(program) and products(program)
        waiting = [g for g in gathers(program) if program.depends_on(g, is_product)]
        assert len(waiting) == 2  # keys and values
        assert not any(user.opcode != "tuple" for g in waiting for user in users(program, g))


def users(program, instruction):
    """What takes an instruction's result, through copies and changes of shape."""
    for user in program.users(instruction):
        if user.opcode in ("copy", "bitcast", "reshape", "transpose", "fusion") or (
            user.opcode == "get-tuple-element"
        ):
            yield from users(program, user)
        else:
            yield user


def test_in_the_scan_no_layer_waits_for_the_gather_of_its_own_iteration(displaced):
    program = displaced["scan"]
    loops = [
        loop
        for loop in program.loops()
        if any(i.collective for i in program.instructions(loop.body))
    ]
    assert [loop.trip_count for loop in loops] == [CONFIG.depth - 1]
    (loop,) = loops
    inside = [i for i in gathers(program) if program.parent(i) == loop.body]
    assert len(inside) == 2  # keys and values of the next layer
    for instruction in program.instructions(loop.body):
        if is_product(instruction) or "fusion" in instruction.opcode:
            assert not program.depends_on(instruction, lambda i: i.collective is not None)


def test_synchronous_steps_do_wait():
    """The same walk finds the dependency where there is one."""
    program = compile_evaluation("synchronous")
    assert any(program.depends_on(gather, is_product) for gather in gathers(program))
    loop = next(loop for loop in program.loops() if loop.trip_count == CONFIG.depth)
    inside = program.instructions(loop.body)
    waiting = [program.depends_on(i, lambda j: j.collective is not None) for i in inside]
    assert any(waiting)


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("displaced", {}),
        ("ulysses", {}),
        ("ring", {}),
        ("ulysses", {"ulysses": 2}),
        ("naive", {}),
    ],
)
def test_bytes_are_those_of_the_formula(displaced, mode, options):
    loops = ("scan", "unroll") if mode == "displaced" else ("scan",)
    degree = options.get("ulysses", DEVICES if mode == "ulysses" else 1)
    expected = exchanged_bytes(
        mode,
        depth=CONFIG.depth,
        activation_bytes=ACTIVATION_BYTES,
        devices=DEVICES,
        ulysses=degree,
    )
    for loop in loops:
        program = displaced[loop] if mode == "displaced" else compile_evaluation(mode, **options)
        assert program.work().bytes_sent == expected
    formula = 2 * ACTIVATION_BYTES * CONFIG.depth * (DEVICES - 1) / DEVICES
    assert mode not in ("displaced", "ring") or degree > 1 or expected == formula


def test_a_whole_sampling_program_sends_nothing_else():
    """Image, noise and solver state stay split by rows from step to step."""
    steps, warmup = 10, 2
    config = dataclasses.replace(CONFIG, layer_loop="scan")
    placement = place("displaced", config, steps=steps, warmup_steps=warmup)
    sampler = placement.plan.sampler
    params = jax.jit(sampler.denoiser.network.init, out_shardings=placement.replicated)
    keys = jax.device_put(image_keys(0, np.arange(BATCH)), placement.split)
    arguments = params(jax.random.key(0)), keys, np.arange(BATCH), placement.plan.times, 2.0, None
    lowered = sampling._sample.lower(sampler, *sampler._inputs(*arguments))
    doubled = 2 * ACTIVATION_BYTES  # guidance
    expected = exchanged_bytes(
        "displaced", depth=CONFIG.depth, activation_bytes=doubled, devices=DEVICES
    )
    # A step of the warm-up also gathers the first layer's for the step that follows.
    expected *= steps + warmup / CONFIG.depth
    assert Program(lowered.compile().as_text()).work().bytes_sent == pytest.approx(expected)

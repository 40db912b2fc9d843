"""DMD2, f-distill and LADD on the mixture: an MLP trained by denoising, students that start from
it, and the distance that their samples reach."""

import functools

import jax
import optax

from dit_jax.denoiser import Denoiser
from dit_jax.diffusion import NoWeight, RectifiedFlow, Uniform
from dit_jax.diffusion.samplers import make_solver
from dit_jax.distill.adversarial import Adversary
from dit_jax.distill.discriminator import Discriminator
from dit_jax.distill.few_step import FewSteps
from dit_jax.training.denoising import Denoising
from tests.distill import mixture as bench

PROCESS = RectifiedFlow(network_convention="flux")
TIMESTEPS = Uniform(PROCESS)


@functools.cache
def mlp_denoiser():
    """(denoiser, parameters) of an MLP trained on the mixture."""
    denoiser = Denoiser(bench.MlpNetwork(), PROCESS)
    rate = optax.cosine_decay_schedule(3e-3, 1500)
    method = Denoising(denoiser, TIMESTEPS, NoWeight(), optax.adam(rate))
    state, _ = bench.train(method, steps=1500)
    return denoiser, state.params


@functools.cache
def undistilled():
    """Distance of one step of the exact denoiser."""
    return bench.undistilled_distance(PROCESS)


def few_steps(times=(1.0, 0.0), solver="consistency", inputs="data"):
    return FewSteps(PROCESS, make_solver(solver), times, inputs)


def adversary(indices=(1,), features_of="fake_score", learning_rate=2e-3, beta1=0.9, **options):
    shapes = tuple(bench.MlpNetwork().feature_shapes[i] for i in indices)
    optimizer = optax.adam(learning_rate, b1=beta1)
    heads = Discriminator("transformer", shapes)
    return Adversary(heads, indices, optimizer, features_of, **options)


def parts(*, steps, frequency=5, learning_rate=2e-3, num_microbatches=1, **schedule):
    """Fields of a method whose teacher is exact, and whose players are MLPs."""
    return {
        "student": bench.mlp_student(
            PROCESS,
            learning_rate=learning_rate,
            steps=steps // frequency,
            num_microbatches=num_microbatches,
        ),
        "teacher": bench.exact_teacher(PROCESS),
        "steps": few_steps(**schedule),
        "timesteps": TIMESTEPS,
        "student_update_frequency": frequency,
    }


def reached(method, *, steps, batch_size=256):
    """(distance of the trained student's samples from the data, its last metrics)."""
    _, params = mlp_denoiser()
    # The exact teacher reads no parameters: these are what the fake score starts from.
    state, metrics = bench.train(
        method, steps=steps, batch_size=batch_size, params=params, frozen={"teacher": params}
    )
    assert all(jax.numpy.isfinite(value) for part in metrics.values() for value in part.values())
    points = bench.sample_points(
        method.student.denoiser,
        method.weights(state)["ema_0.99"],
        solver="euler" if type(method.steps.solver).__name__ == "Euler" else "consistency",
        times=method.steps.times,
    )
    return bench.sliced_wasserstein(points, bench.data_points()), metrics

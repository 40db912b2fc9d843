"""The bench itself: the exact teacher samples its mixture, and one step does not."""

import jax
import pytest

from dit_jax.diffusion import DDPM, EDM, RectifiedFlow
from dit_jax.models import Request
from tests.distill import mixture as bench

PROCESSES = {
    "edm": EDM(),
    "flow": RectifiedFlow(network_convention="flux"),
    "ddpm": DDPM(),
}


@pytest.mark.parametrize("name", PROCESSES)
def test_exact_teacher_samples_the_mixture(name):
    process = PROCESSES[name]
    teacher = bench.exact_teacher(process)
    points = bench.sample_points(teacher.denoiser, {}, solver="heun", steps=40)
    reached = bench.sliced_wasserstein(points, bench.data_points())
    floor = bench.sliced_wasserstein(bench.data_points(seed=3), bench.data_points())
    assert reached < 0.04
    assert floor < 0.03
    assert bench.undistilled_distance(process) > 5 * reached


def test_class_conditional_teacher_and_guidance():
    teacher = bench.exact_teacher(EDM(), conditional=True)
    points = bench.sample_points(teacher.denoiser, {}, solver="heun", steps=20)
    assert bench.sliced_wasserstein(points, bench.data_points()) < 0.04
    guided = bench.exact_teacher(EDM(), conditional=True, guidance_scale=2.0)
    x = jax.random.normal(jax.random.key(0), (8, 1, 1, 2))
    t = jax.numpy.full(8, 0.8)
    conditions = {"label": jax.numpy.arange(8) % 3}
    with_class = teacher.predict({}, Request(x, t, conditions)).x0
    without = teacher.predict({}, Request(x, t, {"label": jax.numpy.full(8, 3)})).x0
    expected = without + 2.0 * (with_class - without)
    assert jax.numpy.abs(guided.predict({}, Request(x, t, conditions)).x0 - expected).max() < 1e-5

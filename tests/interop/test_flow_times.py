import diffusers
import numpy as np
import pytest
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from dit_jax.interop.schedulers import (
    FlowTimes,
    flow_times_from_scheduler,
    flow_times_to_scheduler,
)
from dit_jax.interop.tensors import InteropError

KINDS = {
    "dev": {"use_dynamic_shifting": True, "shift": 3.0},
    "other line": {"use_dynamic_shifting": True, "base_shift": 0.3, "max_image_seq_len": 2048},
    "static": {"shift": 3.0},
    "schnell": {},
}


@pytest.mark.parametrize("kind", KINDS)
def test_times_are_the_sigmas_of_diffusers(kind):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**KINDS[kind])
    times = flow_times_from_scheduler(
        dict(scheduler.config, _class_name=type(scheduler).__name__), ""
    )
    line = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    for tokens in (16, 256, 1560, 4096, 9216):
        mu = calculate_shift(tokens, *(scheduler.config[name] for name in line))
        for steps in (1, 4, 28, 50):
            scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
            found = times(steps, tokens)
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, scheduler.sigmas.numpy(), rtol=0, atol=1e-6)
        own = [1.0, 0.7, 0.1]
        scheduler.set_timesteps(sigmas=own, mu=mu)
        shifted = times.shifted(own, tokens)
        np.testing.assert_allclose(shifted, scheduler.sigmas.numpy(), rtol=0, atol=1e-6)
    assert flow_times_from_scheduler(flow_times_to_scheduler(times), "") == times


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"_class_name": "DDIMScheduler"}, "describes 'DDIMScheduler'; expected a FlowMatchEuler"),
        ({"invert_sigmas": True}, "invert_sigmas=True is not known here"),
        ({"time_shift_type": "linear"}, "time_shift_type='linear' is not known here"),
        ({"num_train_timesteps": 100}, "num_train_timesteps=100; FLUX is told 1000 t"),
        ({"shift": 0}, "shift=0; expected a number above 0"),
        ({"shift": "x"}, "shift='x'; expected a finite number"),
    ],
)
def test_other_schedulers_are_refused(values, message):
    values = {"_class_name": "FlowMatchEulerDiscreteScheduler", **values}
    with pytest.raises(InteropError, match=message):
        flow_times_from_scheduler(values, "here")


def test_sigmas_that_do_not_fall_are_errors():
    for sigmas in ([], [0.5, 0.6], [1.1, 0.5], [1.0, 0.0]):
        with pytest.raises(ValueError, match="numbers that fall"):
            FlowTimes().shifted(sigmas, 16)

import numpy as np
import pytest

from dit_jax.diffusion import DDPM, EDM, SPACINGS, RectifiedFlow, schedule


@pytest.mark.parametrize("steps", [2, 3, 7, 250, 999, 1000])
def test_iddpm_spacing_keeps_the_original_indices(steps):
    position, expected = 0.0, []
    for _ in range(steps):
        expected.append(round(position))
        position += 999 / (steps - 1)
    times = schedule(DDPM(), steps)
    assert times.tolist() == [*reversed(expected), -1]
    assert times.dtype == np.float32


def test_ddim_spacing_is_a_whole_stride():
    assert schedule(DDPM(), 50, "ddim").tolist() == [*range(980, -1, -20), -1]
    with pytest.raises(ValueError, match="no whole stride that visits 350 of 1000 timesteps: the"):
        schedule(DDPM(), 350, "ddim")
    with pytest.raises(ValueError, match="334 and 500 steps"):
        schedule(DDPM(), 400, "ddim")


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [4, 10, 30, 64])
def test_spacings_of_diffusers(spacing, steps):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(1000, timestep_spacing=spacing, steps_offset=1)
    scheduler.set_timesteps(steps)
    options = {"offset": 1} if spacing == "leading" else {}
    times = schedule(DDPM(), steps, spacing, **options)
    assert times.tolist() == [*scheduler.timesteps.tolist(), -1]


def test_flow_is_uniform_then_shifted():
    np.testing.assert_allclose(schedule(RectifiedFlow(), 4), [1, 0.75, 0.5, 0.25, 0])
    t = np.array([1, 0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose(
        schedule(RectifiedFlow(), 4, shift=3.0), 3 * t / (1 + 2 * t), rtol=1e-6
    )


def test_karras_spacing():
    steps = np.arange(18)
    expected = (80 ** (1 / 7) + steps / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(schedule(EDM(), 18), [*expected, 0], rtol=1e-6)
    np.testing.assert_allclose(schedule(EDM(), 1), [80, 0], rtol=1e-6)
    process = DDPM()
    times = schedule(process, 10, "karras", rho=5.0)
    ratio = np.exp(np.interp(times[:-1], np.arange(1000), process.tables.log_sigma_ratio))
    np.testing.assert_allclose(np.diff(ratio**0.2), np.diff(ratio**0.2)[0], rtol=1e-3)
    assert times[0] == 999 and abs(times[-2]) < 1e-5 and times[-1] == -1


@pytest.mark.parametrize(
    "process", [DDPM(), RectifiedFlow(), EDM()], ids=lambda p: type(p).__name__
)
def test_every_schedule_descends_to_clean_data(process):
    for spacing in SPACINGS[type(process)]:
        for steps in (1, 2, 5, 8, 40):
            if steps == 1 and spacing in ("iddpm", "linspace"):
                continue
            times = schedule(process, steps, spacing)
            assert times.shape == (steps + 1,) and (np.diff(times) < 0).all()
            assert times[-1] == process.clean_time and times[0] <= np.float32(process.noise_time)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((DDPM(), 0), "at least one step, got steps=0"),
        ((EDM(), -3), "at least one step, got steps=-3"),
        ((DDPM(), 1001), "built with 1000 timesteps, and a schedule cannot visit 1001 of them"),
        ((DDPM(), 1, "iddpm"), "use 'trailing'"),
        ((DDPM(), 10, "uniform"), "DDPM has no spacing 'uniform': expected one of iddpm, ddim"),
        ((EDM(), 10, "trailing"), "EDM has no spacing 'trailing': expected one of karras"),
    ],
)
def test_errors_say_what_to_do(arguments, message):
    with pytest.raises(ValueError) as error:
        schedule(*arguments)
    assert message in str(error.value)


def test_options_without_meaning_are_refused():
    with pytest.raises(ValueError, match=r"shift=3.0 has no meaning for DDPM's spacing 'iddpm'"):
        schedule(DDPM(), 10, shift=3.0)
    with pytest.raises(ValueError, match=r"rho=5.0 has no meaning"):
        schedule(RectifiedFlow(), 10, rho=5.0)
    with pytest.raises(ValueError, match="use a smaller offset"):
        schedule(DDPM(), 10, "leading", offset=200)
    with pytest.raises(ValueError, match=r"shift > 0 and rho > 0, got shift=0.0"):
        schedule(RectifiedFlow(), 10, shift=0.0)

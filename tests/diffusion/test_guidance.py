import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.diffusion import DDPM, EDM, guided

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(3, 2, 2, 4)), jnp.float32)
T = jnp.float32(5.0)
LABELS, NULLS = {"label": jnp.array([1, 2, 3])}, {"label": jnp.array([9, 9, 9])}


def raw(x, t, conditions, carry):
    """A network of 4 prediction and 4 variance channels; the carry collects batch sizes."""
    label = conditions["label"].astype(jnp.float32)[:, None, None, None]
    t = jnp.broadcast_to(t, x.shape[:1])[:, None, None, None]
    out = jnp.sin(x * label + 0.01 * t)
    carry = None if carry is None else carry + label.sum()
    return jnp.concatenate([out, jnp.cos(3 * out)], -1), carry


def both(t=T):
    return raw(X, t, LABELS, None)[0], raw(X, t, NULLS, None)[0]


def test_guides_the_prediction_and_keeps_the_conditional_variance():
    conditional, null = both()
    out, _ = guided(raw, NULLS, 2.5)(X, T, LABELS, None)
    mixed = null + 2.5 * (conditional - null)
    np.testing.assert_allclose(out[..., :4], mixed[..., :4], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(out[..., 4:], conditional[..., 4:])
    plain, _ = guided(raw, NULLS, 1.0)(X, T, LABELS, None)
    np.testing.assert_allclose(plain, conditional, atol=1e-6)


def test_first3_guides_three_channels_as_the_original_does():
    conditional, null = both()
    out, _ = guided(raw, NULLS, 4.0, channels="first3")(X, T, LABELS, None)
    np.testing.assert_allclose(
        out[..., :3], (null + 4.0 * (conditional - null))[..., :3], rtol=1e-5, atol=1e-5
    )
    np.testing.assert_array_equal(out[..., 3:], conditional[..., 3:])


def test_scales_and_times_of_each_example():
    t, scale = jnp.array([1.0, 20.0, 300.0]), jnp.array([1.0, 2.0, 7.0])
    conditional, null = both(t)
    out, _ = guided(raw, NULLS, scale)(X, t, LABELS, None)
    mixed = null + scale[:, None, None, None] * (conditional - null)
    np.testing.assert_allclose(out[..., :4], mixed[..., :4], rtol=1e-5, atol=1e-5)
    # An interval per example.
    out, _ = guided(raw, NULLS, scale, interval=(10.0, 100.0))(X, t, LABELS, None)
    np.testing.assert_allclose(
        out[1], guided(raw, NULLS, scale)(X, t, LABELS, None)[0][1], atol=1e-6
    )
    for example in (0, 2):
        np.testing.assert_allclose(out[example], conditional[example], atol=1e-6)


def test_interval_skips_the_unconditional_half_outside():
    sizes = []

    def counting(x, t, conditions, carry):
        jax.debug.callback(lambda n: sizes.append(int(n)), x.shape[0])
        return raw(x, t, conditions, carry)

    traces = []

    @jax.jit
    def compiled(t, low, high, scale):
        traces.append(t)
        return guided(counting, NULLS, scale, interval=(low, high))(X, t, LABELS, None)[0]

    for t, inside in ((9.9, False), (10.0, True), (20.0, True), (20.1, False)):
        sizes.clear()
        out = compiled(t, 10.0, 20.0, 3.0)
        jax.effects_barrier()
        assert sizes == [6 if inside else 3]
        conditional, null = both(t)
        expected = null + 3.0 * (conditional - null) if inside else conditional
        np.testing.assert_allclose(out[..., :4], expected[..., :4], rtol=1e-5, atol=1e-5)
    compiled(1.0, 0.5, 2.0, 8.0)
    assert len(traces) == 1


def test_a_carry_sees_both_halves_inside_and_outside_the_interval():
    wrapped = guided(raw, NULLS, 3.0, interval=(10.0, 20.0))
    inside, carry = wrapped(X, jnp.float32(15.0), LABELS, jnp.zeros(()))
    assert carry == 6 + 27
    outside, carry = wrapped(X, T, LABELS, carry)
    assert carry == 2 * (6 + 27)
    np.testing.assert_allclose(outside, both()[0], atol=1e-6)
    np.testing.assert_allclose(
        inside, guided(raw, NULLS, 3.0)(X, jnp.float32(15.0), LABELS, None)[0], atol=1e-6
    )


@pytest.mark.parametrize("process", [DDPM(), EDM()], ids=lambda p: type(p).__name__)
def test_guiding_raw_outputs_is_guiding_x0(process):
    t = jnp.float32(3.0)
    conditional, null = (out[..., :4] for out in both(t))
    out, _ = guided(lambda *a: (raw(*a)[0][..., :4], None), NULLS, 2.0)(X, t, LABELS, None)
    expected = [process.interpret(value, X, t).x0 for value in (conditional, null)]
    expected = expected[1] + 2.0 * (expected[0] - expected[1])
    np.testing.assert_allclose(process.interpret(out, X, t).x0, expected, atol=1e-4)


def test_low_precision_outputs_keep_their_dtype():
    def low(x, t, conditions, carry):
        out, carry = raw(x, t, conditions, carry)
        return out.astype(jnp.bfloat16), carry

    out, _ = guided(low, NULLS, 2.0)(X, T, LABELS, None)
    assert out.dtype == jnp.bfloat16
    out, _ = guided(low, NULLS, 2.0, interval=(1.0, 9.0))(X, T, LABELS, None)
    assert out.dtype == jnp.bfloat16


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="Unknown guidance channels 'first4': expected 'all' or"):
        guided(raw, NULLS, 2.0, channels="first4")
    with pytest.raises(ValueError, match=r"is \(low, high\) in the process's time"):
        guided(raw, NULLS, 2.0, interval=(1.0,))
    with pytest.raises(ValueError, match=r"one per example, shape \(3,\); got shape \(2,\)"):
        guided(raw, NULLS, jnp.ones(2))(X, T, LABELS, None)

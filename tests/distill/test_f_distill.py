"""f-distill: weights from f itself, the histogram and its state, the mixture, what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from dit_jax.config import ConfigError
from dit_jax.diffusion import EDM
from dit_jax.distill.f_distill import (
    DIVERGENCES,
    FDistill,
    RatioHistogram,
    density_ratio,
    weights_of,
)
from dit_jax.experiment import build_method, resolve_config
from tests.distill import few_step_bench as few
from tests.distill.test_dmd2 import draw, small_config
from tests.long import long
from tests.references import torch_dmd2


def create(*, steps=2000, num_microbatches=1, **options):
    return FDistill(
        **few.parts(steps=steps, num_microbatches=num_microbatches),
        fake_score_optimizer=optax.adam(2e-3),
        adversary=few.adversary(),
        gan_weight=0.001,
        **{"histogram": RatioHistogram(few.PROCESS), **options},
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_weights_are_second_derivatives_of_f(divergence):
    ratio = jnp.exp(jnp.linspace(-2.0, 2.0, 9))
    expected = torch_dmd2.divergence_weight(torch.from_numpy(np.array(ratio)), divergence).numpy()
    # Constant factors of f are lost in the normalisation, as in the paper.
    expected = expected / expected.mean()
    np.testing.assert_allclose(weights_of(ratio, divergence), expected, rtol=1e-5)


def test_density_ratio_is_clipped_and_of_the_mean_logit():
    logits = jnp.array([[1.0, 2.0], [30.0, 40.0], [-30.0, -40.0], [-0.5, 0.5]])
    found = density_ratio(logits, 0.1, 20.0)
    np.testing.assert_allclose(found, [np.exp(1.5), 20.0, 0.1, 1.0], rtol=1e-6)


def test_histogram_keeps_an_average_where_there_are_examples():
    histogram = RatioHistogram(EDM(), bins=4, decay=0.5)
    t = jnp.array([0.002, 10.0, 25.0, 79.9, 80.0])
    np.testing.assert_array_equal(histogram.index(t), [0, 0, 1, 3, 3])
    ratio = jnp.array([1.0, 3.0, 4.0, 2.0, 6.0])
    count, total = histogram.count(ratio, t)
    np.testing.assert_allclose(count, [2, 1, 0, 2])
    means = histogram.update(histogram.init(), count, total)
    np.testing.assert_allclose(means, [1.5, 2.5, 1.0, 2.5], rtol=1e-5)
    found = histogram.normalise(ratio, t, means)
    np.testing.assert_allclose(found, ratio / means[jnp.array([0, 0, 1, 3, 3])], rtol=1e-5)


def test_histogram_is_state_and_scale_reaches_the_loss():
    method = create(histogram=RatioHistogram(few.PROCESS, 5, 0.9), divergence="kl")
    _, params = few.mlp_denoiser()
    frozen = {"teacher": params}
    state = jax.jit(method.init)(jax.random.key(0), params, frozen)
    np.testing.assert_array_equal(state.players["ratio"].params["means"], np.ones(5))
    assert jax.tree.structure(jax.eval_shape(method.init, jax.random.key(0))) == (
        jax.tree.structure(state)
    )
    batch = {"image": 0.3 * jax.random.normal(jax.random.key(1), (32, 1, 1, 2))}
    update = jax.jit(method.update, static_argnums=4)
    new, metrics = update(state, batch, jax.random.key(2), frozen, "student")
    assert np.abs(new.players["ratio"].params["means"] - 1).max() > 0
    assert all(value.shape == () for value in metrics.values())
    np.testing.assert_allclose(metrics["h_mean"], 1, rtol=1e-4)
    assert metrics["h_min"] < 1 < metrics["h_max"]
    after, _ = update(new, batch, jax.random.key(3), frozen, "critic")
    means = [state.players["ratio"].params["means"] for state in (new, after)]
    np.testing.assert_array_equal(*means)
    # The sums over microbatches are those of the whole batch.
    split = create(
        num_microbatches=4, histogram=RatioHistogram(few.PROCESS, 5, 0.9), divergence="kl"
    )
    update_in_parts = jax.jit(split.update, static_argnums=4)
    parts, _ = update_in_parts(state, batch, jax.random.key(2), frozen, "student")
    np.testing.assert_allclose(
        parts.players["ratio"].params["means"], new.players["ratio"].params["means"], rtol=1e-5
    )
    # DMD2 is the reverse Kullback-Leibler divergence.
    examples = draw(method, batch, jax.random.key(2), "student")
    players = {name: player.params for name, player in state.players.items()}
    rkl = dataclasses.replace(method, divergence="rkl", histogram=None)
    plain = super(FDistill, rkl).scale_of(None, examples, players)[0]
    assert plain is None
    losses = [
        jax.jit(m.student_loss)(params, examples, frozen, players)[1]["vsd"] for m in (rkl, method)
    ]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("divergence", ["kl", long("js")])
def test_learns_the_mixture(divergence):
    distance, _ = few.reached(create(divergence=divergence), steps=2000, batch_size=128)
    assert distance < 0.105
    assert few.undistilled() > 5 * distance


def test_builds_from_a_config():
    changes = {"method.name": "f_distill", "method.f_distill.ratio_bins": 7}
    config = resolve_config(small_config(**changes))
    method = build_method(config)
    assert isinstance(method, FDistill)
    assert method.histogram.bins == 7
    changes = {"method.name": "f_distill", "method.f_distill.ratio_normalization": False}
    config = resolve_config(small_config(**changes))
    assert build_method(config).histogram is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method.f_distill.divergence": "tv"}, "js"),
        ({"method.f_distill.gan_weight": 0.0}, "density ratio"),
        (
            {"method.f_distill.ratio_lower": 30.0},
            "expected below config.method.f_distill.ratio_upper",
        ),
        ({"method.f_distill.ratio_bins": 0}, "at least 1"),
        (
            {
                "method.f_distill.ratio_normalization": False,
                "method.f_distill.ratio_decay": 0.5,
            },
            "would do nothing",
        ),
        ({"method.f_distill.divergence": "rkl", "method.f_distill.ratio_upper": 5.0}, "alike"),
        ({"training.batch_size": 4, "training.num_microbatches": 4}, "fewer than 2"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(ConfigError, match=message):
        resolve_config(small_config(**{"method.name": "f_distill", **changes}))

"""edm_augmentation.npz holds what NVlabs' training/augment.py made of random images: their random
numbers (recorded, with p = 0.7 and multipliers 1; an extreme scale makes it reflect images as far
as possible, as we always do), results and labels."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.data.augmentation import Augmentation

DATA = Path(__file__).parents[1] / "references" / "data" / "edm_augmentation.npz"
ALL = ("xflip", "yflip", "rotate_int", "translate_int", "scale", "rotate_frac", "aniso",
       "translate_frac", "brightness", "contrast", "lumaflip", "hue", "saturation")  # fmt: skip
KINDS = {
    "all": ALL,
    "cifar": (*ALL[:2], *ALL[4:8]),
    "color": ALL[8:],
    "grey": ALL[8:],
    "pixel": ALL[:4],
}


def of(names, **options):
    return Augmentation(**{name: float(name in names) for name in ALL}, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_results_are_the_originals(kind):
    stored = np.load(DATA)
    draws = {name: jnp.asarray(stored[f"{kind}.draw.{name}"]) for name in KINDS[kind]}
    apply = jax.jit(jax.vmap(of(KINDS[kind]).apply))
    images, labels = apply(draws, jnp.asarray(stored[f"{kind}.images"]))
    np.testing.assert_allclose(labels, stored[f"{kind}.labels"], atol=1e-6)
    tolerance = 1e-5 if kind in ("color", "grey", "pixel") else 1e-3
    np.testing.assert_allclose(images, stored[f"{kind}.result"], atol=tolerance, rtol=0)


def test_an_image_depends_on_its_own_key_alone():
    augment = jax.jit(of(ALL, probability=0.8))
    keys = jax.random.split(jax.random.key(0), 6)
    images = jax.random.uniform(jax.random.key(1), (6, 8, 8, 3))
    out, labels = augment(keys, images)
    alone, its_labels = augment(keys[2:4], images[2:4])
    np.testing.assert_allclose(alone, out[2:4], atol=1e-5)
    np.testing.assert_allclose(its_labels, labels[2:4], atol=1e-6)
    assert len({tuple(row) for row in np.asarray(labels).round(4).tolist()}) == 6


def test_probabilities_and_ranges_of_the_draws():
    n, p = 20_000, 0.3
    augmentation = of(ALL, probability=p)
    draws = jax.jit(jax.vmap(augmentation.draw))(jax.random.split(jax.random.key(3), n))
    draws = {name: np.asarray(value) for name, value in draws.items()}
    made = {name: value if value.ndim == 1 else value[:, 0] for name, value in draws.items()}
    share = {"xflip": p / 2, "yflip": p / 2, "lumaflip": p / 2, "rotate_int": 3 * p / 4}
    for name, value in made.items():
        assert abs((value != 0).mean() - share.get(name, p)) < 0.015, name
        if name in ("rotate_frac", "hue"):
            assert 3.0 < value.max() <= np.pi and -np.pi <= value.min() < -3.0
        elif name == "translate_int":
            assert 0.95 < value.max() <= 1 and -1 <= value.min() < -0.95
        elif name not in share:
            assert abs(value[value != 0].std() - 1) < 0.04, name
    assert abs((draws["aniso"][:, 1] != 0).mean() - 0.5) < 0.015
    assert {*draws["rotate_int"].tolist()} == {0, 1, 2, 3}
    independent = np.corrcoef(np.stack(list(made.values())))
    assert np.abs(independent - np.eye(len(made))).max() < 0.04


def test_defaults_are_those_of_the_published_runs():
    augmentation = Augmentation(probability=0.12)
    assert augmentation.label_dim == 9
    keys = jax.random.split(jax.random.key(0), 4000)
    draws = jax.jit(jax.vmap(augmentation.draw))(keys)
    assert abs(float(draws["xflip"].mean()) - 0.5) < 0.03  # a coin whatever the probability
    assert abs(float((draws["scale"] != 0).mean()) - 0.12) < 0.02


def test_images_left_alone_have_zero_labels_and_keep_their_content():
    augmentation = of(KINDS["cifar"], probability=0.0)
    smooth = jnp.sin(jnp.arange(16) / 4)
    images = jnp.broadcast_to(smooth[None, :, None, None], (2, 16, 16, 3))
    out, labels = augmentation(jax.random.split(jax.random.key(0), 2), images)
    assert not labels.any()
    np.testing.assert_allclose(out, images, atol=0.05)  # the filters' own loss


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({"probability": 1.5}, None, "augmentation.probability=1.5: expected 0 to 1"),
        ({"scale_std": -1.0}, None, "augmentation.scale_std=-1.0: expected 0 or more"),
        ({name: 0.0 for name in ALL}, None, "every multiplier is 0"),
        ({"rotate_int": 1.0}, (1, 8, 4, 3), "needs square images"),
        ({"hue": 1.0}, (1, 8, 8, 4), "1 or 3 channels, not 4"),
    ],
)
def test_mistakes_are_refused(options, shape, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**options)(jax.random.split(jax.random.key(0), 1), jnp.zeros(shape))

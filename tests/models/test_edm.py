import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dit_jax.diffusion import EDM
from dit_jax.models import Network, Request, edm_layers
from dit_jax.models.edm import DhariwalUNetConfig, SongUNetConfig
from tests.references import torch_edm
from tests.references.torch_edm_params import from_torch

SMALL = {"image_size": 8, "num_classes": 7, "augment_dim": 9, "dropout": 0.2}
DDPMPP = SongUNetConfig(
    **SMALL, model_channels=32, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,)
)
NCSNPP = dataclasses.replace(
    DDPMPP,
    embedding_type="fourier",
    channel_mult_noise=2,
    encoder_type="residual",
    resample_filter=(1, 3, 3, 1),
)
ADM = DhariwalUNetConfig(
    **SMALL, model_channels=64, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(8, 4)
)
CONFIGS = {
    "DDPM++": DDPMPP,
    "NCSN++": NCSNPP,
    "ADM": ADM,
    "skip": dataclasses.replace(NCSNPP, encoder_type="skip", decoder_type="skip"),
    "unconditional, two blocks": dataclasses.replace(
        DDPMPP, num_classes=0, augment_dim=0, in_channels=1, num_blocks=2
    ),
    "variance, one resolution": dataclasses.replace(ADM, learn_sigma=True, channel_mult=(1,)),
}
SMALLEST = {"image_size": 4, "channel_mult": (1,), "attn_resolutions": (4,)}
TINY = dataclasses.replace(DDPMPP, **SMALLEST)


def inputs(config, batch=3, seed=1):
    """(x, t, conditions), every condition the network takes."""
    random = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    conditions = {}
    if config.num_classes:
        labels = [0, config.num_classes, config.num_classes - 1]
        conditions["label"] = jnp.asarray(np.resize(labels, batch), jnp.int32)
    if config.augment_dim:
        conditions["augment"] = normal(batch, config.augment_dim)
    if config.second_time != "none":
        conditions["r"] = normal(batch)
    return normal(batch, *config.input_size, config.in_channels), normal(batch), conditions


@functools.lru_cache(maxsize=4)
def pair(config):
    """(PyTorch twin, our network, our parameters)."""
    twin = torch_edm.randomise(torch_edm.UNet(config))
    width = config.noise_channels if config.second_time != "none" else None
    params = jax.tree.map(jnp.asarray, from_torch(twin.state_dict(), noise_channels=width))
    return twin, Network(config), params


def to_torch(x):
    x = torch.from_numpy(np.array(x))
    return x.permute(0, 3, 1, 2) if x.ndim == 4 else x


def of_twin(twin, config, x, t, conditions):
    """Output and feature maps of the twin, channels last."""
    one_hot = None
    if config.num_classes:
        one_hot = np.eye(config.num_classes + 1)[conditions["label"]][:, :-1]
        one_hot = to_torch(one_hot.astype(x.dtype))
    augment = to_torch(conditions["augment"]) if "augment" in conditions else None
    second = conditions.get("r")
    if config.second_time == "t-r":
        second = t - second
    with torch.no_grad():
        out, maps = twin(
            to_torch(x), to_torch(t), one_hot, augment, None if second is None else to_torch(second)
        )
    return [a.permute(0, 2, 3, 1).numpy() for a in (out, *maps)]


def assert_same(found, expected, tolerance=1e-4):
    assert expected.std() > 0.1
    np.testing.assert_allclose(found, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_output_and_features_match_the_twin(name):
    config = CONFIGS[name]
    twin, network, params = pair(config)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    x, t, conditions = inputs(config)
    indices = tuple(range(len(config.channel_mult)))
    result = jax.jit(network.apply)(params, Request(x, t, conditions, features=indices))
    out, maps = result.out, result.features
    expected = of_twin(twin, config, x, t, conditions)
    assert_same(out, expected[0])
    assert tuple(a.shape[1:] for a in maps) == network.feature_shapes
    for found, wanted in zip(maps, expected[1:], strict=True):
        assert_same(found, wanted)


@pytest.mark.parametrize(
    ("name", "second_time"), [("DDPM++", "r"), ("NCSN++", "t-r"), ("ADM", "r")]
)
def test_second_time_is_a_concatenation_of_features(name, second_time):
    config = dataclasses.replace(CONFIGS[name], second_time=second_time)
    twin, network, params = pair(config)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    x, t, conditions = inputs(config)
    apply = jax.jit(lambda params, *inputs: network.apply(params, Request(*inputs)).out)
    found = apply(params, x, t, conditions)
    assert_same(found, of_twin(twin, config, x, t, conditions)[0])
    without = {name: value for name, value in conditions.items() if name != "r"}
    same = apply(params, x, t, {**without, "r": t})
    np.testing.assert_allclose(apply(params, x, t, without), same, atol=1e-5)


@pytest.mark.parametrize("name", ["DDPM++", "ADM"])
def test_fresh_second_time_changes_nothing(name):
    known = dataclasses.replace(CONFIGS[name], **SMALLEST)
    config = dataclasses.replace(known, second_time="r")
    _, teacher, params = pair(known)
    student = Network(config)
    fresh = student.init(jax.random.key(1))
    started = {**fresh, **params}
    assert set(fresh) - set(params) == {"map_second_time"}
    x, t, conditions = inputs(config)
    without = {key: value for key, value in conditions.items() if key != "r"}
    np.testing.assert_array_equal(
        jax.jit(student.apply)(started, Request(x, t, conditions)).out,
        jax.jit(teacher.apply)(params, Request(x, t, without)).out,
    )
    loss = jax.jit(
        jax.grad(lambda p: jnp.sum(student.apply(p, Request(x, t, conditions)).out ** 2))
    )
    assert float(jnp.abs(loss(started)["map_second_time"]["layer0"]["kernel"]).max()) > 0


def test_an_absent_augmentation_stands_for_none():
    _, network, params = pair(TINY)
    x, t, conditions = inputs(TINY)
    label = {"label": conditions["label"]}
    none = {**label, "augment": jnp.zeros((3, 9))}
    absent, zeros = (jax.jit(network.apply)(params, Request(x, t, c)).out for c in (label, none))
    np.testing.assert_allclose(absent, zeros, atol=1e-5)


@pytest.mark.parametrize("kind", ["edm", "vp", "ve", "iddpm"])
@pytest.mark.parametrize("name", ["DDPM++"])
def test_denoised_images_match_the_twin(name, kind):
    config = CONFIGS[name]
    twin, network, params = pair(config)
    sigma = torch_edm.iddpm_levels()[[990, 600, 200]].astype("f")
    process = EDM(preconditioning=kind, sigma_min=0.03)
    x, _, conditions = inputs(config)
    x = x * jnp.asarray(sigma)[:, None, None, None]
    x_in, t_in = process.network_inputs(x, jnp.asarray(sigma))
    raw = jax.jit(network.apply)(params, Request(x_in, t_in, conditions)).out
    found = process.interpret(raw, x, jnp.asarray(sigma)).x0

    skip, out, scale, noise = (
        a.astype("f") for a in torch_edm.coefficients(kind, sigma.astype("d"))
    )
    spread = [a[:, None, None, None] for a in (skip, out, scale)]
    raw = of_twin(twin, config, np.asarray(x) * spread[2], noise, conditions)[0]
    expected = spread[0] * np.asarray(x) + spread[1] * raw
    error = np.abs(found - expected) / np.maximum(1, spread[1])  # of outputs of size sigma
    assert error.max() < 1e-4


@pytest.mark.parametrize("name", ["DDPM++", "ADM"])
def test_bfloat16_stays_close(name):
    _, network, params = pair(CONFIGS[name])
    half = Network(dataclasses.replace(CONFIGS[name], dtype="bfloat16"))
    x, t, conditions = inputs(CONFIGS[name])
    result = jax.jit(half.apply)(params, Request(x, t, conditions, features=(0,)))
    out, maps = result.out, result.features
    exact = jax.jit(network.apply)(params, Request(x, t, conditions)).out
    assert out.dtype == jnp.float32 and maps[0].dtype == jnp.bfloat16
    error = float(jnp.abs(out - exact).mean() / exact.std())
    assert 1e-4 < error < 0.03


@pytest.mark.parametrize("remat", ["activations", "block", "dots"])
def test_rematerialisation_changes_no_gradient(remat):
    _, network, params = pair(TINY)
    other = Network(dataclasses.replace(TINY, remat=remat))
    x, t, conditions = inputs(TINY)
    keys = jax.random.split(jax.random.key(0), 3)

    def gradients(net):
        def loss(p):
            return jnp.sum(net.apply(p, Request(x, t, conditions, dropout_keys=keys)).out ** 2)

        return jax.jit(jax.grad(loss))(params)

    for found, expected in zip(
        *map(jax.tree.leaves, map(gradients, (other, network))), strict=True
    ):
        scale = float(jnp.abs(expected).max()) + 1e-6
        np.testing.assert_allclose(found, expected, atol=1e-4 * scale, rtol=0)


def test_dropout_is_of_one_example_alone():
    _, network, params = pair(TINY)
    x, t, conditions = inputs(TINY)
    keys = jax.random.split(jax.random.key(0), 3)
    apply = jax.jit(lambda x, t, c, k: network.apply(params, Request(x, t, c, dropout_keys=k)).out)
    dropped = apply(x, t, conditions, keys)
    plain = jax.jit(network.apply)(params, Request(x, t, conditions)).out
    assert float(jnp.abs(dropped - plain).mean()) > 0.05
    np.testing.assert_array_equal(dropped, apply(x, t, conditions, keys))
    other = apply(x, t, conditions, keys[::-1])
    assert float(jnp.abs(dropped - other)[0].mean()) > 0.05
    np.testing.assert_allclose(other[1], dropped[1], atol=1e-5)  # the same key as before
    alone = apply(x[1:2], t[1:2], {k: v[1:2] for k, v in conditions.items()}, keys[1:2])
    np.testing.assert_allclose(alone[0], dropped[1], atol=1e-5)
    still = Network(dataclasses.replace(TINY, dropout=0.0))
    found = jax.jit(still.apply)(params, Request(x, t, conditions, keys)).out
    np.testing.assert_allclose(found, plain, atol=1e-5)


def test_dropout_keeps_the_mean_and_the_rate():
    x = jnp.ones((2, 50, 50, 8))
    keys = jax.random.split(jax.random.key(3), 2)
    out = edm_layers.dropout(x, 0.25, keys)
    assert set(np.unique(out)) == {0, np.float32(1 / 0.75)}
    assert abs(float(out.mean()) - 1) < 0.02
    assert not np.array_equal(out[0], out[1])


@pytest.mark.parametrize("name", ["NCSN++", "ADM"])
def test_forward_mode_matches_finite_differences(name):
    """Along x, t, r and the parameters at once; the differences are the twin's, in float64."""
    options = {**SMALLEST, "second_time": "r", "custom_gradients": "off"}
    config = dataclasses.replace(CONFIGS[name], **options)
    twin, network, params = pair(config)
    x, t, conditions = inputs(config)
    rest = {key: value for key, value in conditions.items() if key != "r"}
    point = (params, x, t, conditions["r"])
    random = np.random.default_rng(0)
    weights = {key: value.double() for key, value in twin.state_dict().items()}
    change = {
        key: torch.tensor(0.1 * random.normal(size=value.shape)) for key, value in weights.items()
    }
    for key in change:
        if key.endswith("freqs"):
            change[key] *= 0  # never trained: no derivative
    inputs_change = [0.1 * random.normal(size=a.shape).astype("f") for a in point[1:]]
    tangent = from_torch(change, noise_channels=config.noise_channels)
    tangent = jax.tree.map(jnp.asarray, (tangent, *inputs_change))

    def along(step):
        double = torch_edm.UNet(config).double()
        double.load_state_dict({key: weights[key] + step * change[key] for key in weights})
        moved = [
            np.asarray(a, "d") + step * b for a, b in zip(point[1:], inputs_change, strict=True)
        ]
        known = {"r": moved[2], **rest, "augment": np.asarray(rest["augment"], "d")}
        return of_twin(double, config, moved[0], moved[1], known)[0]

    @jax.jit
    def derivative(point, tangent):
        return jax.jvp(
            lambda p, x, t, r: network.apply(p, Request(x, t, {**rest, "r": r})).out, point, tangent
        )

    found = derivative(point, tangent)[1]
    expected = (along(1e-5) - along(-1e-5)) / 2e-5
    assert expected.std() > 0.05
    np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max(), rtol=0)


def test_attention_goes_through_the_seam():
    class Counting:
        def __call__(self, q, k, v, state=None):
            assert q.ndim == 4 and q.shape == k.shape == v.shape
            return jnp.zeros_like(q), None if state is None else state + q.shape[1]

    config = dataclasses.replace(ADM, **SMALLEST)
    _, network, params = pair(config)
    x, t, conditions = inputs(config)
    apply = jax.jit(
        lambda state: network.apply(
            params, Request(x, t, conditions, attention=Counting(), carry=state)
        )
    )
    attended = (jnp.int32(0),) * 4  # encoder, middle, and two blocks of the decoder
    result = apply(attended)
    assert result.out.shape == x.shape and [int(s) for s in result.carry] == [16] * 4


def test_sizes_of_the_published_networks():
    """Parameters in millions of EDM's table 7, and operations by hand of one small network."""

    def count(config):
        shapes = jax.eval_shape(Network(config).init, jax.random.key(0))
        return sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6

    cifar = SongUNetConfig(num_classes=10, augment_dim=9)
    assert round(count(cifar), 1) == 55.7
    ncsnpp = dataclasses.replace(cifar, **{f: getattr(NCSNPP, f) for f in FIELDS_OF_NCSNPP})
    assert round(count(ncsnpp), 1) == 56.4
    assert round(count(DhariwalUNetConfig()), 1) == 295.9
    assert Network(cifar).feature_shapes == ((32, 32, 256), (16, 16, 256), (8, 8, 256))


FIELDS_OF_NCSNPP = ("embedding_type", "channel_mult_noise", "encoder_type", "resample_filter")


def test_operations_are_those_that_xla_counts():
    """XLA leaves out the zeros around images and counts what is elementwise."""
    options = {"image_size": 64, "attention": "einsum", "custom_gradients": "off"}
    network = Network(dataclasses.replace(NCSNPP, **options))
    x, t, conditions = inputs(network.config, batch=1)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    counted = (
        jax.jit(network.apply).lower(shapes, Request(x, t, conditions)).cost_analysis()["flops"]
    )
    assert 0.95 < counted / network.flops_per_example < 1.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 6, "channel_mult": (1, 1, 1)}, "image_size=6.*choose a multiple of 4"),
        ({"dropout": 1.0}, "dropout=1.0: expected 0 to below 1"),
        ({"second_time": "s"}, "second_time='s': expected one of"),
        ({"encoder_type": "wavelet"}, "encoder_type='wavelet': expected one of"),
        ({"resample_filter": (1, 2, 1)}, "even number of taps"),
        ({"model_channels": 36}, "36 channels, which do not divide into 9|normalises"),
        ({"channel_mult": ()}, "at least one resolution"),
        ({"attention": "cudnn"}, "cudnn"),
        ({"remat": "all"}, "remat='all'"),
    ],
)
def test_mistakes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(DDPMPP, **options)


def test_unknown_conditions_and_features_are_refused():
    config = dataclasses.replace(DDPMPP, augment_dim=0)
    network = Network(config)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    x, t, conditions = inputs(config)
    label = {"label": conditions["label"]}
    for conditions, features, message in (
        ({**label, "r": t}, (), "unknown: r. It takes label"),
        ({"augment": x}, (), "unknown: augment; missing: label. It takes label"),
        ({**label, "text": x}, (), "unknown: text"),
        ({"label": t}, (), r"label is float32 \[3\], expected int32 \[b\]"),
        (label, (1, 0), "ascending numbers of 0 to 1"),
        (label, (2,), "ascending numbers of 0 to 1"),
    ):
        request = Request(x, t, conditions, features=features)
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda params, request=request: network.apply(params, request), shapes)

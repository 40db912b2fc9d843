import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dit_jax.denoiser import Denoiser
from dit_jax.diffusion import DDPM, LOSS_WEIGHTS, RectifiedFlow
from dit_jax.diffusion.timesteps import Uniform
from dit_jax.models import DiTConfig, Network
from dit_jax.training.denoising import Denoising
from dit_jax.training.ema import EMA
from dit_jax.training.method import accumulated_gradients
from dit_jax.training.optimizer import AdamW, create_optimizer
from tests.compilations import OPTIMIZED
from tests.references import torch_dit
from tests.references.torch_params import from_torch

CONFIG = DiTConfig(image_size=8, in_channels=2, hidden_size=32, depth=2, num_heads=2, num_classes=5)
RATE = 1e-3


def make_method(process=None, **overrides):
    process = process or DDPM(learned_variance=True)
    config = dataclasses.replace(CONFIG, learn_sigma=isinstance(process, DDPM))
    optimizer = create_optimizer(AdamW(), lambda c: RATE)
    options = {
        "denoiser": Denoiser(Network(config), process),
        "timesteps": Uniform(process),
        "weighting": LOSS_WEIGHTS["none"](),
        "optimizer": optimizer,
        "averages": (EMA(decay=0.9), EMA(power_std=0.1)),
    }
    return Denoising(**{**options, **overrides})


def reference():
    return torch_dit.randomise(
        torch_dit.DiT(
            depth=2, hidden_size=32, num_heads=2, in_channels=2, input_size=8, num_classes=5
        ),
        seed=0,
    )


def make_batch(n=16, seed=0):
    random = np.random.default_rng(seed)
    image = random.uniform(-1, 1, (n, 8, 8, 2)).astype(np.float32)
    image[0] = np.sign(image[0])  # the ends of the range are special in the likelihood
    label = jnp.asarray(random.integers(0, 5, n), jnp.int32)
    return {"image": jnp.asarray(image), "conditions": {"label": label}}


@pytest.fixture(scope="module")
def trained_both_ways():
    """One update by us, and by PyTorch with the same noise, times and labels."""
    method, model = make_method(), reference()
    params = from_torch(model.state_dict(), CONFIG)
    state = dataclasses.replace(method.init(jax.random.key(1)), params=params)
    state = dataclasses.replace(state, ema={name: params for name in state.ema})
    batch, key = make_batch(), jax.random.key(2)
    examples = method.draw_examples(batch, key)
    # Index 0 (a likelihood) and others (a divergence) are both needed.
    examples["t"] = examples["t"].at[:4].set(0.0)
    object.__setattr__(method, "draw_examples", lambda *_: examples)
    after, metrics = jax.jit(method.update, compiler_options=OPTIMIZED)(state, batch, key)

    training = torch_dit.DDPMTraining(model, learning_rate=RATE, ema_decay=0.9)
    before = from_torch(model.state_dict(), CONFIG)
    image = lambda a: torch.tensor(np.array(a)).permute(0, 3, 1, 2)  # noqa: E731
    integer = lambda a: torch.tensor(np.array(a)).long()  # noqa: E731
    loss = training.step(
        image(examples["x0"]),
        integer(examples["conditions"]["label"]),
        integer(examples["t"]),
        image(examples["eps"]),
    )
    gradients = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    return after, metrics, before, float(loss), gradients, training, (state, examples, method)


def test_loss_and_gradients_are_the_references(trained_both_ways):
    _, metrics, _, loss, gradients, _, (state, examples, method) = trained_both_ways
    assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-5)
    assert metrics["loss"].shape == () and metrics["loss"].dtype == jnp.float32
    assert {"loss", "gradient_norm"} < set(metrics)
    gradient = jax.jit(jax.grad(method.loss, has_aux=True), compiler_options=OPTIMIZED)
    ours, _ = gradient(state.params, examples)
    theirs = from_torch(gradients, CONFIG)
    norm = np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(theirs)))
    assert float(metrics["gradient_norm"]) == pytest.approx(norm, rel=1e-4)
    # The likelihood at index 0 is a logarithm of a difference: less exact than all else.
    close = functools.partial(np.testing.assert_allclose, atol=1e-4 * norm, rtol=0)
    jax.tree.map(close, ours, theirs)


def test_parameters_and_average_after_a_step_are_the_references(trained_both_ways):
    after, _, before, _, gradients, training, _ = trained_both_ways
    theirs = from_torch(training.model.state_dict(), CONFIG)
    grads = from_torch(gradients, CONFIG)

    def close(ours, theirs, before, gradient):
        # Adam's first step is lr * sign(g): where g is rounding noise its sign is too.
        sure = np.abs(gradient) > 1e-5
        np.testing.assert_allclose(ours[sure], theirs[sure], atol=1e-5)
        assert np.abs(ours - before).max() <= RATE * 1.001

    jax.tree.map(close, jax.tree.map(np.asarray, after.params), theirs, before, grads)
    average = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, before, after.params)
    close = functools.partial(np.testing.assert_allclose, atol=1e-6)
    jax.tree.map(close, after.ema["ema_0.9"], average)
    jax.tree.map(close, after.ema["ema_std0.1"], after.params)
    assert int(after.step) == 1


@pytest.mark.parametrize("process", [DDPM(learned_variance=True), RectifiedFlow()])
def test_accumulated_gradients_are_the_unsplit_batchs(process):
    key, batch = jax.random.key(3), make_batch()
    whole, split = make_method(process), make_method(process, num_microbatches=4)
    params = from_torch(reference().state_dict(), CONFIG)
    if isinstance(process, RectifiedFlow):
        params["final_layer"]["linear"] = jax.tree.map(
            lambda a: a[..., :8], params["final_layer"]["linear"]
        )
    examples = whole.draw_examples(batch, key)
    expected = jax.jit(lambda p: accumulated_gradients(whole.loss, p, examples, 1))(params)
    found = jax.jit(lambda p: accumulated_gradients(split.loss, p, examples, 4))(params)
    scale = max(np.abs(g).max() for g in jax.tree.leaves(expected))
    close = functools.partial(np.testing.assert_allclose, atol=1e-6 * scale, rtol=0)
    jax.tree.map(close, found, expected)


def test_labels_are_dropped_at_the_rate_and_only_by_the_null_class():
    batch = make_batch(4000)
    examples = make_method(label_dropout=0.3).draw_examples(batch, jax.random.key(0))
    dropped = np.asarray(examples["conditions"]["label"]) == 5
    assert abs(dropped.mean() - 0.3) < 0.03
    labels = (each["conditions"]["label"][~dropped] for each in (examples, batch))
    np.testing.assert_array_equal(*labels)
    for rate in (0.0, 1.0):
        examples = make_method(label_dropout=rate).draw_examples(batch, jax.random.key(0))
        label = examples["conditions"]["label"]
        assert (np.asarray(label) == 5).mean() == rate


def test_draws_are_independent_and_change_with_the_key():
    method, batch = make_method(label_dropout=0.5), make_batch(4000)
    first = method.draw_examples(batch, jax.random.key(0))
    other = method.draw_examples(batch, jax.random.key(1))
    again = method.draw_examples(batch, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    for name in ("t", "eps"):
        assert (np.asarray(first[name]) != np.asarray(other[name])).mean() > 0.3
    assert np.std(first["eps"]) == pytest.approx(1, abs=0.01)
    dropped = np.asarray(first["conditions"]["label"]) == 5
    assert abs(np.corrcoef(dropped, first["t"])[0, 1]) < 0.05


def test_an_unconditional_network_sees_no_labels():
    network = Network(dataclasses.replace(CONFIG, num_classes=0))
    method = make_method(denoiser=Denoiser(network, DDPM(learned_variance=True)))
    assert not method.draw_examples(make_batch(), jax.random.key(0))["conditions"]
    key = jax.random.key(0)
    state = jax.eval_shape(method.init, key)
    after, _ = jax.eval_shape(method.update, state, make_batch(), key)
    assert "y_embedder" not in after.params


def test_weights_and_flops():
    method = make_method()
    state = method.init(jax.random.key(0))
    assert list(method.weights(state)) == ["ema_0.9", "ema_std0.1", "raw"]
    assert method.weights(state)["raw"] is state.params
    assert method.flops_per_example == 3 * method.denoiser.network.flops_per_example
    with pytest.raises(ValueError, match=r"method.label_dropout=1.5: expected 0 to 1"):
        make_method(label_dropout=1.5)

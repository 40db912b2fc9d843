"""Whole pipelines: diffusers makes the same images of an export, and we of a pipeline of diffusers.

The noise is shared: DiTPipeline's own is replaced by that of `dit_jax.sampling`.
"""

import dataclasses
import json

import diffusers
import jax
import numpy as np
import pytest
import torch
from diffusers.pipelines.dit import pipeline_dit

from dit_jax import experiment
from dit_jax.evaluation import psnr
from dit_jax.interop.autoencoder_kl import save_autoencoder
from dit_jax.interop.export import write_model
from dit_jax.interop.models import open_model
from dit_jax.interop.pipelines import load_pipeline
from dit_jax.interop.pixel_autoencoder import TOLERANCE, pixel_autoencoder
from dit_jax.interop.tensors import InteropError
from dit_jax.launch import loading, wiring
from dit_jax.models import DiTConfig, Request
from dit_jax.models.autoencoder_kl import AutoencoderKLConfig
from dit_jax.sampling import image_keys
from tests.interop.test_models import assert_same, diffusers_model, in_memory, on_device
from tests.references import diffusers_autoencoder, torch_dit

LATENT = DiTConfig(
    image_size=8,
    in_channels=4,
    patch_size=2,
    hidden_size=32,
    depth=2,
    num_heads=4,
    num_classes=5,
    time_frequency_spacing="diffusers",
)
PIXELS = dataclasses.replace(LATENT, in_channels=1, learn_sigma=False)
VAE = AutoencoderKLConfig(
    scaling_factor=0.18215, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4
)
LABELS = np.array([1, 4, 0], np.int32)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae") / "vae"
    model = diffusers_autoencoder.create(VAE)
    save_autoencoder(folder, *diffusers_autoencoder.ours(VAE, model))
    return folder


@pytest.fixture
def shared_noise(monkeypatch):
    """DiTPipeline starts from the noise of seed 7 here."""

    def noise(shape, **_):
        b, c, h, w = shape
        keys = jax.vmap(lambda key: jax.random.fold_in(key, 0))(image_keys(7, np.arange(b)))
        ours = jax.vmap(lambda key: jax.random.normal(key, (h, w, c)))(keys)
        return torch.from_numpy(np.array(ours)).permute(0, 3, 1, 2).contiguous()

    monkeypatch.setattr(pipeline_dit, "randn_tensor", noise)


def ours(folder, guidance_scale, steps=6, solver="ddim", spacing="leading", vae=None):
    """The images of launch/sample.py --init_from=folder."""
    overrides = {
        "sampling.solver": solver,
        "sampling.steps": steps,
        "sampling.spacing": spacing,
        "sampling.guidance_scale": guidance_scale,
    }
    model = loading.load_found(open_model(folder), overrides=overrides, vae=vae)
    placement = wiring.create_placement(model.config)
    decoder = loading.Decoder(model.config, model.autoencoder, placement)
    plan = experiment.build_sampling(model.config)
    images = wiring.sample_images(
        plan,
        model.params,
        LABELS,
        seed=7,
        placement=placement,
        batch_size=8,
        decode=decoder,
        announce=False,
    )
    return images.clip(-1, 1)


def theirs(pipeline, guidance_scale, steps=6):
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        class_labels=LABELS.tolist(),
        guidance_scale=guidance_scale,
        num_inference_steps=steps,
        output_type="np",
    ).images
    return images.astype(np.float32) * 2 - 1


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_plain_diffusers_makes_the_same_images(tmp_path, vae, shared_noise, guidance_scale):
    model, params = in_memory(LATENT)
    names = ["ant", "bee", "cat", "dog", "eel"]
    summary = write_model(model, "diffusers", tmp_path / "out", autoencoder=vae, class_names=names)
    assert not any("INEXACT in plain" in note for note in summary.notes)
    assert open_model(tmp_path / "out").class_names == tuple(names)
    pipeline = diffusers.DiTPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.get_label_ids(["cat"]) == [2]
    expected = theirs(pipeline, guidance_scale)
    found = ours(tmp_path / "out", guidance_scale)
    assert found.shape == (3, 16, 16, 3) and found.std() > 0.05
    assert psnr(found, expected).min() > 60
    assert_same(open_model(tmp_path / "out"), params)


def test_the_original_spacing_needs_our_loader(tmp_path, vae, shared_noise):
    model, _ = in_memory(dataclasses.replace(LATENT, time_frequency_spacing="original"))
    summary = write_model(model, "diffusers", tmp_path / "out", autoencoder=vae)
    assert any("INEXACT in plain diffusers" in note for note in summary.notes)
    assert "INEXACT" in (tmp_path / "out/README.md").read_text()
    expected = ours(tmp_path / "out", 1.0)
    with_loader = theirs(load_pipeline(tmp_path / "out"), 1.0)
    assert psnr(with_loader, expected).min() > 60
    plain = theirs(diffusers.DiTPipeline.from_pretrained(tmp_path / "out"), 1.0)
    print("PSNR with the loader", psnr(with_loader, expected), "without", psnr(plain, expected))
    assert psnr(plain, expected).max() < 60
    assert open_model(tmp_path / "out").network.config.time_frequency_spacing == "original"


def test_a_pipeline_of_diffusers_makes_the_same_images_here(tmp_path, shared_noise):
    config = dataclasses.replace(LATENT, num_classes=1000)
    transformer = diffusers_model(config)
    transformer.register_to_config(sample_size=8)
    pipeline = diffusers.DiTPipeline(
        transformer,
        diffusers_autoencoder.create(VAE),
        diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False),
    )
    pipeline.save_pretrained(tmp_path / "theirs")
    found = open_model(tmp_path / "theirs")
    assert found.autoencoder is not None
    scheduler = json.loads((tmp_path / "theirs/scheduler/scheduler_config.json").read_text())
    assert found.config.process.ddpm.beta_end == scheduler["beta_end"]
    for guidance_scale in (1.0, 2.0):
        expected = theirs(pipeline, guidance_scale)
        assert psnr(ours(tmp_path / "theirs", guidance_scale), expected).min() > 60


@pytest.mark.parametrize("channels", [1, 3])
def test_the_autoencoder_of_pixels_is_the_identity(tmp_path, channels):
    autoencoder, params = pixel_autoencoder(channels)
    save_autoencoder(tmp_path / "vae", autoencoder, params)
    params = jax.tree.map(jax.numpy.asarray, params)
    images = np.random.default_rng(0).uniform(-1, 1, (4, 8, 8, channels)).astype(np.float32)
    images[1] = 1
    decoded = autoencoder.decode(params, jax.numpy.asarray(images))
    np.testing.assert_allclose(decoded, images, atol=TOLERANCE)
    mean, logvar = autoencoder.encode(params, jax.numpy.asarray(images))
    np.testing.assert_allclose(mean, images, atol=TOLERANCE)
    assert (np.asarray(logvar) < -29).all()
    vae = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae")
    with torch.no_grad():
        out = vae.decode(torch.from_numpy(images).permute(0, 3, 1, 2)).sample
    np.testing.assert_allclose(out.permute(0, 2, 3, 1).numpy(), images, atol=TOLERANCE)


def test_pixels_and_flows_run_in_plain_diffusers(tmp_path, shared_noise):
    """What `make demo` trains: pixels, rectified flow in diffusers' conventions."""
    flow = {"name": "flow", "flow": {"network_convention": "flux", "time_scale": 1000.0}}
    model, _ = in_memory(PIXELS, process=flow)
    summary = write_model(model, "diffusers", tmp_path / "out")
    assert any("identity" in note for note in summary.notes)
    pipeline = diffusers.DiTPipeline.from_pretrained(tmp_path / "out")
    made = theirs(pipeline, 2.0, steps=40)
    assert made.shape == (3, 8, 8, 1)
    assert open_model(tmp_path / "out").autoencoder is None
    # Another solver, and times rounded to thousandths: near, not equal.
    near = ours(tmp_path / "out", 2.0, steps=40, solver="heun", spacing="")
    assert psnr(near, made).min() > 25


def test_card_and_configuration_must_agree(tmp_path):
    model, _ = in_memory(LATENT)
    write_model(model, "diffusers", tmp_path / "out")
    file = tmp_path / "out/dit_jax.json"
    card = json.loads(file.read_text())
    card["config"]["model"]["dit"]["depth"] = 3
    file.write_text(json.dumps(card))
    with pytest.raises(InteropError, match=r"model\.dit\.depth=3.*2"):
        open_model(tmp_path / "out")


def test_a_vae_of_other_channels_is_refused(tmp_path, vae):
    model, _ = in_memory(PIXELS, process={"name": "ddpm"})
    with pytest.raises(InteropError, match="latents of 4 channels, the model takes 1"):
        write_model(model, "diffusers", tmp_path / "out", autoencoder=vae)
    assert not list(tmp_path.iterdir())


def test_the_model_card_says_what_it_is(tmp_path):
    model, _ = in_memory(LATENT, step=400)
    write_model(model, "diffusers", tmp_path / "out", metrics={"scores": {"fid": 12.5}})
    text = (tmp_path / "out/README.md").read_text()
    assert "| training steps | 400 |" in text and "12.5" in text and "latents" in text
    write_model(model, "dit_jax", tmp_path / "own")
    text = (tmp_path / "own/README.md").read_text()
    assert "\ndit-jax sample --init_from=path/to/this/folder --out=samples.png\n" in text


def test_randomise_covers_everything():
    """The parity above rests on it: nothing is zero or equal to another."""
    model = torch_dit.randomise(torch_dit.DiT(depth=1, hidden_size=32, num_heads=4), seed=0)
    assert all(p.std() > 0 for p in model.parameters())


def test_a_model_of_rectangles_makes_them_in_diffusers(tmp_path, vae):
    model, params = in_memory(dataclasses.replace(LATENT, time_frequency_spacing="original"))
    config = model.config.copy_and_resolve_references()
    config.model.input_size = (8, 18)
    model = dataclasses.replace(model, config=config)
    assert model.network.sample_shape == (8, 18, 4)
    summary = write_model(model, "diffusers", tmp_path / "out", autoencoder=vae)
    assert any("trained on 8x18; DiTPipeline makes squares of 8" in n for n in summary.notes)
    assert "on inputs of 8x18x4" in (tmp_path / "out" / "README.md").read_text()
    again = open_model(tmp_path / "out")
    assert again.network.sample_shape == (8, 18, 4)
    assert_same(again, params)
    transformer, params = load_pipeline(tmp_path / "out").transformer, on_device(model)
    t, labels = np.array([3.0, 500.0], np.float32), np.array([1, 4], np.int32)
    # (8, 18) has 4 x 9 tokens, a square number, which diffusers by itself would mix unnoticed.
    for height, width in ((8, 18), (14, 6), (8, 8)):
        x = np.random.default_rng(1).normal(size=(2, height, width, 4)).astype(np.float32)
        request = Request(*map(jax.numpy.asarray, (x, t)), {"label": jax.numpy.asarray(labels)})
        expected = model.network.apply(params, request).out
        with torch.no_grad():
            found = transformer(
                torch.from_numpy(x).permute(0, 3, 1, 2),
                timestep=torch.from_numpy(t),
                class_labels=torch.from_numpy(labels).long(),
            ).sample.permute(0, 2, 3, 1)
        np.testing.assert_allclose(found, expected, atol=2e-5)

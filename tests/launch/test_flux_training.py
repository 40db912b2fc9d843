"""FLUX trains by the ordinary loop, on latents and text states that were computed ahead."""

import importlib

import jax
import numpy as np

from dit_jax import data
from dit_jax.interop.flux_files import load_flux, save_flux
from dit_jax.interop.models import open_model
from dit_jax.launch import training
from dit_jax.models.flux_config import PRESETS

TINY = PRESETS["flux_tiny"]
SIDE, TEXT = TINY["image_size"], (3, TINY["text_dim"])


def write_records(folder, count=16):
    random = np.random.default_rng(0)
    told = {"text": TEXT, "pooled": (TINY["pooled_dim"],)}
    fields = {name: data.Field(shape, "bfloat16", condition=True) for name, shape in told.items()}
    shape = (SIDE, SIDE, TINY["in_channels"])
    header = data.latents_header(
        shape, scaling_factor=1.0, kind="samples", flip="none", conditions=fields
    )
    nulls = {name: np.zeros(shape, np.float32) for name, shape in told.items()}
    writer = data.RecordWriter(folder, header, nulls=nulls)
    arrays = {name: random.normal(size=(count, *shape)) for name, shape in told.items()}
    writer.add(latents=random.normal(size=(count, 1, *shape)), **arrays)
    writer.finish()


def test_flux_tiny_trains_and_its_transformer_is_diffusers(tmp_path):
    write_records(tmp_path / "records")
    config = importlib.import_module("dit_jax.configs.flux_tiny").get_config()
    config.data.latents.path = str(tmp_path / "records")
    config.training.update(num_steps=3, batch_size=8, log_every=1, preview_every=0)
    config.training.update(checkpoint_every=0, tensorboard=False)
    config.optimizer.update(warmup_steps=0, schedule="constant")
    config.model.flux.update(layer_loop="scan", depth=1, single_depth=1)
    result = training.run(config, tmp_path / "run")
    assert result.step == 3
    model = open_model(tmp_path / "run")
    assert model.network.config.title == "FLUX of 1 and 1 blocks, width 32, 2 heads"
    params = model.load()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert np.any(params["single_blocks"]["adaLN_modulation"]["kernel"])  # began at zero
    save_flux(tmp_path / "transformer", model.network, params)
    again = load_flux(tmp_path / "transformer")[1]
    assert jax.tree.all(jax.tree.map(np.array_equal, again, params))

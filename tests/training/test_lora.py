"""A LoRA of a tiny FLUX, trained here for two steps, does in diffusers what it does here."""

import jax
import numpy as np
import optax

from dit_jax.denoiser import Denoiser
from dit_jax.diffusion import losses
from dit_jax.diffusion.process import RectifiedFlow
from dit_jax.diffusion.timesteps import Uniform
from dit_jax.interop.flux_files import load_flux
from dit_jax.interop.lora import save_lora
from dit_jax.models import FluxConfig, lora
from dit_jax.training import ema
from dit_jax.training.lora import LoraDenoising, LoraOptions
from tests.models.test_flux import random_request
from tests.references import diffusers_flux


def test_what_is_trained_here_is_loaded_by_diffusers(tmp_path):
    import diffusers

    config = FluxConfig.from_name("flux_tiny", depth=1, single_depth=1)
    theirs = diffusers_flux.create_model(config)
    theirs.save_pretrained(tmp_path / "model")
    network, base = load_flux(tmp_path / "model")
    process = RectifiedFlow(network_convention="flux", time_scale=1000.0)
    method = LoraDenoising(
        Denoiser(network, process),
        Uniform(process),
        losses.NoWeight(),
        optax.adamw(0.05),
        tuple(ema.averages([0.9])),
        label_dropout=0.0,
        lora=LoraOptions(rank=2, alpha=4.0, layers=r".*blocks.*"),
    )
    request = random_request(config, (4, 6))
    state = jax.jit(method.init)(jax.random.key(0))
    assert set(state.params) == {"double_blocks", "single_blocks"}
    batch = {"image": request.x, "conditions": request.conditions}
    update = jax.jit(method.update)
    for step in range(2):
        state, metrics = update(state, batch, jax.random.key(step), {"base": base})
    assert np.isfinite(metrics["loss"]) and metrics["gradient_norm"] > 0
    params = method.sampled(method.weights(state)["raw"], {"base": base})
    before = diffusers_flux.evaluate(theirs, request)
    out = jax.jit(network.apply)(params, request).out
    adapter = lora.to_adapter(state.params, method.lora.scale)
    save_lora(tmp_path / "trained.safetensors", network, adapter)
    weights = diffusers.FluxPipeline.lora_state_dict(tmp_path / "trained.safetensors")
    diffusers.FluxPipeline.load_lora_into_transformer(weights, None, theirs)
    found = diffusers_flux.evaluate(theirs, request)
    assert np.abs(out - before).max() > 0.01
    np.testing.assert_allclose(out, found, atol=1e-4)

"""NVlabs' own networks, preconditionings and sampler beside ours, on randomised weights.

For whoever has a checkout of NVlabs/edm: DIT_JAX_ORIGINALS names the folder that holds it as edm.
"""

import ast
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dit_jax.denoiser import Denoiser
from dit_jax.diffusion import EDM, make_solver, sample, schedule
from dit_jax.models import Network, Request
from tests.models.test_edm import ADM, DDPMPP, NCSNPP, assert_same, inputs
from tests.references import torch_edm
from tests.references.torch_edm_params import from_torch

ROOT = Path(os.environ.get("DIT_JAX_ORIGINALS", "")) / "edm"
pytestmark = pytest.mark.skipif(
    not (ROOT / "training" / "networks.py").is_file(), reason="no edm in DIT_JAX_ORIGINALS"
)
CONFIGS = {"DDPM++": DDPMPP, "NCSN++": NCSNPP, "ADM": ADM}
WRAPPERS = {"edm": "EDMPrecond", "vp": "VPPrecond", "ve": "VEPrecond", "iddpm": "iDDPMPrecond"}
CHURN = {"s_churn": 8.0, "s_min": 0.05, "s_max": 50.0, "s_noise": 1.003}


@pytest.fixture
def originals(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    import training.networks

    yield training.networks
    for name in [n for n in sys.modules if n.split(".")[0] in ("training", "torch_utils")]:
        del sys.modules[name]


def sampler():
    """`edm_sampler` alone: its script imports what this test has no use for."""
    tree = ast.parse((ROOT / "generate.py").read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", "") == "edm_sampler"]
    code = {"np": np, "torch": torch}
    exec(compile(tree, "generate.py", "exec"), code)
    return code["edm_sampler"]


def original(module, config, kind):
    names = ("model_channels", "channel_mult", "num_blocks", "attn_resolutions", "augment_dim")
    song = ("embedding_type", "channel_mult_noise", "encoder_type", "decoder_type")
    if hasattr(config, "encoder_type"):
        names += (*song, "resample_filter")
    options = {name: getattr(config, name) for name in names}
    wrapper = getattr(module, WRAPPERS[kind])(
        config.image_size,
        config.in_channels,
        label_dim=config.num_classes,
        model_type="SongUNet" if hasattr(config, "encoder_type") else "DhariwalUNet",
        **{k: list(v) if isinstance(v, tuple) else v for k, v in options.items()},
    )
    torch_edm.randomise(wrapper.model)
    return wrapper.eval()


@pytest.mark.parametrize("kind", WRAPPERS)
@pytest.mark.parametrize("name", CONFIGS)
def test_denoised_images_and_trajectories(originals, name, kind):
    config = CONFIGS[name]
    if kind == "iddpm":
        config = type(config)(**{**vars(config), "learn_sigma": True})
    theirs = original(originals, config, kind)
    params = jax.tree.map(jnp.asarray, from_torch(theirs.model.state_dict()))
    low, high = max(0.002, theirs.sigma_min), min(80.0, theirs.sigma_max)
    process = EDM(preconditioning=kind, sigma_min=low * (1 + 1e-6), sigma_max=high)
    denoiser = Denoiser(Network(config), process)

    x, _, conditions = inputs(config)
    sigma = jnp.asarray([process.sigma_min, 0.7, high])
    if kind == "iddpm":
        sigma = process.time_from_sigma_ratio(sigma)
    x = x * sigma[:, None, None, None]
    found = jax.jit(denoiser.x0)(params, x, sigma, conditions)
    one_hot = torch.eye(config.num_classes + 1)[np.asarray(conditions["label"])][:, :-1]
    pixels = torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)
    augment = torch.from_numpy(np.array(conditions["augment"]))
    with torch.no_grad():
        expected = theirs(
            pixels, torch.from_numpy(np.array(sigma)), one_hot, augment_labels=augment
        )
    expected = expected.permute(0, 2, 3, 1).numpy()
    error = np.abs(found - expected) / np.maximum(1, np.asarray(sigma))[:, None, None, None]
    print(f"{name} {kind}: x0 {error.max():.2g}")
    assert error.max() < 1e-4

    key, steps, label = jax.random.key(0), 6, {"label": conditions["label"]}

    def denoise(x, t, carry):
        return denoiser.predict(params, Request(x, jnp.full(3, t), label)), carry

    start = np.random.default_rng(0).normal(size=x.shape).astype("f")
    times = schedule(process, steps)
    for churn in ({}, CHURN):
        solver = make_solver("heun", **churn)
        run = jax.jit(lambda x, s=solver: sample(s, process, denoise, x, times, key)[0])
        found = run(jnp.asarray(start * times[0]))
        noises = (jax.random.normal(jax.random.fold_in(key, i), x.shape) for i in range(steps))

        def following(like, noises=noises):
            noise = np.array(next(noises), "d")
            return torch.from_numpy(noise).permute(0, 3, 1, 2)

        options = {"S" + name[1:]: value for name, value in churn.items()}
        with torch.no_grad():
            expected = sampler()(
                theirs,
                torch.from_numpy(start).permute(0, 3, 1, 2),
                one_hot,
                following,
                steps,
                **options,
            )
        expected = expected.permute(0, 2, 3, 1).numpy()
        scale = np.abs(expected).max()
        print(f"  trajectory {np.abs(found - expected).max() / scale:.2g} of {scale:.3g}")
        assert_same(found / scale, expected / scale, tolerance=2e-4)

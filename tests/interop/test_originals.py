"""The original repositories' own model code beside ours, on randomised weights.

For whoever has checkouts: DIT_JAX_ORIGINALS names a folder with any of DiT, fast-DiT and SiT in it.
timm, which they import three layers from, is replaced by plain PyTorch.
"""

import os
import sys
import types
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dit_jax.interop.models import open_model
from dit_jax.models import Request
from tests.references import torch_dit

ROOT = os.environ.get("DIT_JAX_ORIGINALS", "")
pytestmark = pytest.mark.skipif(not ROOT, reason="DIT_JAX_ORIGINALS names no folder")
SIZES = {
    "S/2": {**torch_dit.SIZES["S"]},
    "XL/2 of 2 blocks": {**torch_dit.SIZES["XL"], "depth": 2},
    "512 pixels": {**torch_dit.SIZES["S"], "depth": 2, "input_size": 64},
}


class PatchEmbed(torch_dit.PatchEmbedder):
    """timm's, as far as it is used."""

    def __init__(self, size, patch_size, channels, dim, bias=True):
        super().__init__(patch_size, channels, dim)
        self.patch_size, self.num_patches = (patch_size,) * 2, (size // patch_size) ** 2


class Mlp(torch.nn.Module):
    """timm's, as far as it is used."""

    def __init__(self, in_features, hidden_features, act_layer, drop=0):
        super().__init__()
        self.fc1, self.act = torch.nn.Linear(in_features, hidden_features), act_layer()
        self.fc2 = torch.nn.Linear(hidden_features, in_features)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


def attention(dim, num_heads, qkv_bias=True, **_):
    return torch_dit.Attention(dim, num_heads)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("repository", ["DiT", "fast-DiT", "SiT"])
def test_the_original_code_computes_the_same(repository, size, tmp_path, monkeypatch):
    source = Path(ROOT) / repository / "models.py"
    if not source.is_file():
        pytest.skip(f"no {repository} in DIT_JAX_ORIGINALS")
    stand_in = types.SimpleNamespace(PatchEmbed=PatchEmbed, Attention=attention, Mlp=Mlp)
    for name in ("timm", "timm.models", "timm.models.vision_transformer"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    vars(sys.modules["timm.models.vision_transformer"]).update(vars(stand_in))
    code: dict = {"__name__": "original"}
    exec(compile(source.read_text(), source, "exec"), code)
    kind = "sit_pt" if repository == "SiT" else "dit_pt"
    build = partial(code["SiT" if repository == "SiT" else "DiT"], **SIZES[size])
    theirs = torch_dit.randomise(build(), seed=0).eval()
    torch.save(theirs.state_dict(), tmp_path / "original.pt")
    model = open_model(tmp_path / "original.pt", kind)
    x = np.random.default_rng(1).normal(size=(2, *model.network.sample_shape)).astype(np.float32)
    t = np.array([0.1, 0.9] if kind == "sit_pt" else [3, 977], np.float32)
    y = np.array([7, 1000])
    params = model.load(lambda _, array: jnp.asarray(array))
    ours = model.network.apply(
        params, Request(jnp.asarray(x), jnp.asarray(t), {"label": jnp.asarray(y)})
    ).out
    with torch.no_grad():
        expected = theirs(torch.from_numpy(x).permute(0, 3, 1, 2), *map(torch.from_numpy, (t, y)))
    expected = expected.permute(0, 2, 3, 1).numpy()
    ours = np.asarray(ours)[..., : expected.shape[-1]]  # SiT drops the variance channels
    print(f"{repository} {size}: {np.abs(ours - expected).max():.2g}, std {expected.std():.2g}")
    np.testing.assert_allclose(ours, expected, atol=1e-4)

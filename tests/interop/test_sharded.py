"""Checkpoints of several files, of transformer and VAE, as files of torch.save."""

import json

import jax
import numpy as np
import pytest
import torch

from dit_jax.interop.autoencoder_kl import load_autoencoder
from dit_jax.interop.models import open_model
from dit_jax.interop.tensors import InteropError
from tests.interop.test_models import TINY, diffusers_model
from tests.launch.test_interop_commands import VAE
from tests.references import diffusers_autoencoder

INDEX = "diffusion_pytorch_model.bin.index.json"


class Harmful:
    def __reduce__(self):
        return (print, ("this ran",))


def save_sharded(model, folder, size="60KB"):
    """What `save_pretrained(safe_serialization=False, max_shard_size=...)` leaves."""
    model.save_pretrained(folder, safe_serialization=False, max_shard_size=size)
    shards = sorted(folder.glob("*.bin"))
    assert len(shards) > 1 and (folder / INDEX).is_file()
    return shards


def same(first, second):
    for path in first.paths:
        np.testing.assert_array_equal(first.read(path), second.read(path))


def test_a_transformer_in_shards_of_torch_save_is_read(tmp_path, capsys):
    model = diffusers_model(TINY)
    model.save_pretrained(tmp_path / "whole/transformer")
    whole = open_model(tmp_path / "whole")
    shards = save_sharded(model, tmp_path / "pipeline/transformer")
    folder = tmp_path / "pipeline/transformer"
    for path in (tmp_path / "pipeline", folder, folder / INDEX):
        found = open_model(path)
        assert found.kind == "diffusers"
        same(found, whole)
    model.save_pretrained(folder)  # both, as many repositories have them
    same(open_model(tmp_path / "pipeline"), whole)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    shards = save_sharded(model, folder)

    # What one shard is, and what to give, with and without the index.
    with pytest.raises(InteropError, match=rf"is shard 1 of {len(shards)} .*give its folder"):
        open_model(shards[0])
    text = (folder / INDEX).read_text()
    (folder / INDEX).unlink()
    for path in (shards[0], folder, tmp_path / "pipeline"):
        with pytest.raises(InteropError, match=rf"shard 1 of .*index is missing: put {INDEX}"):
            open_model(path)
    (folder / INDEX).write_text(text)

    # The shards are read by the same rules as any .pt.
    torch.save({"x": Harmful()}, shards[0])
    with pytest.raises(InteropError, match=r"not tensors or plain data.*print"):
        open_model(tmp_path / "pipeline")
    shards[0].unlink()
    with pytest.raises(InteropError, match="which is not beside it"):
        open_model(tmp_path / "pipeline")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../outside.bin")
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(InteropError, match="outside"):
        open_model(tmp_path / "pipeline")
    assert "this ran" not in capsys.readouterr().out


def test_an_autoencoder_in_shards_of_torch_save_is_read(tmp_path):
    model = diffusers_autoencoder.create(VAE)
    _, wanted = diffusers_autoencoder.ours(VAE, model)
    shards = save_sharded(model, tmp_path / "vae", "20KB")
    _, params, digest = load_autoencoder(tmp_path / "vae")
    jax.tree.map(np.testing.assert_array_equal, params, wanted)
    tensors = torch.load(shards[0])
    torch.save({name: tensor + 1 for name, tensor in tensors.items()}, shards[0])
    assert load_autoencoder(tmp_path / "vae")[2] != digest  # of the shards, not of their index


def test_an_autoencoder_under_a_prefix_is_read(tmp_path):
    model = diffusers_autoencoder.create(VAE)
    _, wanted = diffusers_autoencoder.ours(VAE, model)
    model.save_pretrained(tmp_path / "vae", safe_serialization=False)
    file = tmp_path / "vae/diffusion_pytorch_model.bin"
    torch.save({f"vae.{name}": t for name, t in torch.load(file).items()}, file)
    with pytest.warns(UserWarning, match=r"begin with 'vae\.'"):
        _, params, _ = load_autoencoder(tmp_path / "vae")
    jax.tree.map(np.testing.assert_array_equal, params, wanted)

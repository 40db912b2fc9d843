"""NaN and infinity in checkpoints: named, refused, let through when asked."""

import dataclasses

import jax
import numpy as np
import pytest
import torch

from dit_jax.interop.autoencoder_kl import save_autoencoder
from dit_jax.interop.export import write_model
from dit_jax.interop.models import open_model
from dit_jax.interop.parameters import flatten
from dit_jax.interop.tensors import InteropError
from dit_jax.launch import convert, sample, train
from tests.interop.test_models import TINY, in_memory
from tests.launch.conftest import tiny_config
from tests.launch.test_interop_commands import DIGITS, FLOW, VAE, refusal
from tests.references import diffusers_autoencoder

BAD = {"blocks.0.mlp.fc1.weight": (np.nan, 3), "final_layer.linear.bias": (-np.inf, 1)}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    path = tmp_path_factory.mktemp("damaged") / "x.pt"
    write_model(in_memory(DIGITS, process=FLOW)[0], "sit_pt", path)
    tensors = torch.load(path)
    for name, (value, count) in BAD.items():
        tensors[name].view(-1)[:count] = value
    torch.save(tensors, path)
    return f"sit_pt:{path}"


def test_nan_is_named_and_nothing_is_written(damaged, tmp_path, capsys):
    common = ["--to=dit_jax", "--num_heads=2", damaged, tmp_path / "out"]
    for more in ([], ["--dry_run"]):
        error = refusal(capsys, convert.main, *common, *more)
        assert "blocks.0.mlp.fc1.weight (3 NaN of 4096)" in error
        assert "final_layer.linear.bias (1 inf of 4)" in error and "--allow_nonfinite" in error
        assert not list(tmp_path.iterdir())
    out = f"--out={tmp_path / 'x.png'}"
    error = refusal(capsys, sample.main, f"--init_from={damaged}", "--num_heads=2", out)
    assert "NaN or infinity in 2 of its tensors" in error and not list(tmp_path.iterdir())
    with pytest.raises(InteropError, match=r"blocks\.0\.mlp\.fc1\.weight"):
        train.run(tiny_config(), tmp_path / "run", init_from=damaged)

    capsys.readouterr()
    convert.main([str(a) for a in [*common, "--allow_nonfinite"]])
    assert "note: NaN or infinity in 2 tensors" in capsys.readouterr().out
    with pytest.raises(InteropError, match=r"blocks\.mlp\.fc1\.kernel \(3 NaN"):
        open_model(tmp_path / "out").load()
    found = open_model(tmp_path / "out", allow_nonfinite=True)
    assert np.isnan(np.asarray(found.load()["blocks"]["mlp"]["fc1"]["kernel"])).sum() == 3


def test_infinities_made_by_half_precision_are_refused(tmp_path):
    model, params = in_memory(TINY)
    leaves = dict(flatten(params)) | {"final_layer.linear.bias": np.full(32, 1e5, np.float32)}
    model = dataclasses.replace(model, read=leaves.__getitem__)
    with pytest.raises(InteropError, match=r"--dtype=float16 cannot .*final_layer\.linear\.bias"):
        write_model(model, "dit_pt", tmp_path / "x.pt", dtype="float16")
    assert not list(tmp_path.iterdir())
    write_model(model, "dit_pt", tmp_path / "x.pt", dtype="bfloat16")


def test_an_autoencoder_with_nan_is_refused(tmp_path):
    from dit_jax.interop.autoencoder_kl import load_autoencoder

    autoencoder, params = diffusers_autoencoder.ours(VAE, diffusers_autoencoder.create(VAE))
    params = jax.tree.map(lambda a: np.full_like(a, np.nan), params)
    save_autoencoder(tmp_path / "vae", autoencoder, params)
    with pytest.raises(InteropError, match=r"NaN or infinity in .*encoder.* and .* more"):
        load_autoencoder(tmp_path / "vae")

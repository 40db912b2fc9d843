"""Names with something before them: left out with a word, chosen between, or named as the cause."""

import numpy as np
import pytest
import torch

from dit_jax.interop.export import write_model
from dit_jax.interop.models import open_model
from dit_jax.interop.tensors import InteropError, TensorSpec, write_safetensors
from dit_jax.launch import convert
from tests.interop.test_models import TINY, assert_same, in_memory
from tests.launch.test_interop_commands import refusal

HEADS = {"num_heads": TINY.num_heads}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A state dict of the original's layout, its parameters here, and the same plus one."""
    path = tmp_path_factory.mktemp("plain") / "x.pt"
    model, params = in_memory(TINY)
    write_model(model, "dit_pt", path)
    tensors = torch.load(path)
    other = {n: t if n == "pos_embed" else t + 1 for n, t in tensors.items()}
    return tensors, params, other


def renamed(tensors, prefix):
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def lightning(state_dict):
    """What Lightning's Trainer saves, of the kinds of things that are in it."""
    return {
        "epoch": 3,
        "global_step": 100,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": state_dict,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 3}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.ones(())}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}],
        "lr_schedulers": [],
        "hyper_parameters": {"lr": 1e-4},
    }


def write_as_safetensors(tensors, path):
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    specs = {name: TensorSpec(a.shape, a.dtype) for name, a in arrays.items()}
    write_safetensors(path, specs, iter(arrays.values()))


@pytest.mark.parametrize(
    "prefix", ["model.", "ema.", "net.", "diffusion_model.", "model.diffusion_model.dit."]
)
def test_a_prefix_of_all_names_is_left_out(plain, tmp_path, prefix):
    tensors, params, _ = plain
    torch.save(renamed(tensors, prefix), tmp_path / "x.pt")
    found = open_model(tmp_path / "x.pt", **HEADS)
    assert_same(found, params)
    assert f"begin with {prefix!r}, which was left out" in found.notes[0]


def test_wrappers_of_wrappers_in_both_formats(plain, tmp_path):
    tensors, params, _ = plain
    inside = {n.replace("blocks.0", "blocks.0._orig_mod"): t for n, t in tensors.items()}
    for prefix in ("module._orig_mod.", "_orig_mod.module.", "_orig_mod.model.module."):
        torch.save(renamed(inside, prefix), tmp_path / "x.pt")
        write_as_safetensors(renamed(inside, prefix), tmp_path / "x.safetensors")
        for name in ("x.pt", "x.safetensors"):
            found = open_model(tmp_path / name, **HEADS)
            assert_same(found, params)
            assert any("left out" in note for note in found.notes)


def test_lightnings_average_is_taken_and_the_rest_is_named(plain, tmp_path):
    tensors, params, other = plain
    loss = {"loss.weight": torch.ones(3), "loss.bias": torch.ones(3)}
    both = renamed(other, "model.") | renamed(tensors, "ema_model.") | loss
    torch.save(lightning(both), tmp_path / "x.ckpt")
    found = open_model(tmp_path / "x.ckpt", **HEADS)
    assert_same(found, params)
    notes = "\n".join(found.notes)
    assert "'ema_model' was taken" in notes and "--weights=model takes another" in notes
    assert "2 tensors outside 'ema_model.'" in notes and "loss" in notes
    raw = open_model(tmp_path / "x.ckpt", weights="model", **HEADS)
    assert raw.weights == "model"
    assert np.array_equal(raw.read("x_embedder.bias"), found.read("x_embedder.bias") + 1)
    with pytest.raises(InteropError, match=r"'swa'.*--weights=model\|ema_model"):
        open_model(tmp_path / "x.ckpt", weights="swa", **HEADS)


def test_of_networks_that_nothing_tells_apart_none_is_guessed(plain, tmp_path, capsys):
    tensors, params, other = plain
    torch.save(renamed(tensors, "student.") | renamed(other, "teacher."), tmp_path / "x.pt")
    command = ["--to=dit_jax", "--num_heads=4", tmp_path / "x.pt", tmp_path / "out"]
    error = refusal(capsys, convert.main, *command)
    assert "2 networks" in error and "--weights=student|teacher" in error
    convert.main([str(a) for a in [*command, "--weights=student"]])
    assert "begin with 'student.'" in capsys.readouterr().out
    assert_same(open_model(tmp_path / "out"), params)


def test_a_prefix_that_is_the_cause_is_named_error(plain, tmp_path):
    tensors, *_ = plain
    mixed = {("a." if "final" in n else "b.") + n: t for n, t in tensors.items()}
    torch.save(mixed, tmp_path / "mixed.pt")
    with pytest.raises(InteropError, match=r"different prefixes \('a\.', 'b\.'\)"):
        open_model(tmp_path / "mixed.pt", **HEADS)
    broken = renamed(tensors, "model.")
    del broken["model.x_embedder.proj.bias"]
    torch.save(broken, tmp_path / "broken.pt")
    with pytest.raises(InteropError, match=r"(?s)missing: x_embedder\.proj\.bias.*'model\.'"):
        open_model(tmp_path / "broken.pt", **HEADS)
    other = {"model.joint_blocks.0.x_block.attn.qkv.weight": torch.ones(2, 2)}
    torch.save(other, tmp_path / "sd3.pt")
    with pytest.raises(InteropError, match=r"a Stable Diffusion 3 .* begin with 'model\.'"):
        open_model(tmp_path / "sd3.pt")

"""Training of a LoRA: the run holds factors alone, resumes, and is sampled, converted, exported."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from dit_jax.config import ConfigError
from dit_jax.interop.export import write_model
from dit_jax.interop.lora import load_lora
from dit_jax.interop.lora_runs import merged, open_adapter
from dit_jax.interop.models import open_configured, open_model
from dit_jax.interop.tensors import InteropError
from dit_jax.launch import convert, loading, train
from dit_jax.models import DiTConfig
from dit_jax.training.lora import LoraOptions
from dit_jax.tree_paths import by_path
from tests.interop.test_models import in_memory
from tests.launch.conftest import tiny_config

DIT = DiTConfig(
    image_size=8,
    in_channels=1,
    hidden_size=32,
    depth=1,
    num_heads=2,
    num_classes=10,
    learn_sigma=False,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "dit"
    model, _ = in_memory(DIT, process={"name": "flow"})
    write_model(model, "dit_jax", folder)
    return folder


def adapted(base, **overrides):
    values = {"lora.rank": 2, "lora.alpha": 4.0, "lora.base": str(base), "ema.power_stds": ()}
    values |= {"training.num_steps": 4, "training.checkpoint_every": 2, "training.log_every": 2}
    return tiny_config(**{**values, **overrides})


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "lora"
    options = {"training.preview_every": 4, "training.preview_images": 2}
    assert train.run(adapted(base, **options), workdir).step == 4
    return workdir


def test_a_run_resumes_bit_for_bit_and_holds_factors_alone(base, trained, tmp_path):
    train.run(adapted(base, **{"training.num_steps": 2}), tmp_path / "halves")
    result = train.run(adapted(base), tmp_path / "halves")
    first, second = (open_adapter(d, "raw")[1] for d in (trained, tmp_path / "halves"))
    assert first.factors.keys() == {"blocks.attn.qkv", "blocks.attn.proj"}
    for path, pair in first.factors.items():
        assert all(np.abs(factor).max() > 0 for factor in pair)
        jax.tree.map(np.testing.assert_array_equal, pair, second.factors[path])
    assert {path.rpartition("/")[2] for path in by_path(result.state.params)} == {
        "lora_a",
        "lora_b",
    }
    size = sum(leaf.size for leaf in jax.tree.leaves(result.state))
    assert size < 5 * sum(leaf.size for leaf in jax.tree.leaves(result.state.params))
    record = json.loads((trained / "frozen.json").read_text())
    assert record["base"]["source"] == str(base)
    assert (trained / "previews" / "step_00000004.png").exists()


def test_divided_over_devices_it_learns_the_same(base, trained, tmp_path):
    train.run(adapted(base, **{"mesh.fsdp": 4, "mesh.tensor": 2}), tmp_path / "divided")
    placed = (tmp_path / "divided" / "placement.txt").read_text().splitlines()
    assert any(line.split()[0].endswith("qkv/lora_b") and "tensor" in line for line in placed)
    whole, divided = (open_adapter(d, "raw")[1] for d in (trained, tmp_path / "divided"))
    for path, pair in whole.factors.items():
        for one, other in zip(pair, divided.factors[path], strict=True):
            np.testing.assert_allclose(one, other, atol=1e-3)


def test_it_is_sampled_and_converted_with_its_network_and_exported_alone(base, trained, tmp_path):
    network, adapter = open_adapter(trained, "raw")
    before = open_model(base).load()
    a, b = adapter.factors["blocks.attn.qkv"]
    wanted = before["blocks"]["attn"]["qkv"]["kernel"] + np.matmul(a, b)
    for params in (
        loading.load_model(trained, weights="raw").params,
        open_model(trained, weights="raw").load(),
    ):
        np.testing.assert_allclose(params["blocks"]["attn"]["qkv"]["kernel"], wanted, atol=1e-6)
        same = params["blocks"]["mlp"]["fc1"]["kernel"], before["blocks"]["mlp"]["fc1"]["kernel"]
        np.testing.assert_array_equal(*same)
    convert.main(["--to=lora", str(trained), str(tmp_path / "peft"), "--weights=raw"])
    again = load_lora(tmp_path / "peft", network)
    for path, (a, b) in adapter.factors.items():
        found = np.matmul(*again.factors[path])
        np.testing.assert_allclose(found, np.matmul(a, b), atol=1e-6)


def test_a_state_dict_is_read_for_sampling_as_it_was_for_training(base, trained, tmp_path):
    """Its tensors do not tell the number of heads, which the configuration does."""
    write_model(open_model(base), "sit_pt", tmp_path / "sit.pt")
    workdir = tmp_path / "run"
    train.run(adapted(f"sit_pt:{tmp_path}/sit.pt", **{"training.num_steps": 2}), workdir)
    network, adapter = open_adapter(workdir, "raw")
    assert network.config.num_heads == DIT.num_heads
    kernel = open_model(workdir, weights="raw").load()["blocks"]["attn"]["qkv"]["kernel"]
    before = open_model(base).load()["blocks"]["attn"]["qkv"]["kernel"]
    change = np.matmul(*adapter.factors["blocks.attn.qkv"])
    np.testing.assert_allclose(kernel, before + change, atol=1e-6)


def test_the_weights_of_a_base_are_those_configured_however_it_is_spelled(base, trained):
    for source in (trained, f"dit_jax:{trained}"):
        for weights, found in (("raw", "raw"), ("ema", "ema_0.9")):
            assert open_configured(str(source), weights, None).weights == found
    assert open_configured(str(base), "ema", None).kind == "dit_jax"  # which holds one set


def test_factors_that_diverged_are_refused(base):
    model = open_model(base)

    def read(name, dtype=np.float32):
        return np.full((1, 32, 2) if name.endswith("a") else (1, 2, 96), np.nan, dtype)

    factors = dataclasses.replace(
        model, read=read, paths=("blocks.attn.qkv.lora_a", "blocks.attn.qkv.lora_b")
    )
    with pytest.raises(InteropError, match=r"NaN or infinity in 1 of .*blocks\.attn\.qkv\.kernel"):
        merged(factors, model, LoraOptions(rank=2)).load()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora.base": ""}, "config.lora.rank=2 needs a trained model: set --config.lora.base"),
        ({"lora.layers": "nothing"}, "matches none of the network's linear layers"),
        ({"lora.rank": 0}, "would do nothing with config.lora.rank=0"),
        (
            {"method.name": "consistency", "lora.base": "x"},
            "config.method.name='consistency' trains no LoRA; set config.lora.rank=0, or one of",
        ),
    ],
)
def test_errors(base, tmp_path, values, message):
    with pytest.raises(ConfigError) as caught:
        train.run(adapted(base, **values), tmp_path / "run")
    assert message in str(caught.value)


def test_errors_of_what_does_not_go_with_it(base, tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"a LoRA's network is --config\.lora\.base"):
        train.run(adapted(base), tmp_path / "run", init_from=str(base))
    with pytest.raises(SystemExit):
        convert.main(["--to=lora", str(base), str(tmp_path / "x"), "--dry_run"])
    assert "--dry_run: would do nothing with --to=lora" in capsys.readouterr().err

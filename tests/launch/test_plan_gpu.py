"""launch/plan.py for GPUs that are not there, and what a compiled program has to be like."""

import json

import pytest

from tests.launch.conftest import run
from tests.plugin import needs_plugin

pytestmark = needs_plugin

# Of XL/2 in width, in a few layers: kernels are those of the whole, compilation is quick.
WIDE = (
    "--config.model.dit.hidden_size=1152",
    "--config.model.dit.num_heads=16",
    "--config.model.dit.depth=4",
    "--config.data.name=digits",
    "--config.model.num_classes=10",
)


def plan(tmp_path, *options):
    """(text, plan) of an experiment on H100."""
    out = tmp_path / "plan.json"
    text, _ = run("plan", "--config=configs/dit_xl2.py", *WIDE, f"--out={out}", *options)
    return text, json.loads(out.read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    options = ("--devices=1", "--config.training.batch_size=32", "--config.model.remat=block")
    return plan(tmp_path_factory.mktemp("plan"), *options)


def test_training_is_compiled_for_the_gpu(trained):
    text, found = trained
    chosen = found["chosen_for_target"]
    assert chosen["config.model.dtype"] == "bfloat16"
    assert chosen["config.model.attention"] == "cudnn"
    assert chosen["config.model.custom_gradients"] == "off"
    assert chosen["config.model.dit.layer_loop"] == "scan"
    assert "compiled for NVIDIA H100 SXM" in text and "*predicted*" in text
    kernels = found["programs"]["train"]["predicted"]["kernels"]
    assert kernels["cuDNN attention"]["count"] == 2 * 4  # recomputed
    assert kernels["cuDNN attention backward"]["count"] == 4
    assert not any(kind.startswith("product") for kind in kernels)  # all in libraries


def test_memory_is_xlas_own(trained):
    _, found = trained
    memory = found["memory"]
    kinds = memory["by_kind"]
    held = sum(memory["held_bytes"].values())
    assert kinds["arguments"] == pytest.approx(held, abs=4096)  # and a key
    unaliased = kinds["outputs"] - kinds["aliased"]
    total = held + kinds["temporaries"] + unaliased + kinds["code"]
    assert memory["total_bytes"] == total and memory["fits"]


def test_arithmetic_is_the_models_own_with_blocks_recomputed(trained):
    _, found = trained
    counted = found["programs"]["train"]["flops_per_device"]
    assert 1.3 < counted / found["model_flops"] < 1.4
    predicted = found["predicted"]
    assert predicted["seconds"] >= found["bounds"]["arithmetic_seconds"]
    assert predicted["mfu"] == pytest.approx(1 / predicted["over_arithmetic"])


def test_what_does_not_fit_is_told_with_the_remat_that_would(tmp_path):
    text, found = plan(tmp_path, "--devices=1", "--config.training.batch_size=64", "--hbm_gib=7.5")
    assert not found["memory"]["fits"] and "does not fit, by" in text
    remats = found["remats"]
    assert list(remats) in (["dots"], ["dots", "block"])
    last = list(remats)[-1]
    assert remats[last]["fits"], remats
    assert f"--config.model.remat={last} (compiled too: " in text

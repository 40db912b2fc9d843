"""launch/plan.py for GPUs that are not there, and what a compiled program has to be like."""

import json

import pytest

from dit_jax.training.remat_choice import POLICIES
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
    batch = ("--devices=1", "--config.training.batch_size=64", "--hbm_gib=4.5")
    text, found = plan(tmp_path, *batch, "--config.model.remat=none")
    assert not found["memory"]["fits"] and "does not fit, by" in text
    remats = found["remats"]
    last = list(remats)[-1]
    assert list(remats) == list(POLICIES[1 : 1 + len(remats)])
    assert remats[last]["fits"], remats
    assert f"--config.model.remat={last} (compiled too: " in text


def test_auto_is_the_first_policy_that_fits(tmp_path):
    text, found = plan(tmp_path, "--devices=1", "--config.training.batch_size=64")
    assert found["model"]["remat"] == "activations" and found["memory"]["fits"]
    assert list(found["remats_tried"]) == ["activations"]
    assert found["chosen_for_target"]["config.model.remat"] == "activations"
    assert "config.model.remat=auto takes the first that fits, in GiB: activations" in text


DEPTH, STEPS, WARMUP = 4, 12, 4


@pytest.mark.parametrize(
    "options",
    [
        # 1024 tokens, of 512 pixels, and 4096 with guidance.
        ("--config.model.image_size=64",),
        (
            "--config.model.image_size=128",
            "--config.sampling.guidance_scale=4",
            "--xla=xla_gpu_all_gather_combine_threshold_bytes=268435456",
        ),
    ],
)
def test_every_gather_of_a_displaced_step_has_a_layer_beside_it(tmp_path, options):
    """In the order in which the GPU's program launches: between a gather's start and its end."""
    _, found = plan(
        tmp_path,
        "--devices=8",
        "--what=sample",
        "--parallel=displaced",
        "--patch_devices=8",
        f"--warmup_steps={WARMUP}",
        "--config.sampling.solver=ddim",
        *options,
        f"--config.sampling.steps={STEPS}",
        "--config.sampling.batch_size=1",
    )
    communication = found["programs"]["sample"]["predicted"]["communication"]
    assert {entry["kind"] for entry in communication} == {"all-gather"}
    # In the loop over layers the next layer's, beside the last layer the next step's first.
    displaced_steps = STEPS - WARMUP
    displaced = [
        entry
        for entry in communication
        if entry["count"] in ((DEPTH - 1) * displaced_steps, displaced_steps)
    ]
    assert len(displaced) == 2 and displaced[0]["count"] != displaced[1]["count"]
    for entry in displaced:
        # Attention, its projection and the MLP's two products; often the map to q, k, v as well.
        assert entry["products"] >= 4 and not entry["is_synchronous"]
        assert entry["product_seconds"] + entry["other_seconds"] > entry["seconds"]
        assert entry["exposed"] == 0.0
    warmup = [entry for entry in communication if entry not in displaced]
    assert {entry["count"] for entry in warmup} == {DEPTH * WARMUP, WARMUP}


def test_an_option_of_xla_is_passed_on_and_an_unknown_one_refused(tmp_path):
    options = ("--devices=1", "--what=sample", "--config.sampling.batch_size=2")
    steps = "--config.sampling.steps=4"
    _, found = plan(tmp_path, *options, steps, "--xla=xla_gpu_enable_triton_gemm=true")
    kernels = found["programs"]["sample"]["predicted"]["kernels"]
    assert "Triton product bf16" in kernels and "cuBLASLt bf16" not in kernels
    _, error = run(
        "plan",
        "--config=configs/dit_xl2.py",
        *WIDE,
        *options,
        steps,
        "--xla=xla_gpu_no_such_option=1",
        status=2,
    )
    assert "xla_gpu_no_such_option" in error and "Traceback" not in error

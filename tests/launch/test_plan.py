"""launch/plan.py: one real run of the command, its numbers against counts by hand, its errors."""

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from dit_jax import experiment
from dit_jax.configs import dit_7b, dit_xl2
from dit_jax.launch import planning
from dit_jax.parallel.mesh import AXES, DataParallel
from dit_jax.parallel.planning import programs
from dit_jax.parallel.planning.report import format_plan
from dit_jax.parallel.sampling import ImageParallel
from tests.launch.conftest import run, tiny_config

DEVICES, FSDP = 8, 4


def dit_parameters(width, depth, *, patch_values, out_values, classes):
    """Parameters of a DiT in closed form: matrices, then biases."""
    blocks = depth * (18 * width**2 + 15 * width)  # qkv 3, proj 1, MLP 8, modulation 6
    embedders = patch_values * width + width + 256 * width + width + width**2 + width
    table = (classes + 1) * width if classes else 0
    final = 2 * width**2 + 2 * width + width * out_values + out_values
    return blocks + embedders + table + final


@pytest.fixture(scope="module")
def planned(tiny_file, tmp_path_factory):
    """(text, plan) of the tiny experiment on 8 devices, states divided over 4, memory of 1 KiB."""
    out = tmp_path_factory.mktemp("plans") / "plan.json"
    text, _ = run(
        "plan",
        f"--config={tiny_file}",
        f"--devices={DEVICES}",
        "--hbm_gib=0.00001",
        "--config.mesh.data=2",
        f"--config.mesh.fsdp={FSDP}",
        "--config.model.dit.depth=3",
        f"--out={out}",
    )
    return text, json.loads(out.read_text())


def test_state_bytes_equal_a_count_by_hand(planned):
    _, plan = planned
    count = dit_parameters(32, 3, patch_values=4, out_values=4, classes=10)
    assert plan["num_parameters"] == count
    held = plan["memory"]["held_bytes"]
    # Every dimension that is divided is a multiple of 4 here: exactly a quarter on each device.
    assert held["parameters"] == 4 * count / FSDP
    assert held["averages"] == 2 * held["parameters"]
    counters = held["optimizer"] - 2 * held["parameters"]  # optax's, not divided
    assert 0 <= counters <= 8
    assert held["batch"] == 16 * (8 * 8 * 4 + 4) / DEVICES


def test_work_and_traffic_are_as_expected(planned):
    text, plan = planned
    (found,) = plan["programs"].values()
    counted = found["flops_per_device"] * DEVICES
    assert counted == pytest.approx(plan["model_flops"], rel=0.03)
    assert 3 in found["loops"].values() and not found["loops_of_unknown_length"]
    # Weights of the blocks in bfloat16 are gathered forwards and backwards, and little else is.
    gathered = found["collectives"][f"all-gather bf16 of {FSDP}"]["bytes_sent"]
    blocks = 3 * (18 * 32**2 + 15 * 32)
    assert blocks * 2 <= gathered / (3 / 4) <= 2 * plan["num_parameters"] * 2
    assert any(kind.startswith("reduce-scatter") for kind in found["collectives"])
    assert (
        "on the target: config.model.dtype=bfloat16" in text and "collectives of one device" in text
    )


def test_what_does_not_fit_is_told_with_what_to_try(planned):
    text, plan = planned
    memory = plan["memory"]
    lacking = (memory["total_bytes"] - memory["capacity_bytes"]) / 2**30
    assert not memory["fits"] and f"does not fit, by {lacking:.3f} GiB" in text
    assert "--config.model.remat=block" in text
    assert "--config.training.num_microbatches=2" in text
    assert "--config.mesh.data=1 --config.mesh.fsdp=8" in text
    assert "--config.mesh.tensor=2 --config.mesh.data=1 (matrices" in text


def test_seven_billion_parameters_and_the_size_of_a_state():
    for config, width, depth in ((dit_7b, 4096, 23), (dit_xl2, 1152, 28)):
        method = experiment.build_method(experiment.resolve_config(config.get_config()))
        state = jax.eval_shape(method.init, jax.random.key(0))
        count = dit_parameters(width, depth, patch_values=16, out_values=32, classes=1000)
        assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params)) == count
        if config is dit_7b:
            assert count == pytest.approx(7e9, rel=0.001)


def test_sampling_is_planned_and_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(planning.wiring, "create_placement", lambda *_: one_device())
    cached = {"cache.name": "first_block", "sampling.steps": 8, "model.dit.depth": 4}
    config = tiny_config(**cached)

    def plan_with(**options):
        return planning.make_plan(
            config, "sample", "tpu_v5p", 1, tmp_path, reason="a test", **options
        )

    plan = plan_with(computed_share=0.5)
    found = plan["programs"]["sample"]
    assert 8 in found["loops"].values() and not found["collectives"]
    # Of four blocks the first runs always, the others in half of the evaluations.
    block = 8 * 32**2 * (4 + 8) * 2 * 16 + 4 * 16**2 * 32 * 8
    expected = plan["model_flops"] - 0.5 * 3 * block * plan["batch_size"]
    assert found["flops_per_device"] == pytest.approx(expected, rel=0.05)
    text = format_plan(plan)
    assert "fits: " in text and "Assumed, not found out: 50.0% of the evaluations" in text
    assert "upper bound if 50.0% of the evaluations are computed in full: " in text
    with pytest.raises(ValueError, match=r"=0.2: of 8 evaluations at least 3 \(37.5%\) are comput"):
        plan_with(computed_share=0.2)
    config.cache.name = "none"
    with pytest.raises(ValueError, match="would do nothing: there is no step cache"):
        plan_with(computed_share=0.5)


def test_a_cpu_is_planned_as_a_cpu_and_without_times(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(planning.wiring, "create_placement", lambda *_: one_device())
    assert planning.why_virtual("cpu") == ""
    plan = planning.make_plan(tiny_config(), "train", "cpu", 1, tmp_path)
    chosen = plan["chosen_for_target"]
    assert chosen["config.model.dtype"] == "float32"
    assert chosen["config.model.dit.layer_loop"] == "unroll"
    json.dumps(plan, allow_nan=False)
    text = format_plan(plan)
    assert "no times for CPUs" in text and "on GPUs expect less" not in text


def one_device():
    """A placement on the first of the devices of these tests."""
    kinds = (jax.sharding.AxisType.Auto,) * len(AXES)
    return DataParallel(jax.make_mesh((1,) * 4, AXES, devices=jax.devices()[:1], axis_types=kinds))


def test_teachers_have_shapes_without_files():
    config = tiny_config(**{"model.second_time": "r", "model.dtype": "float32"})
    placement = one_device()
    teacher = programs._frozen_model(config, "teacher", placement)
    student = jax.eval_shape(experiment.build_network(config).init, jax.random.key(0))
    assert "r_embedder" in student and "r_embedder" not in teacher
    assert programs.bytes_per_device(teacher) == programs.whole_bytes(teacher)
    assert np.dtype(jax.tree.leaves(teacher)[0].dtype) == np.float32


def test_errors_of_the_command(tiny_file):
    _, error = run("plan", f"--config={tiny_file}", "--devices=4", "--config.mesh.x=2", status=2)
    assert "unknown key config.mesh.x" in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"accelerator_name": "abacus"}, "accelerator='abacus': expected one of h100"),
        ({"what": "evaluate"}, "--what='evaluate': expected one of train, sample"),
        ({"devices": 0}, "--devices=0: expected at least 1"),
        ({"computed_share": 0.5}, "--computed_share=0.5 would do nothing with --what=train"),
        ({"computed_share": 0.0, "what": "sample"}, "--computed_share=0.0: expected above 0 and"),
        ({"hbm_gib": -1.0}, "--hbm_gib=-1.0: expected above 0"),
        ({"hbm_gib": float("nan")}, "--hbm_gib=nan: expected above 0"),
        ({"out": Path(__file__)}, "exists: choose another --out"),
        ({"out": Path("plan.txt"), "overwrite": True}, "plan.txt: its name must end in .json"),
    ],
)
def test_errors_of_options(option, message):
    with pytest.raises((ValueError, OSError), match=message):
        planning.check_options(
            **{"what": "train", "devices": 4, "accelerator_name": "h100", **option}
        )


def test_products_that_need_the_gpu_itself_are_not_planned(tmp_path):
    config = tiny_config(**{"model.quantization": "te"})
    with pytest.raises(ValueError, match="there is no NVIDIA H100 SXM here: it cannot be planned"):
        planning.make_plan(config, "train", "h100", 1, tmp_path, reason="a test")


def test_options_of_xla():
    given = ["xla_gpu_a=true", "--xla_gpu_b=3", "xla_gpu_c=x=y"]
    options = {"xla_gpu_a": True, "xla_gpu_b": "3", "xla_gpu_c": "x=y"}
    assert planning.xla_options(given) == options
    for wrong in ("xla_gpu_a", "gpu_a=1"):
        with pytest.raises(ValueError, match="expected NAME=VALUE"):
            planning.xla_options([wrong])
    planning.check_xla_options({}, "h100", "a test")
    with pytest.raises(ValueError, match=r"--xla=xla_gpu_a=... would do nothing.*\(a test\)"):
        planning.check_xla_options(options, "h100", "a test")


def test_devices_share_images_in_sampling_only():
    parallel = ImageParallel("displaced", patch_devices=4)
    with pytest.raises(ValueError, match="--parallel=displaced would do nothing with --what=train"):
        planning.check_options(what="train", devices=4, accelerator_name="h100", parallel=parallel)
    with pytest.raises(ValueError, match=r"accelerator='h10': expected one of .*did you mean h100"):
        planning.check_options(what="train", devices=4, accelerator_name="h10")


def test_errors_of_mesh_and_batch(tmp_path):
    def plan(what="train", **overrides):
        config = tiny_config(**{k.replace("__", "."): v for k, v in overrides.items()})
        planning.make_plan(config, what, "h100", DEVICES, tmp_path, reason="a test")

    with pytest.raises(ValueError, match="a batch of 20 is not divisible by 8 devices"):
        plan(training__batch_size=20)
    with pytest.raises(ValueError, match=r"a batch of 20 .*batch_size=24"):
        plan("sample", sampling__batch_size=20)
    with pytest.raises(ValueError, match="multiply to 6, but there are 8 devices"):
        plan(mesh__data=2, mesh__fsdp=3)

"""The benchmark of distillation: every method can be built on every network, and its arithmetic."""

import pytest

import benchmark_distillation as benchmark
import benchmark_fastgen
from dit_jax import experiment, options

LEAST = {  # forward passes on the networks of one time and class
    "denoising": 3,
    "kd": 3,
    "consistency training": 4,
    "consistency distillation": 5,
    "tcm, second stage": 4,
    "sCT": 4,
    "sCD": 5,
}


def test_all_methods_are_measured():
    distilling = set(options.sections()["method"].choices) - {"denoising"}
    assert {name for name, _ in benchmark.VARIANTS.values()} == distilling


@pytest.mark.parametrize("network", list(benchmark.NETWORKS))
def test_all_variants_of_a_network_are_built(network):
    for variant in ["denoising", *benchmark.VARIANTS]:
        method = experiment.build_method(benchmark.configure(network, variant))
        one = benchmark.configure(network)
        forward = experiment.build_method(one).flops_per_example / 3
        assert method.flops_per_example / forward == pytest.approx(
            LEAST.get(variant, method.flops_per_example / forward)
        )
        if variant.startswith(("dmd2", "f_distill", "ladd")):
            student, critic = (method.flops_of(phase) / forward for phase in method.phases)
            assert 4 <= student < 7 and 2 <= critic < 6


def test_rows_and_table():
    rows = benchmark.measure_network("digits", 1, batch_size=2, variants=["kd"])
    assert [row["method"] for row in rows] == ["denoising", "kd"]
    assert rows[1]["passes_over_denoising"] == 1 and rows[1]["gib"] > 0
    assert "| kd | " in benchmark.table(rows)


def test_other_folders_than_fastgen_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkout of FastGen"):
        benchmark_fastgen.student_step(tmp_path, 2)

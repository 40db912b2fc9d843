"""The ladder: its rows, the sampler of each rung, and what is written."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import ladder
import rungs
from dit_jax.interop.flux_files import save_flux
from dit_jax.models import FluxConfig, Network
from tests.launch.conftest import TINY
from tests.long import only_long
from tests.models.conftest import random_params

WORK = rungs.Workload(
    workdir="",
    config="configs/digits.py",
    pretrained="",
    network="dit",
    changes={},
    solver="euler",
    steps=10,
    batch_size=4,
    guidance_scale=1.5,
    quantization="int8",
    threshold=0.3,
    programs="",
)


def test_every_switch_is_added_once_stands_alone_and_is_left_out():
    groups = rungs.settings(("compiled", "bfloat16", "quantized"))
    assert [s.name for s in groups["ladder"]] == [
        "baseline",
        "+ compiled",
        "+ bfloat16",
        "+ quantized",
    ]
    assert groups["ladder"][-1].on == groups["off"][0].on == ("compiled", "bfloat16", "quantized")
    assert {s.on for s in groups["alone"][1:]} == {
        ("compiled", "bfloat16"),
        ("compiled", "quantized"),
    }
    assert {s.on for s in groups["off"][1:]} == {
        ("compiled", "bfloat16"),
        ("compiled", "quantized"),
    }


def test_switches_change_the_program_and_hardly_the_images(tmp_path):
    config = tmp_path / "tiny.py"
    config.write_text(TINY.replace("depth=1", "depth=2"))
    work = dataclasses.replace(WORK, config=str(config), programs=str(tmp_path / "programs"))

    def images(*on):
        draw, computed = rungs.sampler(work, on)
        return np.asarray(jax.block_until_ready(draw())), computed

    baseline, _ = images()
    assert baseline.std() > 0.1  # random parameters, no network of zeros
    kept, computed = images("compiled", "kept program")
    assert computed() == 1
    assert ladder.psnr(kept, baseline) is None or ladder.psnr(kept, baseline) > 90
    cached, computed = images("compiled", "quantized", "step cache")
    assert computed() < 1
    assert 10 < ladder.psnr(cached, baseline) < 130  # other bits, nearly the same images


def test_a_flux_is_read_from_a_folder_and_told_arrays_in_place_of_a_text(tmp_path):
    config = FluxConfig.from_name("flux_tiny", depth=1, single_depth=1, guidance_embedding=True)
    save_flux(tmp_path / "flux", Network(config), random_params(Network(config)))
    args = ladder.parse_arguments(
        [
            f"--pretrained={tmp_path / 'flux'}",
            *("--out=x", "--steps=2", "--batch_size=1", "--guidance_scale=1"),
            *("--config.model.image_size=8", "--config.model.flux.text_length=3"),
        ]
    )
    work = ladder.workload(args, "")
    assert work.network == "flux" and work.changes["model.image_size"] == 8
    images = np.asarray(rungs.sampler(work, ("compiled", "layers apart"))[0]())
    assert images.shape == (1, 8, 8, config.in_channels) and 0.1 < images.std() < 10


def row(name, group, seconds, **more):
    return {
        "name": name,
        "group": group,
        "device": "cpu",
        "median_seconds": seconds,
        "mean_seconds": seconds,
        "variance": 0.0,
        "speed": 2 / seconds,
        "start_seconds": 3.0,
        "peak_bytes": 2**30,
        "psnr": None,
        **more,
    }


def test_the_record_the_table_and_the_picture_are_written(tmp_path):
    args = ladder.parse_arguments(["--config=configs/digits.py", f"--out={tmp_path / 'l'}"])
    rows = [row("baseline", "ladder", 2.0), row("+ compiled", "ladder", 1.0, psnr=60.0)]
    table = ladder.save(args, WORK, [*rows, row("compiled", "alone", 1.0)])
    assert "| + compiled | 1.000 | 1.000 | 0.0e+00 | 2.00 | 3.0 | 1.00 | 60.0 |" in table
    assert json.loads((tmp_path / "l.json").read_text())["rows"][1]["psnr"] == 60.0
    assert (tmp_path / "l.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--out is missing"),
        (["--out=x"], "what is sampled"),
        (["--out=x.json", "--config=c"], "--out=x.json: expected a name without a suffix, as x"),
        (["--out=x", "--workdir=r", "--predict=h100"], "weights do not change"),
        (["--out=x", "--config=c", "--predict=h100", "--trace=t"], "nothing runs"),
        (["--out=x", "--config=c", "--computed_share=0.5"], "nothing without --predict"),
        (["--out=x", "--config=c", "--confg.model.x=1"], "unrecognized argument: --confg.model.x"),
        (["--out=x", "--config=c", "--predict=h100", "--runs=3"], "--runs would do nothing"),
    ],
)
def test_command_lines_that_cannot_be_meant_are_refused(options, message, capsys):
    with pytest.raises(SystemExit):
        ladder.parse_arguments(options)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 7}, r"the row '\+ step cache': .*at least 8; .* \(--without 'step cache'\)"),
        ({"config": "digit"}, "--config=digit: no such file"),
        ({"solver": "eulr"}, "^config.sampling.solver='eulr': .*did you mean euler"),
    ],
)
def test_rows_that_cannot_be_sampled_are_refused_before_any_is(change, message):
    settings = rungs.settings(("compiled", "step cache"))
    work = dataclasses.replace(WORK, config="configs/digits.py")
    rungs.check(work, settings["alone"])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        rungs.check(dataclasses.replace(work, **change), settings["ladder"])


@only_long
def test_rows_are_processes_that_take_turns(tmp_path):
    out = tmp_path / "ladder"
    without = ["bfloat16", "fused attention", "quantized", "step cache"]
    small = ["--steps=8", "--runs=2", "--batch_size=4", "--groups", "ladder"]
    ladder.main(["--config=configs/digits.py", *small, "--without", *without, f"--out={out}"])
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert [r["name"] for r in rows] == ["baseline", "+ compiled", "+ kept program"]
    assert all(len(r["seconds"]) == 2 and r["peak_bytes"] > 2**20 for r in rows)
    assert rows[1]["psnr"] is None or rows[1]["psnr"] > 90

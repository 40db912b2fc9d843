"""FLUX trains by the ordinary loop, on latents and text states that were computed ahead."""

import importlib
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from dit_jax import FluxPipeline, data
from dit_jax.interop import flux_pipelines
from dit_jax.interop.export import write_model
from dit_jax.interop.flux_files import load_flux, save_flux
from dit_jax.interop.models import open_model
from dit_jax.launch import (
    convert,
    evaluate,
    next_steps,
    pretrained_arguments,
    sample,
    training,
)
from dit_jax.models.flux_config import PRESETS
from dit_jax.training.workdir import load_config
from tests.interop.test_models import in_memory
from tests.launch.test_lora import DIT
from tests.references import diffusers_flux_pipeline as reference

TINY = PRESETS["flux_tiny"]
SIDE, TEXT = TINY["image_size"], (3, TINY["text_dim"])


def write_records(folder, count=16):
    random = np.random.default_rng(0)
    told = {"text": TEXT, "pooled": (TINY["pooled_dim"],)}
    fields = {name: data.Field(shape, "bfloat16", condition=True) for name, shape in told.items()}
    shape = (SIDE, SIDE, TINY["in_channels"])
    header = data.latents_header(
        shape, scaling_factor=1.0, kind="samples", flip="none", conditions=fields
    )
    nulls = {name: np.zeros(shape, np.float32) for name, shape in told.items()}
    writer = data.RecordWriter(folder, header, nulls=nulls)
    arrays = {name: random.normal(size=(count, *shape)) for name, shape in told.items()}
    writer.add(latents=random.normal(size=(count, 1, *shape)), **arrays)
    writer.finish()


def tiny_config(records, **values):
    config = importlib.import_module("dit_jax.configs.flux_tiny").get_config()
    config.data.latents.path = str(records)
    config.training.update(num_steps=3, batch_size=8, log_every=1, preview_every=0)
    config.training.update(checkpoint_every=0, tensorboard=False)
    config.optimizer.update(warmup_steps=0, schedule="constant")
    config.model.flux.update(layer_loop="scan", depth=1, single_depth=1)
    config.update_from_flattened_dict(values)
    return config


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features") / "records"
    write_records(folder)
    return folder


@pytest.fixture(scope="module")
def run(records, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tuned"
    assert training.run(tiny_config(records), folder).step == 3
    return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """The folder of diffusers' pipeline whose transformer has the shape of the run's."""
    folder = tmp_path_factory.mktemp("pipelines") / "tiny"
    reference.create(guidance=False).save_pretrained(folder)
    return folder


def test_flux_tiny_trains_and_its_transformer_is_diffusers(run, tmp_path):
    model = open_model(run)
    assert model.network.config.title == "FLUX of 1 and 1 blocks, width 32, 2 heads"
    params = model.load()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert np.any(params["single_blocks"]["adaLN_modulation"]["kernel"])  # began at zero
    save_flux(tmp_path / "transformer", model.network, params)
    again = load_flux(tmp_path / "transformer")[1]
    assert jax.tree.all(jax.tree.map(np.array_equal, again, params))


SMALL = {"height": 8, "width": 8, "num_inference_steps": 2, "max_sequence_length": 24}
OPTIONS = ("--prompt=a cat", "--height=8", "--width=8", "--steps=2", "--max_sequence_length=24")


def made(folder):
    return np.asarray(Image.open(next(folder.glob("*.png"))), np.float64)


def refusal(capsys, command, *options):
    with pytest.raises(SystemExit) as ended:
        command.main(list(options))
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_a_run_goes_back_into_a_pipeline_and_is_sampled_in_one(run, pipeline, tmp_path, capsys):
    import diffusers

    convert.main(["--to=diffusers", f"--pipeline={pipeline}", str(run), str(tmp_path / "whole")])
    for file in (f for f in pipeline.rglob("*") if f.is_file()):
        name = file.relative_to(pipeline)
        if name.parts[0] != "transformer":
            assert (tmp_path / "whole" / name).read_bytes() == file.read_bytes()
    theirs = diffusers.FluxPipeline.from_pretrained(tmp_path / "whole")
    theirs.set_progress_bar_config(disable=True)
    noise = np.random.default_rng(0).normal(size=(1, 4, 4, 4)).astype(np.float32)
    latents = reference.packed(noise)
    wanted = theirs("a cat", latents=latents, output_type="np", **SMALL).images
    ours = FluxPipeline.from_pretrained(pipeline, transformer=run)
    found = ours("a cat", latents=noise, output_type="np", **SMALL).images
    np.testing.assert_allclose(found, wanted, atol=1e-4)

    given = (f"--pipeline={tmp_path / 'whole'}", "--to=diffusers", str(run), "--overwrite")
    assert "is the pipeline being read" in refusal(capsys, convert, *given, f"{tmp_path}/whole")
    inside = refusal(capsys, convert, *given, f"{tmp_path}/whole/sub")
    assert f"whole/sub is inside {tmp_path / 'whole'}, the pipeline being read" in inside
    outs = [tmp_path / name for name in ("tuned", "whole_again", "plain")]
    sample.main([f"--pretrained={pipeline}", f"--workdir={run}", *OPTIONS, f"--out={outs[0]}"])
    sample.main([f"--pretrained={tmp_path / 'whole'}", *OPTIONS, f"--out={outs[1]}"])
    sample.main([f"--pretrained={pipeline}", *OPTIONS, f"--out={outs[2]}"])
    np.testing.assert_array_equal(made(outs[0]), made(outs[1]))
    assert np.abs(made(outs[0]) - made(outs[2])).max() > 5
    assert json.loads((tmp_path / "tuned.json").read_text())["workdir"] == str(run)


def test_what_comes_after_a_run_is_a_command_that_works(run, records, pipeline, tmp_path):
    config = load_config(run)
    command = ["python", "launch/convert.py", "--to=diffusers", str(run), "transformer"]
    assert next_steps.after_training(config, run) == command
    (tmp_path / "init_from.json").write_text(json.dumps({"path": str(pipeline)}))
    _, script, *options = next_steps.after_training(config, tmp_path)
    assert script == "launch/sample.py"
    assert options == [
        *(f"--pretrained={pipeline}", f"--workdir={tmp_path}", "--prompt=a cat"),
        *(f"--height={2 * SIDE}", f"--width={2 * SIDE}", "--steps=8", "--max_sequence_length=3"),
        "--out=cat.png",
    ]
    args = sample.parse_arguments(options)
    pretrained_arguments.check_pretrained(args)


def test_a_lora_of_a_run_is_used_in_the_pipeline(records, pipeline, tmp_path):
    values = {"lora.rank": 2, "lora.base": str(pipeline), "training.num_steps": 2}
    values |= {"optimizer.learning_rate": 0.1}
    training.run(tiny_config(records, **values), tmp_path / "style")
    convert.main(["--to=lora", str(tmp_path / "style"), str(tmp_path / "style.safetensors")])
    for name, option in (("run", "workdir=style"), ("file", "lora=style.safetensors")):
        option, _, path = option.partition("=")
        options = [f"--pretrained={pipeline}", f"--{option}={tmp_path / path}", *OPTIONS]
        sample.main([*options, f"--out={tmp_path / name}"])
    assert np.abs(made(tmp_path / "run") - made(tmp_path / "file")).max() <= 1


def test_without_a_pipeline_the_command_that_works_is_said(run, pipeline, tmp_path, capsys):
    out = tmp_path / "cat.png"
    said = refusal(capsys, sample, f"--workdir={run}", f"--out={out}")
    assert f"python launch/sample.py --pretrained=FLUX.1-dev --workdir={run}" in said
    assert "'--prompt=a cat'" in said and str(out) in said
    said = refusal(capsys, evaluate, f"--workdir={run}", f"--out={tmp_path / 'scores.json'}")
    assert "is a FLUX, which is told prompts" in said and "--out=cat.png" in said
    given = (f"--pretrained={pipeline}", "--prompt=a", f"--out={out}")
    assert "--step would do nothing beside --pretrained without" in refusal(
        capsys, sample, *given, "--step=3"
    )
    both = refusal(capsys, sample, *given, f"--workdir={run}", f"--init_from={run}")
    assert "--workdir and --init_from: give one of them" in both


def test_what_does_not_go_into_a_pipeline_is_refused(run, pipeline, tmp_path, capsys, monkeypatch):
    whole, dit = tmp_path / "whole", tmp_path / "dit"
    to = ("--to=diffusers", f"--pipeline={pipeline}", str(run))
    given = (f"--pipeline={run}", "--to=diffusers", str(run), str(whole))
    assert "has no model_index.json" in refusal(capsys, convert, *given)
    assert "--pipeline=none does not exist" in refusal(
        capsys, convert, "--to=diffusers", "--pipeline=none", str(run), str(whole)
    )
    write_model(in_memory(DIT)[0], "dit_jax", dit)
    other = ("--to=diffusers", f"--pipeline={pipeline}", str(dit), str(whole))
    assert "is for FLUX: this model is a DiT" in refusal(capsys, convert, *other)
    own = refusal(capsys, convert, *to, str(pipeline), "--overwrite")
    assert "a folder that no conversion wrote" in own
    guided = tmp_path / "guided"
    shutil.copytree(pipeline, guided)
    settings = guided / "transformer" / "config.json"
    values = json.loads(settings.read_text()) | {"guidance_embeds": True}
    settings.write_text(json.dumps(values))
    message = refusal(
        capsys, convert, "--to=diffusers", f"--pipeline={guided}", str(run), str(whole)
    )
    assert "its transformer is told a guidance scale (dev), this model is told none" in message
    index = guided / "model_index.json"
    index.write_text(index.read_text().replace("FluxPipeline", "StableDiffusionPipeline"))
    given = ("--to=diffusers", f"--pipeline={guided}", str(run), str(whole))
    assert "is a 'StableDiffusionPipeline'" in refusal(capsys, convert, *given)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(flux_pipelines.shutil, "disk_usage", lambda path: usage)
    assert "1000 bytes free; the pipeline needs" in refusal(capsys, convert, *to, str(whole))
    assert not whole.exists()

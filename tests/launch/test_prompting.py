"""launch/sample.py --pretrained: pictures of prompts."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from dit_jax import FluxPipeline
from dit_jax.launch import compile as compile_command
from dit_jax.launch import pretrained_arguments, prompting, sample
from tests.launch.served import Painter
from tests.references import diffusers_flux_pipeline as reference

SMALL = ("--height=8", "--width=12", "--steps=2", "--max_sequence_length=24", "--seed=3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux") / "tiny"
    reference.create().save_pretrained(folder)
    return folder


def run(folder, *options):
    sample.main([f"--pretrained={folder}", *SMALL, *options])


def refusal(capsys, *options):
    with pytest.raises(SystemExit) as ended:
        sample.main([*SMALL, *options])
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_prompts_of_a_file_become_a_folder_a_grid_and_those_of_python(folder, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a cat\nStraße, 猫\n", encoding="utf-8")
    prompts = f"--prompts={tmp_path / 'prompts.txt'}"
    programs = ("--num_images=3", "--batch_size=2", f"--programs={tmp_path / 'programs'}")
    compile_command.main([f"--pretrained={folder}", *SMALL, *programs])
    kept = sorted(file.name.partition("-")[0] for file in (tmp_path / "programs").iterdir())
    assert kept == ["decode", "encode", "encode", "sample"]
    assert "2 pictures at once of FLUX" in capsys.readouterr().out
    run(folder, prompts, *programs, f"--out={tmp_path / 'made'}")
    said = capsys.readouterr().out
    assert "sampling 3 pictures of" in said and said.count(" is ready: ") == 4
    assert "compiling" not in said
    made = [np.asarray(Image.open(file)) for file in sorted((tmp_path / "made").glob("*.png"))]
    pipe = FluxPipeline.from_pretrained(folder)
    sizes = {"height": 8, "width": 12, "num_inference_steps": 2, "max_sequence_length": 24}
    wanted = pipe(["a cat", "Straße, 猫"], seed=3, **sizes).images
    for found, image in zip(made[:2], wanted, strict=True):
        assert np.abs(found.astype(int) - np.asarray(image)).max() <= 1
    assert len(made) == 3 and np.abs(made[2].astype(int) - made[0]).max() > 20  # another number
    record = json.loads((tmp_path / "made.json").read_text())
    assert record["prompts"] == ["a cat", "Straße, 猫", "a cat"] and record["height"] == 8
    image = f"--image={next((tmp_path / 'made').glob('*.png'))}"
    options = (image, "--keep_image_size", f"--out={tmp_path / 'edited'}")
    run(folder, "--prompt=a cat", "--fsdp=2", *options)
    said = capsys.readouterr().out
    assert "weights divided over 2 devices, each with at most" in said
    assert "was not saved as a FluxKontextPipeline" in said
    edited = np.asarray(Image.open(next((tmp_path / "edited").glob("*.png"))))
    assert np.abs(edited.astype(int) - made[0]).max() > 3
    assert len(json.loads((tmp_path / "edited.json").read_text())["image"]) == 64
    run(folder, "--prompt", "a cat", "a dog " * 40, "--num_images=2", f"--out={tmp_path / 'a.png'}")
    assert "warning: T5 takes 24 tokens" in capsys.readouterr().err
    assert np.asarray(Image.open(tmp_path / "a.png")).std() > 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--prompt=a cat"],
            "--prompt, --max_sequence_length: give a pipeline that takes prompts, --pretrained=DIR",
        ),
        (["--pretrained=FOLDER"], "--pretrained needs either --prompt or --prompts"),
        (
            ["--pretrained=FOLDER", "--prompt=a", "--labels=3", "--vae=x"],
            "--vae, --labels would do",
        ),
        (["--pretrained=FOLDER", "--prompt=a", "--step=0"], "--step would do nothing beside"),
        (["--pretrained=FOLDER", "--prompt=a", "--vae_tile=3"], "--vae_tile: '3': expected a mult"),
        (
            ["--pretrained=FOLDER", "--prompt=a", "--prompts=FILE"],
            "--prompt and --prompts: give one of them",
        ),
        (["--pretrained=FOLDER", "--prompts=none.txt"], "--prompts=none.txt cannot be read (no"),
        (["--pretrained=FOLDER", "--prompt=a", "--lora=FILE:abc"], "the weight 'abc' is no number"),
        (["--pretrained=FOLDER", "--prompt=a", "--height=10"], "expected multiples of 4"),
        (["--pretrained=FOLDER", "--prompt=a", "--max_sequence_length=600"], "expected 2 to 512"),
        (["--pretrained=FOLDER", "--prompt=a", "--patch_devices=2"], "without --parallel"),
        (["--pretrained=FOLDER", "--prompt=a", "--step_cache=0.1"], "cannot pay in 2 evaluations"),
        (
            ["--pretrained=FOLDER", "--prompt=a", "--parallel=ring", "--patch_devices=9"],
            "--patch_devices=9 needs 9 devices; there are 8",
        ),
        (
            ["--pretrained=FOLDER", "--prompt=a", "--fsdp=4", "--tensor=4"],
            "--fsdp=4 times --tensor=4 are 16 devices; there are 8",
        ),
        (
            [
                "--pretrained=FOLDER",
                "--prompt=a",
                "--fsdp=2",
                "--parallel=ring",
                "--patch_devices=2",
            ],
            "--fsdp divides weights over devices, --parallel=ring pictures",
        ),
        (
            ["--pretrained=FOLDER", "--prompt=a", "--tensor=2", "--programs=x"],
            "--programs: of weights that --tensor divides none are kept",
        ),
        (
            ["--pretrained=FOLDER", "--prompt=a", "--fsdp=2", "--offload"],
            "--offload keeps the encoders' weights on the host, --fsdp divides them",
        ),
        (
            ["--pretrained=FOLDER", "--prompt=a", "--vae_tile=8", "--vae_devices=2"],
            "--vae_tile=8 decodes by several small programs on one device: leave --vae_devices out",
        ),
        (["--pretrained=FOLDER", "--prompt=a", "--lora=x:0"], "expected a weight other than 0"),
        (["--pretrained=FOLDER", "--prompt=a", "--lora=none.pt:2"], "none.pt does not exist"),
        (["--pretrained=FOLDER", "--prompt=a", "--lora_ignore_text_encoders"], "is of --lora"),
        (
            ["--pretrained=FOLDER", "--prompt=a", "--allow_nonfinite"],
            "is of --lora and --init_from",
        ),
        (["--pretrained=FOLDER", "--prompt=a", "--image=none.png"], "--image=none.png cannot be"),
        (
            ["--pretrained=FOLDER", "--prompt=a", "--image=FILE"],
            "prompts.txt cannot be read: not an",
        ),
        (
            ["--pretrained=FOLDER", "--prompt=a", "--image=THIN"],
            "thin.png: image of 3 x 40 pixels: expected at least 4 pixels a side",
        ),
        (["--pretrained=FOLDER", "--prompt=a", "--keep_image_size"], "is of --image, which is not"),
        (["--pretrained=none/of/these", "--prompt=a"], "none/of/these does not exist"),
        (["--pretrained=FOLDER/vae", "--prompt=a"], "has no model_index.json"),
        (["--pretrained=FOLDER", "--prompts=FILE"], "prompts.txt, line 2 is empty"),
        (["--pretrained=FOLDER", "--prompts=EMPTY"], "empty.txt is empty"),
        (["--pretrained=FOLDER", "--prompts=BYTES"], "bytes.txt is no text"),
    ],
)
def test_what_cannot_be_done_is_refused(folder, tmp_path, capsys, options, message):
    for name, content in (
        ("prompts", b"a cat\n\na dog"),
        ("empty", b""),
        ("bytes", b"\xff\xfe\xfa"),
    ):
        (tmp_path / f"{name}.txt").write_bytes(content)
    files = {"FOLDER": folder, "FILE": tmp_path / "prompts.txt", "EMPTY": tmp_path / "empty.txt"}
    files |= {"BYTES": tmp_path / "bytes.txt", "THIN": tmp_path / "thin.png"}
    Image.new("RGB", (3, 40)).save(files["THIN"])
    for name, path in files.items():
        options = [option.replace(name, str(path)) for option in options]
    assert message in refusal(capsys, *options, f"--out={tmp_path / 'a.png'}")
    assert not (tmp_path / "a.png").exists()


def test_whatever_decides_pictures_is_in_their_record():
    def record(*options):
        args = sample.parse_arguments(["--pretrained=x", "--prompt=a", "--out=made", *options])
        return prompting.record_of(args, args.prompt)

    ways = ("vae_tile=64", "vae_devices=2", "warmup_steps=2", "ulysses_devices=2", "step_cache=0.1")
    ways += ("patch_devices=2", "parallel=ring", "dtype=bfloat16", "guidance_scale=2")
    for way in ways:
        changed = {key for key, value in record(f"--{way}").items() if record()[key] != value}
        assert changed == {way.partition("=")[0]}


def test_a_changed_lora_or_run_is_seen_in_the_record(tmp_path):
    def record(*options):
        arguments = ["--pretrained=x", "--prompt=a", "--out=made", *options]
        return prompting.record_of(sample.parse_arguments(arguments), ["a"])

    file, run = tmp_path / "a.safetensors", tmp_path / "run"
    file.write_bytes(b"one")
    (run / "checkpoints" / "5").mkdir(parents=True)
    options = (f"--lora={file}:0.5", f"--workdir={run}")
    first = record(*options)
    assert first == record(*options) and first["step"] == 5
    assert first != record(*options, "--lora_ignore_text_encoders")
    file.write_bytes(b"two")
    second = record(*options)
    assert first != second
    (run / "checkpoints" / "10").mkdir()
    assert second != record(*options)


def test_grey_pictures_stay_grey(tmp_path, monkeypatch):
    class Grey(Painter):
        channels = 1

        def decode(self, latents):
            return latents[..., :1]

    monkeypatch.setattr(prompting, "open_pipeline", lambda args: Grey())
    options = ("--prompt=a", "--num_images=2", "--batch_size=1", "--height=16", "--width=32")
    for name in ("made", "all.npz"):
        sample.main(["--pretrained=x", *options, f"--out={tmp_path / name}"])
    files = sorted((tmp_path / "made").glob("*.png"))
    assert [(Image.open(file).mode, Image.open(file).size) for file in files] == [
        ("L", (32, 16))
    ] * 2
    assert np.load(tmp_path / "all.npz")["arr_0"].shape == (2, 16, 32, 1)


def test_a_guidance_scale_that_nobody_is_told_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prompting, "open_pipeline", lambda args: Painter())
    options = ("--pretrained=x", "--prompt=a", "--guidance_scale=3.5")
    said = "--guidance_scale=3.5: FLUX.1 test is not told a guidance scale; leave it out\n"
    assert said in refusal(capsys, *options, f"--out={tmp_path / 'a.png'}")
    with pytest.raises(SystemExit):
        compile_command.main([*options, f"--programs={tmp_path / 'programs'}"])
    assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        compile_command.main([*options[:2], "--prompts=b", f"--programs={tmp_path / 'programs'}"])
    assert "--prompt and --prompts: give one of them" in capsys.readouterr().err


def test_memory_that_runs_out_names_what_would_fit(folder, tmp_path, capsys, monkeypatch):
    def exhaust(*arguments, **options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr(FluxPipeline, "__call__", exhaust)
    options = (f"--pretrained={folder}", "--prompt=a", f"--out={tmp_path / 'a.png'}")
    error = refusal(capsys, *options)
    assert "memory ran out while sampling 1 picture at once: lower --batch_size=1" in error
    assert "--vae_tile=64; --param_dtype=bfloat16" in error and "--offload" in error


def test_every_option_of_a_sample_is_for_one_kind_of_model_or_both():
    parser_options = set(vars(sample.parse_arguments(["--out=a.png"])))
    known = {*pretrained_arguments._OF_TRAINED_MODELS, *pretrained_arguments._OF_PIPELINES}
    both = {"pretrained", "steps", "guidance_scale", "height", "width", "batch_size", "seed"}
    both |= {
        "num_images",
        "out",
        "parallel",
        "patch_devices",
        "warmup_steps",
        "ulysses_devices",
        "rounding",
        "overwrite",
        "traceback",
        "param_dtype",
    }
    both |= {"quantization", "vae_devices", "step_cache", "programs", "allow_nonfinite"}
    both |= {"workdir", "init_from", "weights", "step"}  # what takes a transformer's place
    assert parser_options == known | both

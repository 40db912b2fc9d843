"""What the demo of text to image does, by the commands' own means.

Pictures with captions are written as anybody's would be, encoded by the work of
launch/extract_features.py, trained on by that of launch/train.py, distilled by DMD2, and sampled as
a pipeline that was saved and read again. Encoders are small, random and frozen
(`pipelines.small_text`); latents are pixels, by an autoencoder that changes nothing.
"""

import os
import shlex
import shutil
import sys
import time
from pathlib import Path

import ml_collections
import numpy as np

from dit_jax import evaluation, experiment
from dit_jax.config import default_config
from dit_jax.data import captioned_digits, to_arrays
from dit_jax.data.captioned_digits import HEIGHT, WIDTH, Digits, caption
from dit_jax.data.digits import open_digits
from dit_jax.interop.autoencoder_kl import save_autoencoder
from dit_jax.interop.pixel_autoencoder import pixel_autoencoder
from dit_jax.interop.schedulers import FlowTimes
from dit_jax.launch import extract_features, extraction, loading, training
from dit_jax.launch.spelling import spelled
from dit_jax.launch.timing import Stopwatch, times
from dit_jax.models import Network
from dit_jax.pipelines import flux_files
from dit_jax.pipelines.flux import FluxPipeline
from dit_jax.pipelines.small_text import write_text_encoders
from dit_jax.quantities import table
from dit_jax.sampling import image_keys
from dit_jax.training.metrics import format_duration

PAIRS = 2000  # pictures of two digits; there are 1,442 of one
TEXT_LENGTH, TEXT_DIM, POOLED_DIM = 8, 64, 32
IMAGES_PER_PROMPT = 50
PROMPTS: tuple[Digits, ...] = ((7,), (3, 5), (2,), (9, 0), (4,), (5, 3), (8,), (1, 6), (0,), (4, 7))
_PARTS = {"pictures", "parts", "features", "teacher", "student", "evaluation", "pipeline"}


def start_afresh(directory: Path) -> None:
    """Removes an earlier demo.

    Raises:
        ValueError: the directory holds something else.
    """
    if not directory.exists():
        return
    others = {entry.name for entry in directory.iterdir()} - _PARTS - {"samples.png"}
    if others:
        raise ValueError(
            f"{directory} is not an earlier demo, it holds {min(others)}: choose another --workdir"
        )
    shutil.rmtree(directory)


def prepare(directory: Path, pairs: int = PAIRS) -> None:
    """Writes pictures with captions, text encoders, an autoencoder, and the features."""
    captioned_digits.write_folder(directory / "pictures", pairs)
    sizes = {"text_dim": TEXT_DIM, "pooled_dim": POOLED_DIM}
    parts = directory / "parts"
    write_text_encoders(parts, captioned_digits.all_captions(), **sizes)
    save_autoencoder(parts / "vae", *pixel_autoencoder(1))
    options = {
        "data": "captioned_folder",
        "path": directory / "pictures",
        "vae": parts,
        "text_encoders": parts,
        "text_length": TEXT_LENGTH,
        "text_dtype": "float32",
        "kind": "samples",
        "batch_size": 256,
        "out": directory / "features",
    }
    given = [f"--{name}={value}" for name, value in options.items()]
    extraction.run(extract_features.parse_arguments(given))


def teacher_config(directory: Path) -> ml_collections.ConfigDict:
    """One double and three single blocks of width 64; guided, as a tenth of captions is dropped."""
    config = default_config()
    config.name = "demo_flux"
    config.data.latents.path = str(directory / "features")
    config.model.update(name="flux", input_size=(HEIGHT, WIDTH), in_channels=1, num_classes=0)
    config.model.flux.update(hidden_size=64, depth=1, single_depth=3, num_heads=4)
    texts = {"text_dim": TEXT_DIM, "pooled_dim": POOLED_DIM, "text_length": TEXT_LENGTH}
    config.model.flux.update(texts)
    config.process.name = "flow"
    config.process.flow.update(network_convention="flux", time_scale=1000.0)
    config.method.label_dropout = 0.1
    config.optimizer.update(learning_rate=3e-3, warmup_steps=40, schedule="cosine")
    config.optimizer.gradient_clip_norm = 1.0
    config.ema.decays = (0.995,)
    # One checkpoint, at the end; without TensorBoard, whose start takes seconds.
    config.training.update(preview_every=0, checkpoint_every=0, tensorboard=False)
    config.training.update(num_steps=1200, batch_size=64)
    config.sampling.update(solver="heun", steps=8, guidance_scale=1.5, batch_size=250)
    return config


def student_config(directory: Path, steps: int) -> ml_collections.ConfigDict:
    """DMD2 of the guided teacher into so many steps."""
    config = teacher_config(directory)
    config.name = "demo_flux_student"
    config.teacher.path = str(directory / "teacher")
    config.teacher.guidance_scale = config.sampling.guidance_scale
    config.method.name = "dmd2"
    config.method.label_dropout = 0.0
    options = {"student_update_frequency": 3, "fake_score_learning_rate": 6e-4, "gan_weight": 0.0}
    config.method.dmd2.update(options)
    if steps > 1:
        config.method.dmd2.student_input = "simulation"
    config.optimizer.update(learning_rate=3e-4, warmup_steps=10)
    config.ema.decays = (0.98,)
    config.training.update(num_steps=500, batch_size=48)
    config.sampling.update(solver="euler", steps=steps, guidance_scale=1.0)
    return config


def write_pipeline(directory: Path, network: Network, params: dict) -> Path:
    """A pipeline of a network, the encoders and the autoencoder; its folder."""
    parts = flux_files.assemble(directory / "parts", network, params, FlowTimes())
    folder = directory / "pipeline"
    FluxPipeline(parts).save_pretrained(folder)
    return folder


def asked(count: int) -> list[Digits]:
    """The digits of each picture: those of the prompts in turn."""
    return [PROMPTS[number % len(PROMPTS)] for number in range(count)]


def draw_teacher(model: loading.TrainedModel, pipeline: FluxPipeline, count: int) -> np.ndarray:
    """Pictures of the teacher, as it was configured to be sampled; bytes [n, h, w, 1]."""
    prompts = [caption(digits) for digits in PROMPTS]
    length = {"max_sequence_length": TEXT_LENGTH}
    states = [np.asarray(array) for array in pipeline.encode_prompt([*prompts, ""], **length)]
    told = dict(zip(("text", "pooled"), states, strict=True))
    nulls = {name: array[-1] for name, array in told.items()}
    draw = experiment.build_sampling(model.config).bind(model.params, nulls)
    rows = np.arange(count) % len(prompts)
    conditions = {name: array[rows] for name, array in told.items()}
    return evaluation.to_uint8(np.asarray(draw(image_keys(0, np.arange(count)), conditions)))


def draw_pipeline(pipeline: FluxPipeline, steps: int, count: int) -> np.ndarray:
    """Pictures of the pipeline, of the same noise."""
    pictures = pipeline(
        [caption(digits) for digits in asked(count)],
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=steps,
        max_sequence_length=TEXT_LENGTH,
        generator=image_keys(0, np.arange(count)),
        output_type="latent",
    ).images
    # Here latents are pixels; decoded one by one, hundreds would take long.
    return evaluation.to_uint8(np.asarray(pictures))


def shares(judge: evaluation.Classifier, pictures: np.ndarray) -> tuple[float, float, float]:
    """Of pictures as asked for: of one digit, of two (both right, in their places), of all."""
    digits = asked(len(pictures))
    cut, classes, of_picture = captioned_digits.halves(pictures, digits)
    right = np.ones(len(pictures), bool)
    np.logical_and.at(right, of_picture, judge.predict(cut) == classes)
    single = np.array([len(shown) == 1 for shown in digits])
    return float(right[single].mean()), float(right[~single].mean()), float(right.mean())


def save_picture(path: Path, teacher: np.ndarray, student: np.ndarray, titles: list[str]) -> None:
    """Two pictures of every prompt, of the teacher and of the student on the same noise."""
    count = 2 * len(PROMPTS)
    captions = [caption(digits) for digits in asked(count)]
    panels = [
        evaluation.Panel(images[:count], title, columns=4, captions=captions)
        for title, images in zip(titles, (teacher, student), strict=True)
    ]
    evaluation.save_panels(path, panels, upscale=10, overwrite=True)


def run(workdir: Path, steps: int, started: float) -> None:
    """The whole demo; `started` is when it began, by time.perf_counter(), before the imports."""
    clock = Stopwatch(started)
    clock.add("importing", time.perf_counter() - started)
    start_afresh(workdir)
    directory = workdir.absolute()
    with clock("pictures, encoders and features"):
        prepare(directory)
    runs = {"teacher": teacher_config(directory), "student": student_config(directory, steps)}
    trained = {}
    for name, config in runs.items():
        print(f"now the {name} ...", flush=True)
        trained[name] = training.run(config, directory / name)
        clock.add(f"training the {name}", trained[name].seconds)
        if trained[name].interrupted:
            print("interrupted; run the demo again to start afresh")
            sys.exit(130)
    with clock("sampling"):
        student = loading.load_model(directory / "student")
        pipeline = FluxPipeline.from_pretrained(
            write_pipeline(directory, student.network, student.params)
        )
        count = IMAGES_PER_PROMPT * len(PROMPTS)
        teacher = draw_teacher(loading.load_model(directory / "teacher"), pipeline, count)
        made = draw_pipeline(pipeline, steps, count)
    with clock("classifier"):
        judge = evaluation.train_classifier(
            *to_arrays(open_digits("train")), 10, seed=0, cache_dir=directory / "evaluation"
        )
        real = judge.accuracy(*to_arrays(open_digits("test")))
        scores = {"teacher": shares(judge, teacher), "student": shares(judge, made)}
    evaluations = {"teacher": 2 * experiment.build_sampling(runs["teacher"]).evaluations}
    evaluations["student"] = steps
    titles = [f"{name}, {n} evaluations" for name, n in evaluations.items()]
    titles[1] = titles[1].removesuffix("s") if steps == 1 else titles[1]
    save_picture(directory / "samples.png", teacher, made, titles)
    print(report(trained, evaluations, scores, real, clock))
    print(f"two pictures of every prompt, on the same noise: {directory / 'samples.png'}")
    print(f"next: {spelled(sample_command(workdir, steps))}")


def report(trained: dict, evaluations: dict, scores: dict, real: float, clock: Stopwatch) -> str:
    """The closing tables: how good, and where the time went."""

    def row(name, value):
        return (name, value("teacher"), value("student"))

    kinds = ("a handwritten seven", "three and five side by side", "all of ten prompts")
    rows = [
        ("", "teacher", "student"),
        row("training steps", lambda name: f"{trained[name].step}"),
        row("training time", lambda name: format_duration(trained[name].seconds)),
        row("network evaluations a picture", lambda name: f"{evaluations[name]}"),
    ]
    for number, kind in enumerate(kinds):
        label = f"shown as asked, {kind if number == 2 else f'as {chr(34)}{kind}{chr(34)}'}"
        rows.append(row(label, lambda name, number=number: f"{scores[name][number]:.1%}"))
    used = os.times()
    cores = ("seconds of all cores", f"{used.user + used.system:.0f}s")
    note = f"(real digits, held out, are recognised at {real:.1%})"
    return f"{table(rows)}\n{note}\n\n{times(clock, [cores])}"


def sample_command(workdir: Path, steps: int) -> str:
    """What samples the pipeline."""
    options = ["python", "launch/sample.py", f"--pretrained={workdir / 'pipeline'}"]
    options += ["--prompt=a handwritten seven", f"--height={HEIGHT}", f"--width={WIDTH}"]
    options += [f"--steps={steps}", f"--max_sequence_length={TEXT_LENGTH}", "--num_images=8"]
    return shlex.join([*options, "--out=seven.png"])

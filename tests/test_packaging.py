"""What `pip install .` brings: one name, and a console command that needs no checkout."""

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dit_jax.launch import console, spelling
from dit_jax.rooms import ROOMS

ROOT = Path(__file__).parents[1]
TINY = (
    *("--config=digits", "--config.model.dit.depth=1", "--config.model.dit.hidden_size=32"),
    *("--config.model.dit.num_heads=2", "--config.training.batch_size=16"),
    *("--config.training.tensorboard=false", "--config.sampling.steps=2"),
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that holds what a wheel of this tree installs, without what it depends on."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__")
    for room in ("dit_jax", *ROOMS):
        shutil.copytree(ROOT / room, source / room, ignore=ignored)
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    quietly = {"check": True, "capture_output": True}
    wheel = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source]
    subprocess.run([*pip, *wheel], **quietly)
    (file,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", file], **quietly)
    return folder / "site"


def environment(site):
    return {**os.environ, "PYTHONPATH": str(site), "PYTHONUNBUFFERED": "1"}


def start(site, cwd, *arguments):
    return subprocess.Popen(
        [site / "bin" / "dit-jax", *arguments],
        cwd=cwd,
        env=environment(site),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(site, cwd, *arguments, status=0):
    process = start(site, cwd, *arguments)
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, f"{out}\n{err}"
    return out, err


def test_an_installation_adds_one_name(installed):
    names = {path.name for path in installed.iterdir()} - {"bin"}
    (record,) = (name for name in names if name.endswith(".dist-info"))
    assert names == {"dit_jax", record}
    assert (installed / record / "top_level.txt").read_text().split() == ["dit_jax"]
    assert (installed / "dit_jax" / "py.typed").is_file()
    assert [path.name for path in (installed / "bin").iterdir()] == ["dit-jax"]
    here = {file.relative_to(ROOT) for room in ROOMS for file in (ROOT / room).rglob("*.py")}
    assert all((installed / "dit_jax" / file).is_file() for file in here)
    page = {file.relative_to(ROOT) for file in (ROOT / "launch" / "page").iterdir()}
    assert page and all((installed / "dit_jax" / file).is_file() for file in page)
    metadata = (installed / record / "METADATA").read_text()
    assert "License-Expression: Apache-2.0" in metadata and "Author: dit-jax authors" in metadata


def test_help_is_there_without_anything_heavy(installed, tmp_path):
    out, _ = run(installed, tmp_path, "--help")
    assert out == console.usage() + "\n"
    code = (
        "import sys; from dit_jax.launch import console; console.main(['--help']); import dit_jax;"
        "print(dit_jax.__file__);"
        "print({'jax', 'jaxlib', 'numpy', 'ml_collections', 'tensorflow'} & set(sys.modules))"
    )
    child = [sys.executable, "-c", code]
    done = subprocess.run(child, cwd=tmp_path, env=environment(installed), capture_output=True)
    *_, file, heavy = done.stdout.decode().splitlines()
    assert Path(file).is_relative_to(installed) and heavy == "set()"


def test_the_command_trains_samples_and_plans_without_a_checkout(installed, tmp_path):
    train = ("train", *TINY, "--config.training.num_steps=3", "--workdir=a run")
    out, _ = run(installed, tmp_path, *train)
    workdir = tmp_path / "a run"
    assert out.endswith(f"next: dit-jax sample '--workdir={workdir}' --out=samples.png\n")
    run(installed, tmp_path, "sample", "--workdir=a run", "--num_images=4", "--out=samples.png")
    assert (tmp_path / "samples.png").is_file()
    plan = ("plan", *TINY, "--devices=2", "--config.mesh.data=2", "--out=plan.json")
    run(installed, tmp_path, *plan)
    assert (tmp_path / "plan.json").is_file()
    (tmp_path / "mine.py").write_text(
        "from configs import digits\n\ndef get_config():\n    return digits.get_config()\n"
    )
    _, err = run(installed, tmp_path, "train", "--config=mine.py", "--config.sed=1", status=2)
    assert "unknown key config.sed; did you mean config.seed?" in err
    _, err = run(installed, tmp_path, "train", "--config=digits_kd", status=2)
    assert "pairs/digits" in err and "launch/" not in err, err


def test_an_interrupted_command_saves_and_says_so(installed, tmp_path):
    process = start(installed, tmp_path, "train", *TINY, "--workdir=run", "--config.seed=1")
    for line in process.stdout:
        if line.startswith("training"):
            break
    while process.poll() is None and not (tmp_path / "run" / "metrics.jsonl").exists():
        process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130 and "saved step" in out, f"{out}\n{err}"


def console_error(capsys, *arguments):
    with pytest.raises(SystemExit) as ending:
        console.main(list(arguments))
    assert ending.value.code == 2
    return capsys.readouterr().err


def test_unknown_commands_are_answered_by_the_nearest(capsys, monkeypatch):
    monkeypatch.setattr(console.command, "listen", lambda: None)
    assert "unknown command tarin; did you mean train?" in console_error(capsys, "tarin")
    assert "did you mean extract-features?" in console_error(capsys, "extract_feature")
    assert "unknown command xyzzy: the commands are train," in console_error(capsys, "xyzzy")
    assert "--config=digits is no command: dit-jax COMMAND" in console_error(
        capsys, "--config=digits"
    )
    assert "no command is given: dit-jax COMMAND" in console_error(capsys)


def test_the_console_command_knows_every_command():
    commands = {}
    for file in (ROOT / "launch").glob("*.py"):
        if re.search(r"^def start\(\)", text := file.read_text(), re.MULTILINE):
            first = ast.get_docstring(ast.parse(text)).splitlines()[0]
            commands[file.stem.replace("_", "-")] = first
    assert commands == console.COMMANDS


def test_texts_name_commands_as_they_were_started(monkeypatch):
    said = (
        "python launch/write_pairs.py --config=configs/digits.py, launch/sample.py, configs/my.py"
    )
    assert spelling.spelled(said) == said
    monkeypatch.setattr(spelling, "_program", "dit-jax")
    assert spelling.spelled(said) == (
        "dit-jax write-pairs --config=digits, dit-jax sample, configs/my.py"
    )
    assert spelling.spelled("/home/me/configs/digits.py") == "/home/me/configs/digits.py"

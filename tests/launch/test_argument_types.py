"""Numbers and names of outputs are checked while flags are parsed: before anything is loaded."""

import argparse
import importlib
from pathlib import Path

import pytest

from dit_jax.launch import argument_types, compare, evaluate, sample

COMMANDS = ("sample", "evaluate", "compare", "convert", "extract_features", "write_pairs")
COMMANDS += ("demo",)
STUDIES = ("benchmark", "study_conversion", "study_displaced", "study_distillation", "study_speed")


class Parsed(Exception):
    pass


@pytest.fixture
def parser_of(monkeypatch):
    """The parser of a command, as it is when it parses."""

    def capture(parser, *_):
        raise Parsed(parser)

    def find(name) -> argparse.ArgumentParser:
        command = importlib.import_module(name if name in STUDIES else f"dit_jax.launch.{name}")
        monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", capture)
        parse = getattr(command, "parse_arguments", None) or command.main
        with pytest.raises(Parsed) as parsed:
            parse()
        return parsed.value.args[0]

    return find


@pytest.mark.parametrize("name", (*COMMANDS, *STUDIES))
def test_every_numeric_flag_is_checked_at_the_door(parser_of, name):
    parser = parser_of(name)
    for action in parser._actions:
        assert action.type not in (int, float), action.dest
        if action.dest in ("out", "picture", "json") and not name.startswith("study"):
            assert action.type is not Path, action.dest
        if action.type is None or action.type in (str, Path) or action.dest == "labels":
            continue
        if action.dest in ("out", "picture", "json", "folder", "conditions", "programs", "lora"):
            continue
        for text in ("nan", "inf", "-inf", "-1", "1e99", "9" * 30, "x", ""):
            if "time" in action.dest or "interval" in action.dest:
                text = text.replace("1e99", "nan").replace("9" * 30, "inf")
            with pytest.raises(argparse.ArgumentTypeError, match="expected"):
                action.type(text)


def refused(capsys, parse, *options):
    with pytest.raises(SystemExit) as ending:
        parse(list(options))
    assert ending.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--guidance_interval", "0.8", "0.2"], "--guidance_interval: 0.8 0.2: expected the lower"),
        (["--guidance_interval", "0.2", "nan"], "--guidance_interval: 'nan': expected at least 0"),
        (["--guidance_scale=nan"], "--guidance_scale: 'nan': expected at least 0 and at most 1000"),
        (["--seed=99999999999999999999"], "--seed: '99999999999999999999': expected at least 0"),
        (["--steps=0"], "--steps: '0': expected at least 1 and at most 100000, a whole number"),
        (["--out=x.gif"], "--out: x.gif: samples are written as .png, .jpg, .jpeg, .webp or .npz"),
        (["--bs=3"], "unrecognized arguments: --bs=3; did you mean --batch_size?"),
        (["--cfg=3"], "unrecognized arguments: --cfg=3; did you mean --guidance_scale?"),
        (["--nfe=3"], "unrecognized arguments: --nfe=3; did you mean --steps?"),
        (["--guidance_scal=x"], "--guidance_scale: 'x': expected"),
        (["--gidance_scale=3"], "did you mean --guidance_scale?"),
        (["--parallel=displaced_"], "); did you mean displaced?"),
        (["a.png"], "unrecognized arguments: a.png\n"),
    ],
)
def test_sampling_is_refused(capsys, options, message):
    assert message in refused(capsys, sample.parse_arguments, "--out=x.png", *options)


@pytest.mark.parametrize(
    ("command", "option", "message"),
    [
        (evaluate, "--out=x.txt", "--out: x.txt: its name must end in .json, not in '.txt'"),
        (evaluate, "--picture=x.gif", "--picture: x.gif: a picture's name ends in .png"),
        (compare, "--out=x.png", "--out: x.png: its name must end in .html or .htm"),
        (
            compare,
            "--picture=x",
            "--picture: x: a picture's name ends in .png, .jpg, .jpeg or .webp",
        ),
        (compare, "--json=x", "--json: x: its name must end in .json, not in 'nothing'"),
    ],
)
def test_a_result_of_another_name_is_refused(capsys, command, option, message):
    assert message in refused(capsys, command.parse_arguments, option)


def test_names_in_capitals_are_what_they_say():
    args = compare.parse_arguments(["--out=X.HTML", "--picture=X.JPG", "--json=X.JSON"])
    assert [path.name for path in (args.out, args.picture, args.json)] == [
        "X.HTML",
        "X.JPG",
        "X.JSON",
    ]
    assert argument_types.samples("X.PNG") == Path("X.PNG")

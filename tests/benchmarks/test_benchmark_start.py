"""The benchmark of starts: its command line, its refusals, and the page."""

import json

import pytest

import benchmark_start
from tests.long import only_long


def starts(way):
    seconds = {"cold": 9.0, "cache": 5.0, "program": 3.0}[way]
    return [
        {
            "whole_seconds": seconds,
            "imports_seconds": 1.0,
            "weights_seconds": 0.5,
            "sampler_seconds": seconds - 2,
            "batch_seconds": 0.25,
        }
    ] * 3


def test_rows_are_added_or_replaced_in_order(tmp_path):
    out = tmp_path / "start"
    measured = {way: starts(way) for way in benchmark_start.WAYS}
    for name in ("FLUX", "digits", "FLUX"):
        row = {"sampler": name, "command": f"python x {name}", "starts": measured}
        table = benchmark_start.save(out, row)
    record = json.loads(out.with_suffix(".json").read_text())
    assert [row["sampler"] for row in record["rows"]] == ["digits", "FLUX"]
    assert "| FLUX | a kept program | 3.00 | 3.0 | 1.50 | 0.50 | 1.00 | 7.0 | 0.75 | 9.0 |" in table
    assert table in out.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sampler=digits"], "--workdir is missing with --sampler=digits"),
        (["--sampler=DiT-S/2", "--workdir=r"], "--workdir would do nothing"),
        (["--sampler=FLUX", "--pretrained=p", "--rounds=-1"], "expected 0 or more"),
    ],
)
def test_command_lines_that_cannot_be_meant_are_refused(options, message, capsys):
    with pytest.raises(SystemExit):
        benchmark_start.parse_arguments(options)
    assert message in capsys.readouterr().err


def test_a_start_that_compiled_all_the_same_is_an_error():
    good = {"traced": 0, "compiled": 0, "compiled_before": 0}
    benchmark_start.check(good)
    with pytest.raises(RuntimeError, match="and 1 of it, and traced 2 functions"):
        benchmark_start.check({**good, "compiled": 1, "traced": 2})


@only_long
def test_a_start_with_a_kept_program_neither_traces_nor_compiles(tmp_path):
    options = ["--sampler=DiT-S/2", "--steps=1", "--rounds=1", f"--folder={tmp_path / 'start'}"]
    benchmark_start.main([*options, f"--out={tmp_path / 'out'}"])
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert set(row["starts"]) == set(benchmark_start.WAYS) and len(row["programs_bytes"]) == 1

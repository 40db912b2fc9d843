"""Options of the benchmark that would do nothing are refused."""

import pytest

import benchmark


@pytest.mark.parametrize(
    "options",
    [
        ["--model=DiT-B/2"],
        ["--case=flux", "--quantization=fp8"],
        ["--case=flux", "--torch_compile"],
        ["--case=compile", "--rounds=3"],
        ["--case=guided", "--remat=block"],
        ["--case=distillation", "--dtype=bfloat16"],
        ["--case=products", "--model=DiT-S/2"],  # the default, said
        ["--case=products", "--networks", "digits"],
    ],
)
def test_options_that_would_do_nothing_are_refused(options, capsys):
    with pytest.raises(SystemExit):
        benchmark.parse_arguments(options)
    assert "would do nothing with" in capsys.readouterr().err


def test_what_a_case_takes_is_taken():
    given = ["--case=train", "--model=DiT-B/2", "--remat=block", "--torch_compile", "--rounds=3"]
    args = benchmark.parse_arguments(given)
    assert args.torch_compile and args.remat == "block"

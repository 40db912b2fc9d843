"""Processes that take turns: what becomes of one that ends early."""

import pytest

import turns


@pytest.mark.parametrize(
    ("ending", "error", "message"),
    [
        ("import sys; sys.exit(2)", SystemExit, "2"),  # it has said why
        ("raise RuntimeError", ChildProcessError, "ended early, with status 1"),
        ("import os; os.kill(os.getpid(), 9)", ChildProcessError, "ended early, by SIGKILL"),
    ],
)
def test_a_process_that_ends_early_says_so_once(tmp_path, ending, error, message):
    script = tmp_path / "side.py"
    script.write_text(f"print({{}}, flush=True)\n{ending}")
    side = turns.Turns(str(script), [])
    with pytest.raises(error, match=message):
        side.run()

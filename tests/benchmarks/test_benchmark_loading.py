"""The benchmark of reading large transformers: what it writes is whole, and it leaves nothing."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest

import benchmark_loading

TINY = ["--hidden_size=128", "--depth=1", "--single_depth=1", "--shard_bytes=1e6"]


def test_what_is_written_is_read_whole_and_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_loading, "measured", benchmark_loading.read)
    out = tmp_path / "loading.json"
    (tmp_path / "files").mkdir()
    benchmark_loading.main([*TINY, f"--folder={tmp_path / 'files'}", f"--out={out}"])
    record = json.loads(out.read_text())
    assert record["shards"] > 1
    # 2 bytes a parameter, and the shards' headers.
    assert 0 < record["file_bytes"] - 2 * record["parameters"] < 50_000
    assert record["readings"].keys() == {"scan", "unroll"}
    assert not any((tmp_path / "files").iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hidden_size=100"], "multiple of 128"),
        (["--depth=0"], "--depth=0: expected at least 1"),
        (["--folder=nowhere"], "--folder=nowhere is no folder"),
        ([], "files take 4.129 GB, and .* has 1.000 GB left"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, message, tmp_path, monkeypatch, capsys):
    disk = SimpleNamespace(free=10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: disk)
    with pytest.raises(SystemExit):
        benchmark_loading.parse_arguments([f"--folder={tmp_path}", *options])
    assert re.search(message, capsys.readouterr().err)

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

from dit_jax.interop import hub
from dit_jax.interop.tensors import InteropError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def fake_hub(monkeypatch, tmp_path):
    """A hub of one repository; what was asked for is kept in the list returned."""
    asked = []
    root = tmp_path / "snapshots" / COMMIT
    (root / "vae").mkdir(parents=True)
    (root / "empty").mkdir()
    (root / "vae" / "config.json").write_text("{}")
    (root / "DiT.pt").write_bytes(b"x")

    def download(repo_id, *, revision, allow_patterns):
        asked.append((repo_id, revision, allow_patterns))
        return str(root)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(hub.logging, "warning", lambda text, *args: asked.append(text % args))
    return asked, root


def would_fetch(patterns, *files):
    return list(huggingface_hub.utils.filter_repo_objects(files, allow_patterns=patterns))


def test_a_local_path_stays_as_it_is(fake_hub):
    assert hub.resolve("some/folder") == Path("some/folder")
    assert hub.resolve("/abs/DiT.pt") == Path("/abs/DiT.pt")
    assert fake_hub[0] == []


def test_an_unpinned_source_tells_its_commit(fake_hub):
    asked, root = fake_hub
    assert hub.resolve("hub:facebook/DiT-XL-2-256") == root
    (repository, revision, patterns), message = asked
    assert (repository, revision) == ("facebook/DiT-XL-2-256", None)
    assert f"hub:facebook/DiT-XL-2-256@{COMMIT}" in message
    files = ["config.json", "vae/a.safetensors", "DiT.pt", "a.pth", "b/c.bin", "labels.txt"]
    code = ["pipeline.py", "vae/model.pkl", "README.md", "a.ckpt", "x.json.py", "a.sh"]
    assert would_fetch(patterns, *files, *code) == files


@pytest.mark.parametrize("revision, pinned", [(COMMIT, True), ("refs/pr/3", False)])
def test_revision_and_folder(fake_hub, revision, pinned):
    asked, root = fake_hub
    assert hub.resolve(f"hub:owner/name@{revision}:vae/") == root / "vae"
    assert asked[0][:2] == ("owner/name", revision)
    files = ["vae/config.json", "vae/sub/a.safetensors", "config.json", "transformer/a.safetensors"]
    assert would_fetch(asked[0][2], *files) == files[:2]
    assert len(asked) == (1 if pinned else 2)
    if not pinned:
        assert f"hub:owner/name@{COMMIT}:vae" in asked[1]


def test_a_single_file(fake_hub):
    asked, root = fake_hub
    assert hub.resolve("hub:owner/name:DiT.pt") == root / "DiT.pt"
    assert would_fetch(asked[0][2], "DiT.pt", "DiT-B.pt", "config.json") == ["DiT.pt"]


def test_an_index_brings_its_shards():
    patterns = hub._patterns("transformer/model.safetensors.index.json")
    files = ["transformer/model-00001-of-00002.safetensors", "transformer/config.json", "a.bin"]
    assert would_fetch(patterns, *files) == files[:2]


def test_commit_is_returned(fake_hub):
    files = hub.fetch(hub.parse("hub:owner/name@main"))
    assert files.source == hub.HubSource("owner/name", COMMIT) and files.source.pinned


@pytest.mark.parametrize(
    "source",
    ["hub:", "hub:name", "hub:a/b/c", "hub:a/b@", "hub:a/b:", "hub:a/b:../c", "hub:a/b:/etc"],
)
def test_malformed_sources_are_refused(fake_hub, source):
    with pytest.raises(InteropError, match=r"owner/name|within it"):
        hub.resolve(source)
    assert fake_hub[0] == []


@pytest.mark.parametrize("inside", ["missing", "empty", "model.py"])
def test_nothing_to_fetch_is_an_error(fake_hub, inside):
    with pytest.raises(InteropError, match="never code"):
        hub.resolve(f"hub:owner/name:{inside}")


def missing(kind):
    # The constructors ask for the server's response, which none of this needs.
    return kind.__new__(kind)


@pytest.mark.parametrize(
    "error, says",
    [
        (errors.LocalEntryNotFoundError("no"), "cannot be reached.*hf download owner/name.*path"),
        (errors.OfflineModeIsEnabled("no"), "HF_HUB_OFFLINE"),
        (missing(errors.RepositoryNotFoundError), "no such repository"),
        (missing(errors.GatedRepoError), "gated"),
        (missing(errors.RevisionNotFoundError), "no revision 'v9'"),
        (RuntimeError("disk full"), "RuntimeError: disk full"),
    ],
)
def test_what_went_wrong_is_said_in_the_error(fake_hub, monkeypatch, error, says):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(InteropError, match=f"hub:owner/name@v9.*{says}"):
        hub.resolve("hub:owner/name@v9")


def test_offline_without_a_copy_is_an_error(monkeypatch, tmp_path):
    """The library itself, told to be offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InteropError, match="local cache"):
        hub.resolve("hub:owner/certainly-not-in-any-cache")

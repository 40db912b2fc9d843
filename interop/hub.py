"""Checkpoints named by their repository on the Hugging Face hub.

    hub:owner/name[@revision][:folder-or-file]

for example hub:facebook/DiT-XL-2-256@eab87f7:transformer. Only files of weights and settings are
fetched, never code; they stay in huggingface_hub's cache (HF_HOME). What a revision such as "main"
holds can change: the commit it stands for is logged, to be named instead.
"""

from __future__ import annotations

import glob
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from absl import logging

from dit_jax.interop.tensor_file import InteropError

PREFIX = "hub:"
ALLOWED_SUFFIXES = (".json", ".safetensors", ".pt", ".pth", ".bin", ".txt")

_SOURCE = re.compile(
    r"hub:(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<inside>.+))?", re.ASCII
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SYNTAX = "hub:owner/name[@revision][:folder-or-file]"


@dataclass(frozen=True)
class HubSource:
    """A source on the hub, as `parse` reads it.

    Attributes:
        repository: "owner/name".
        revision: A branch, tag or commit; None for the default branch.
        inside: A folder or file of the repository; "" for all of it.
    """

    repository: str
    revision: str | None = None
    inside: str = ""

    @property
    def pinned(self) -> bool:
        """Whether the revision is a full commit, which cannot come to mean something else."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None

    def at(self, revision: str) -> HubSource:
        """The same source at another revision."""
        return HubSource(self.repository, revision, self.inside)

    def __str__(self):
        revision = f"@{self.revision}" if self.revision else ""
        return f"hub:{self.repository}{revision}{f':{self.inside}' if self.inside else ''}"


@dataclass(frozen=True)
class HubFiles:
    """What `fetch` brought: a local path, and the source with the commit it was resolved to."""

    path: Path
    source: HubSource


def parse(source: str) -> HubSource:
    """Read "hub:owner/name[@revision][:folder-or-file]".

    Raises:
        InteropError: If it is not of this form, or leads out of the repository.
    """
    match = _SOURCE.fullmatch(source)
    if match is None:
        raise InteropError(f"{source!r} is no source on the hub; expected {_SYNTAX}")
    inside = (match["inside"] or "").rstrip("/")
    parts = PurePosixPath(inside).parts
    if inside.startswith("/") or "\\" in inside or ".." in parts:
        raise InteropError(
            f"{source!r}: {inside!r} leads out of the repository; give a folder or file within it"
        )
    inside = PurePosixPath(*parts).as_posix() if parts else ""
    return HubSource(match["repository"], match["revision"], inside)


def resolve(source: str, folders: tuple[str, ...] = ()) -> Path:
    """A local path for a source: a path as it is, a hub source downloaded or found in the cache.

    Args:
        source: A path, or "hub:owner/name[@revision][:folder-or-file]".
        folders: Of a whole repository, those to fetch, beside its JSON files; () for all. Some
            repositories hold the same weights twice.

    Returns:
        The path; of a hub source, the folder or file in huggingface_hub's cache.

    Raises:
        InteropError: If a hub source does not exist, is not accessible, or there is neither
            network nor a cached copy.
    """
    if not source.startswith(PREFIX):
        return Path(source)
    asked = parse(source)
    files = fetch(asked, folders)
    if not asked.pinned:
        logging.warning("%s is not pinned; it is now %s", asked, files.source)
    return files.path


def fetch(source: HubSource, folders: tuple[str, ...] = ()) -> HubFiles:
    """Download the files of a source that are not in the cache yet; `folders` as of `resolve`.

    Raises:
        InteropError: As `resolve`.
    """
    if importlib.util.find_spec("huggingface_hub") is None:
        raise InteropError(f"{source} needs huggingface_hub: pip install -e '.[interop]'")
    import huggingface_hub

    try:
        root = huggingface_hub.snapshot_download(
            source.repository,
            revision=source.revision,
            allow_patterns=_patterns(source.inside, folders),
        )
    except Exception as error:
        raise _explain(source, error) from error
    # The cache's layout: .../snapshots/<commit>.
    root = Path(root)
    path = root / source.inside if source.inside else root
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        raise InteropError(
            f"{source} has no files to fetch{f' at {source.inside!r}' if source.inside else ''}: "
            f"only {', '.join(ALLOWED_SUFFIXES)} files are, never code. If the network is down, "
            "they are not in the local cache; download them and give the local path"
        )
    return HubFiles(path, source.at(root.name))


def _patterns(inside: str, folders: tuple[str, ...] = ()) -> list[str]:
    """What to download; in these patterns * also stands for slashes."""
    allowed = [f"*{suffix}" for suffix in ALLOWED_SUFFIXES]
    if not inside and folders:
        return ["*.json", *(f"{folder}/{pattern}" for folder in folders for pattern in allowed)]
    if not inside:
        return allowed
    name = glob.escape(inside)
    if inside.endswith(".index.json"):
        # The shards of the index lie beside it.
        folder = name.rpartition("/")[0]
        return [f"{folder}/{pattern}" if folder else pattern for pattern in allowed]
    file = [name] if inside.endswith(ALLOWED_SUFFIXES) else []
    return file + [f"{name}/{pattern}" for pattern in allowed]


def _explain(source: HubSource, error: Exception) -> InteropError:
    from huggingface_hub import errors

    # Subclasses first: a gated repository is a kind of missing one.
    if isinstance(error, errors.GatedRepoError):
        reason = (
            "it is gated: accept its conditions on its page, then log in by `hf auth login` or set "
            "HF_TOKEN"
        )
    elif isinstance(error, errors.RepositoryNotFoundError):
        reason = "there is no such repository, or it is private (log in by `hf auth login`)"
    elif isinstance(error, errors.RevisionNotFoundError):
        reason = f"it has no revision {source.revision!r}"
    elif isinstance(error, (errors.LocalEntryNotFoundError, ConnectionError, TimeoutError)):
        reason = (
            "the hub cannot be reached (no network, or HF_HUB_OFFLINE is set) and it is not in the "
            "local cache. Download it where there is a network, by `hf download "
            f"{source.repository}`, and give the path of the folder instead of {PREFIX}..."
        )
    else:
        reason = f"{type(error).__name__}: {error}"
    return InteropError(f"{source} cannot be fetched: {reason}")

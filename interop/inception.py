"""The published weights of Inception-V3 as FID uses them, from their PyTorch file.

The file holds the weights of the TensorFlow graph of 2015-12-05 under PyTorch's names, and is the
one that pytorch-fid and torch-fidelity download. It is recognised by its hash: a score that other
weights made is not an FID.
"""

import functools
import hashlib
import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dit_jax.evaluation.inception import InceptionExtractor, Params, parameter_shapes
from dit_jax.interop.parameters import flat_shapes
from dit_jax.interop.table import Row, Table, load_params
from dit_jax.interop.tensors import InteropError, TensorFile, open_tensors
from dit_jax.interop.transforms import conv, identity, linear

FILE_NAME = "pt_inception-2015-12-05-6726825d.pth"
SHA256_PREFIX = "6726825d"
URLS = (
    f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE_NAME}",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth",
)
TIMEOUT_S = 30.0
_CHUNK = 1 << 20

# Our leaf of a convolution: its foreign name and transform.
_CONVOLUTION = {
    "kernel": ("conv.weight", conv()),
    "scale": ("bn.weight", identity()),
    "bias": ("bn.bias", identity()),
    "mean": ("bn.running_mean", identity()),
    "var": ("bn.running_var", identity()),
}
_LOGITS = {"kernel": ("weight", linear()), "bias": ("bias", identity())}


def inception_table() -> Table:
    """Our parameters and the file's tensors, for import and export."""
    rows = []
    for path in flat_shapes(parameter_shapes()):
        layer, leaf = path.rsplit(".", 1)
        theirs, transform = (_LOGITS if layer == "fc" else _CONVOLUTION)[leaf]
        rows.append(Row(path, (f"{layer}.{theirs}",), transform))
    return Table("Inception-V3", tuple(rows), ignored=(r".*\.num_batches_tracked",))


def load_extractor(
    path: str | Path | None = None,
    *,
    allow_other: bool = False,
    cache_dir: str | Path | None = None,
    flag: str = "the argument `path`",
    **options: Any,
) -> InceptionExtractor:
    """The feature extractor of FID, sFID, Inception Score, precision, recall and KID.

    Args:
        path: The weights file; None: the published one, from the cache or else downloaded.
        allow_other: Accept a file with another hash than the published one, for instance random
            weights in tests. The extractor is then not `standard` and has another fingerprint, so
            that its statistics cannot be compared with published ones.
        cache_dir: Where a download is kept; by default see `default_cache_dir`.
        flag: How the caller's user names a path, for the error messages.
        **options: Of `InceptionExtractor`: batch_size, mesh, grey.

    Raises:
        FileNotFoundError: There is no such file.
        InteropError: The file is not the published one, cannot be downloaded, or does not hold
            Inception-V3's tensors.
    """
    file, standard = _weights_file(path, allow_other, cache_dir, flag)
    return InceptionExtractor(_read(file), standard=standard, **options)


def load_inception(
    path: str | Path | None = None,
    *,
    allow_other: bool = False,
    cache_dir: str | Path | None = None,
    flag: str = "the argument `path`",
) -> Params:
    """The weights alone, as nested float32 arrays in host memory; see `load_extractor`."""
    return _read(_weights_file(path, allow_other, cache_dir, flag)[0])


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/dit-jax, with ~/.cache for an unset variable."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dit-jax"


def _weights_file(
    path: str | Path | None, allow_other: bool, cache_dir: str | Path | None, flag: str
) -> tuple[Path, bool]:
    """The file to read, and whether it is the published one."""
    file = _downloaded(cache_dir, flag) if path is None else Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no weights file {file}; expected {FILE_NAME} ({URLS[0]})")
    sha256 = _sha256(file)
    if not allow_other:
        _require_published(file, sha256)
    return file, sha256.startswith(SHA256_PREFIX)


def _read(file: Path) -> Params:
    return load_params(inception_table(), parameter_shapes(), _Resident(open_tensors(file)))


class _Resident(TensorFile):
    """A file whose tensors stay in memory (91 MiB) once one was asked for.

    A .pt file is parsed from its beginning at every read, and this one has 472 tensors.
    """

    def __init__(self, file: TensorFile) -> None:
        self.path, self.kind = file.path, file.kind
        self.specs, self.metadata = file.specs, file.metadata
        self._file = file

    @functools.cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        return dict(zip(self.specs, self._file.read(list(self.specs)), strict=True))

    def _read(self, names: list[str]) -> Iterator[np.ndarray]:
        return (self._arrays[name] for name in names)


def _downloaded(cache_dir: str | Path | None, flag: str) -> Path:
    folder = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
    target = folder / FILE_NAME
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    failures = []
    for url in URLS:
        # Under the final name there is only ever a whole, checked file.
        descriptor, name = tempfile.mkstemp(dir=folder, prefix=f".{FILE_NAME}.")
        partial = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as out:
                _download(url, out)
            _require_published(partial, _sha256(partial), source=url)
            partial.replace(target)
            return target
        except (OSError, urllib.error.URLError, InteropError) as error:
            failures.append(f"{url}: {error}")
        finally:
            partial.unlink(missing_ok=True)
    raise InteropError(
        "the weights of Inception-V3 could not be downloaded. On a machine with network, fetch "
        f"one of the files below, copy it here, and give its path ({flag}), or put it at "
        f"{target}.\n  " + "\n  ".join(failures)
    )


def _download(url: str, out: BinaryIO) -> None:
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
        while chunk := response.read(_CHUNK):
            out.write(chunk)


def _require_published(file: Path, sha256: str, *, source: str | None = None) -> None:
    if not sha256.startswith(SHA256_PREFIX):
        raise InteropError(
            f"{source or file} is not {FILE_NAME}: its SHA-256 begins with {sha256[:8]}, expected "
            f"{SHA256_PREFIX}. It may be damaged; scores of other weights are no FID (they can be "
            "had on purpose with --other_inception_weights, allow_other=True)."
        )


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()

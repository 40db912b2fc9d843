"""Files of named tensors: opening one whatever its format, and writing one tensor at a time.

Reading runs no code of the file's and holds one tensor in memory at a time:

    file = open_tensors("DiT-XL-2-256x256.pt")
    file.specs["blocks.0.attn.qkv.weight"]      # TensorSpec((3456, 1152), float32)
    for array in file.read(["blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias"]):
        ...
"""

from __future__ import annotations

from pathlib import Path

from dit_jax.interop.pickle_scan import scan_pickle
from dit_jax.interop.pt_files import open_pt
from dit_jax.interop.pt_writer import write_pt
from dit_jax.interop.safetensors_files import (
    open_safetensors,
    write_safetensors,
)
from dit_jax.interop.sharded import (
    INDEX_SUFFIXES,
    PT_SUFFIXES,
    open_sharded,
    refuse_shard,
    shard_place,
    shards_of,
)
from dit_jax.interop.tensor_file import InteropError, TensorFile, TensorSpec, refusals
from dit_jax.untrusted import FileRefusedError, check_within, open_regular

__all__ = [
    "InteropError",
    "TensorFile",
    "TensorSpec",
    "open_tensors",
    "write_pt",
    "write_safetensors",
]


def open_tensors(
    path: str | Path,
    *,
    weights: str = "auto",
    within: str | Path | None = None,
    keep_names: bool = False,
) -> TensorFile:
    """Open a checkpoint, telling its format by its content.

    Args:
        path: A .safetensors file, an index of shards (*.safetensors.index.json, *.bin.index.json),
            a file of torch.save (.pt, .pth, .bin), or a folder that holds exactly one of them.
        weights: Which weights of a training checkpoint that holds several (.pt): "ema", "model",
            or another entry's name; "auto" is "ema" where there is one, else "model".
        within: A folder that links may not lead out of (but for the hub's cache), by default `path`
            if it is one.
        keep_names: Of a .pt, see `pt_files.open_pt`.

    Returns:
        The file, with the names, shapes and types of its tensors.

    Raises:
        InteropError: If there is no such file, it is none of the above, it is truncated or
            damaged, it is a pickle of anything but tensors and plain data, or a link leads out of
            the folder.
    """
    path = Path(path)
    if path.is_dir():
        within = within or path
        path = _only_candidate(path)
    elif not path.exists():
        raise InteropError(f"{path} does not exist; give a .safetensors, .index.json or .pt file")
    refuse_shard(path)
    try:
        with refusals():
            if within is not None:
                check_within(path, within)
            with open_regular(path) as file:
                beginning = file.read(1024)
            return _open_by_content(path, beginning, weights, keep_names)
    except OSError as error:
        raise InteropError(f"{path} cannot be read: {error}") from error


def _only_candidate(folder: Path) -> Path:
    """The one checkpoint of a folder."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    indices = [file for file in files if file.name.endswith(INDEX_SUFFIXES)]
    shards = {shard for index in indices for shard in shards_of(index)}
    candidates = indices + [
        file
        for file in files
        if file.suffix in (".safetensors", *PT_SUFFIXES) and file.name not in shards
    ]
    if len(candidates) == 1:
        return candidates[0]
    for file in candidates if all(map(shard_place, candidates)) else ():
        refuse_shard(file)
    if candidates:
        raise InteropError(
            f"{folder} holds {len(candidates)} checkpoints; name one of them: "
            f"{', '.join(file.name for file in candidates)}"
        )
    below = sorted(
        {
            file.parent.relative_to(folder).as_posix()
            for file in folder.glob("*/*")
            if file.suffix in (".safetensors", *PT_SUFFIXES)
        }
    )
    hint = f"; there are some in {', '.join(below)}: name that folder" if below else ""
    raise InteropError(f"{folder} holds no .safetensors, .index.json or .pt file{hint}")


def _looks_like_safetensors(beginning: bytes) -> bool:
    # The header's length, then JSON. (As a length, the beginning of text is beyond any limit.)
    length = int.from_bytes(beginning[:8], "little")
    return beginning[8:9] == b"{" and length < 2**48


def _looks_like_pt(path: Path, beginning: bytes) -> bool:
    if beginning[:4] == b"PK\x03\x04" or beginning[:1] == b"\x80":
        return True
    # The oldest pickles begin with no mark: only reading one to its end tells.
    try:
        with open_regular(path) as file:
            return bool(scan_pickle(file))
    except FileRefusedError:
        raise
    except ValueError:
        return False


def _open_by_content(path: Path, beginning: bytes, weights: str, keep_names: bool) -> TensorFile:
    if not _looks_like_safetensors(beginning) and _looks_like_pt(path, beginning):
        return open_pt(path, weights=weights, keep_names=keep_names)
    is_safetensors = _looks_like_safetensors(beginning)
    if is_safetensors or (beginning[8:9] == b"{" and beginning[:1] != b"{"):
        file = open_safetensors(path)
    elif beginning.lstrip()[:1] == b"{":
        file = open_sharded(path)
    else:
        raise InteropError(
            f"{path} is neither safetensors nor a file of torch.save: {_look(beginning)}"
        )
    if weights != "auto":
        raise InteropError(
            f"{path} holds one set of weights, there is no {weights!r} to choose; leave the choice "
            "at 'auto'"
        )
    return file


def _look(beginning: bytes) -> str:
    """What a file that is no checkpoint looks like, and what to do."""
    text = beginning.lstrip(b"\xef\xbb\xbf \t\r\n")
    if not beginning:
        return "it is empty; download or copy it again"
    if text.startswith(b"version https://git-lfs"):
        return "it is a git-lfs pointer, not the file itself; run `git lfs pull`"
    if text.startswith(b"<"):
        return (
            "it looks like a web page (HTML or XML), as a download that failed or asked to log in "
            "leaves it; download the file itself"
        )
    if beginning[257:262] == b"ustar":
        return (
            "it is a tar archive (perhaps of torch.save before 2017); unpack it, or load and save "
            "it again with a recent PyTorch"
        )
    if text[:2] == b"\x1f\x8b":
        return "it is a compressed archive; unpack it"
    if text[:8] == b"\x89HDF\r\n\x1a\n":
        return "it looks like HDF5 (Keras?)"
    if text[:4] == b"GGUF":
        return "it is a GGUF file of quantised weights"
    # (What is in it is not shown: it may be anything, led to by a link.)
    return "it begins as no format known here does"

"""What the name of an output says of its format.

Imports nothing heavy, so that commands can ask at their door.
"""

import mimetypes
import os
from pathlib import Path

PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # Pillow's names

# Of files, beyond those the standard library knows.
_FILES = {
    *mimetypes.MimeTypes(filenames=()).types_map[True],
    *(".npy", ".npz", ".pt", ".pth", ".ckpt", ".safetensors", ".pkl", ".h5", ".parquet"),
    *(".tfrecord", ".md", ".yaml", ".toml", ".jpe", ".jfif", ".avif", ".heic", ".heif", ".jxl"),
    *(".jp2", ".exr", ".tif", ".tga", ".ico", ".psd"),
}


def is_npz(path: str | os.PathLike) -> bool:
    """Whether a name is that of an .npz, in any case."""
    return Path(path).suffix.lower() == ".npz"


def picture_format(path: str | os.PathLike) -> str:
    """Pillow's name of the format that a picture of this name is written in, by its suffix.

    Raises:
        ValueError: none of `PICTURES`.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in PICTURES:
        raise ValueError(
            f"{path}: a picture's name ends in {_listed(PICTURES)}, not in {suffix or 'nothing'!r}"
        )
    return PICTURES[suffix]


def samples_format(path: str | os.PathLike) -> str:
    """How samples of this name are written: 'picture' (a grid), 'npz' or 'folder' (of PNGs).

    Raises:
        ValueError: The suffix is that of another kind of file, which would become a folder's name.
    """
    suffix = Path(path).suffix.lower()
    if suffix in PICTURES:
        return "picture"
    if suffix == ".npz":
        return "npz"
    require_folder(path, f"samples are written as {_listed((*PICTURES, '.npz'))}, or into a folder")
    return "folder"


def require_folder(path: str | os.PathLike, wanted: str = "the output is a folder") -> None:
    """Refuses a file's name where a folder is to be made.

    Args:
        path: the name.
        wanted: what may be given, for the error.

    Raises:
        ValueError: The suffix is that of a file.
    """
    suffix = Path(path).suffix.lower()
    if suffix in _FILES and not Path(path).is_dir():
        raise ValueError(f"{path}: {wanted}; {suffix!r} is the suffix of a file of another kind")


def require_suffix(path: str | os.PathLike, *suffixes: str) -> None:
    """Refuses the name of an output whose suffix, in any case, is none of `suffixes`.

    Raises:
        ValueError: It is not.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in suffixes:
        raise ValueError(
            f"{path}: its name must end in {_listed(suffixes)}, not in {suffix or 'nothing'!r}"
        )


def _listed(suffixes) -> str:
    *others, last = suffixes
    return f"{', '.join(others)} or {last}" if others else last

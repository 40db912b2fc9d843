"""Reading files that somebody else made: nothing hangs, nothing outside is read, sizes are bounded.

Every reader of this project opens files through these functions. They open regular files only,
parse JSON with its types checked, and read arrays after their sizes are known to fit the file. No
message repeats what a file holds.
"""

from dit_jax.untrusted.arrays import map_array, npz_names, read_npy_header, read_npz
from dit_jax.untrusted.files import (
    FileRefusedError,
    check_file_name,
    check_regular,
    check_within,
    open_regular,
    shown,
    walk_files,
)
from dit_jax.untrusted.json_files import Fields, parse_json, read_json, read_json_text
from dit_jax.untrusted.tar_files import TarEntry, read_tar
from dit_jax.untrusted.zip_files import MAX_INFLATION, check_inflation, open_zip

__all__ = [
    "MAX_INFLATION",
    "Fields",
    "FileRefusedError",
    "TarEntry",
    "check_file_name",
    "check_inflation",
    "check_regular",
    "check_within",
    "map_array",
    "npz_names",
    "open_regular",
    "open_zip",
    "parse_json",
    "read_json",
    "read_json_text",
    "read_npy_header",
    "read_npz",
    "read_tar",
    "shown",
    "walk_files",
]

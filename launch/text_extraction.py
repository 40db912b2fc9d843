"""Embeddings of captions for launch/extract_features.py: encoders, their limits, what is stored."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dit_jax import data as data_lib
from dit_jax.interop.tensor_file import sha256_of
from dit_jax.interop.tensors import InteropError
from dit_jax.interop.text_encoders import CLIP, T5, load_text_encoder
from dit_jax.interop.tokenizer_files import PromptTokenizer, load_tokenizer
from dit_jax.models.linear import resolve_dtype
from dit_jax.models.text import TextEncoder
from dit_jax.parallel.mesh import DataParallel, put_whole
from dit_jax.pipelines.flux_files import resolve
from dit_jax.pipelines.text import check_vocabulary
from dit_jax.quantities import counted

MAX_LENGTH = 512
_AT_ONCE = 1024  # captions that are looked at together
Encode = Callable[[dict[str, Any]], dict[str, jax.Array]]
_FOLDERS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


@dataclasses.dataclass(frozen=True, eq=False)
class TextSide:
    """An encoder with its tokenizer.

    Attributes:
        title: for messages.
        length: tokens that captions are padded or cut to.
        tokenizer: of the captions.
        encoder: the architecture.
        params: its parameters.
    """

    title: str
    length: int
    tokenizer: PromptTokenizer
    encoder: TextEncoder
    params: Any

    def ids(self, captions: Sequence[str]) -> np.ndarray:
        """Token ids, int32 [n, length]."""
        return self.tokenizer(captions, self.length).ids


@dataclasses.dataclass(frozen=True)
class TextFeatures:
    """What FLUX is told of captions: T5's states, and CLIP's vector of the whole.

    Attributes:
        clip: the encoder of the vector.
        t5: that of the states.
        name: of the folder they are from.
        sha256: of its files.
    """

    clip: TextSide
    t5: TextSide
    name: str
    sha256: str

    def fields(self, dtype: str) -> dict[str, data_lib.Field]:
        """How they are stored.

        Args:
            dtype: of T5's states on disk; CLIP's vector is float32.
        """
        states = (self.t5.length, self.t5.encoder.config.d_model)
        vector = (self.clip.encoder.config.hidden_size,)
        return {
            "text": data_lib.Field(states, dtype, condition=True),
            "pooled": data_lib.Field(vector, "float32", condition=True),
        }

    def provenance(self) -> dict[str, Any]:
        """What decides the numbers."""
        made = {"text_encoders": self.name, "text_sha256": self.sha256}
        return made | {"text_length": self.t5.length}

    def ids(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """Token ids of captions for each encoder, too long ones cut."""
        return {"clip": self.clip.ids(captions), "t5": self.t5.ids(captions)}

    def encoding(self, placement: DataParallel) -> Encode:
        """A function of ids that lie on the devices; gives the fields, each device its share."""
        params = {"clip": self.clip.params, "t5": self.t5.params}
        params = jax.tree.map(lambda array: put_whole(array, placement.replicated), params)
        states = jax.jit(self._states, out_shardings=placement.split)
        return functools.partial(states, params)

    def nulls(
        self, encode: Encode, placement: DataParallel, batch_size: int
    ) -> dict[str, np.ndarray]:
        """Those of the empty prompt, without a batch axis, for captions that are dropped.

        Args:
            encode: what `encoding` returned, which has the parameters on the devices.
            placement: as given to that.
            batch_size: of captions, over all processes: the program is that of their batches.
        """
        made = encode(placement.put_batch(self.ids([""] * (batch_size // jax.process_count()))))
        return {name: np.asarray(array.addressable_data(0)[0]) for name, array in made.items()}

    def _states(self, params: dict[str, Any], ids: dict[str, jax.Array]) -> dict[str, jax.Array]:
        text = self.t5.encoder.encode(params["t5"], ids["t5"]).tokens
        return {
            "text": text,
            "pooled": self.clip.encoder.encode(params["clip"], ids["clip"]).pooled,
        }

    def cut_captions(
        self, captions: Sequence[str], describe: Callable[[int], str]
    ) -> tuple[str, ...]:
        """Says of which captions a part is not encoded, a line for each encoder with such ones.

        Args:
            captions: of the images, one each.
            describe: an image's name, by its number.
        """
        lines = []
        for side in (self.clip, self.t5):
            count, first = 0, ""
            for start in range(0, len(captions), _AT_ONCE):
                cut = side.tokenizer(captions[start : start + _AT_ONCE], side.length).cut
                long = [row for row, text in enumerate(cut) if text]
                if long and not count:
                    first = f"{cut[long[0]][:60]!r} of {describe(start + long[0])}"
                count += len(long)
            if count:
                are = "is" if count == 1 else "are"
                lines.append(
                    f"note: {count} of {counted(len(captions), 'caption')} {are} longer than "
                    f"{side.title}'s {side.length} tokens and cut off there; the first is {first}"
                )
        return tuple(lines)


def require_length(length: int) -> None:
    """Refuses a length of T5's states that is no prompt's.

    Raises:
        ValueError: with those that are.
    """
    if not 2 <= length <= MAX_LENGTH:
        raise ValueError(f"--text_length={length}: expected 2 to {MAX_LENGTH} tokens")


def find_encoders(source: str) -> Path:
    """The folder of a pipeline with encoders and tokenizers; one of the hub is fetched.

    Raises:
        InteropError: there is none, or it lacks a component.
    """
    folder = resolve(source)
    missing = [f"{name}/" for name in _FOLDERS if not (folder / name).is_dir()]
    if missing:
        raise InteropError(
            f"--text_encoders={folder} lacks {', '.join(missing)}: expected the folder of a FLUX "
            f"pipeline, or one with these of its parts: {', '.join(_FOLDERS)}"
        )
    return folder


def open_texts(source: str, length: int, dtype: str) -> TextFeatures:
    """The encoders of a FLUX pipeline, and nothing else of it.

    Args:
        source: its folder or hub:owner/name; text_encoder/, text_encoder_2/, tokenizer/ and
            tokenizer_2/ are read.
        length: of T5's states, in tokens.
        dtype: that they compute in.

    Raises:
        ValueError: a length that is no prompt's.
        InteropError: a component is missing, or is another model's.
    """
    require_length(length)
    folder = find_encoders(source)
    sides = []
    for title, kind, encoder, tokenizer in (
        ("CLIP", CLIP, "text_encoder", "tokenizer"),
        ("T5", T5, "text_encoder_2", "tokenizer_2"),
    ):
        words = load_tokenizer(folder / tokenizer, title, within=folder)
        narrow = "bfloat16" if resolve_dtype(dtype).name == "bfloat16" else "auto"
        options = {"kind": kind, "within": folder, "dtype": dtype, "param_dtype": narrow}
        found, params = load_text_encoder(folder / encoder, **options)
        check_vocabulary(folder, title, words, found.config.vocab_size)
        own = length if kind == T5 else found.config.max_length
        sides.append(TextSide(title, own, words, found, params))
    return TextFeatures(*sides, folder.name, _sha256(folder))


def _sha256(folder: Path) -> str:
    """Of all files of the encoders and the tokenizers, by name."""
    digest = hashlib.sha256()
    for name in _FOLDERS:
        for file in sorted(file for file in (folder / name).iterdir() if file.is_file()):
            digest.update(f"{name}/{file.name} {sha256_of(file)}\n".encode())
    return digest.hexdigest()

"""Tokenizers of prompts, read from a checkpoint's own files with the library `tokenizers` alone.

CLIP's are vocab.json and merges.txt, or tokenizer.json; T5's is tokenizer.json. What they make of a
prompt is what transformers' `CLIPTokenizer` and `T5Tokenizer` make of it.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dit_jax.interop.claims import read_object
from dit_jax.interop.tensors import InteropError, refusals
from dit_jax.quantities import counted
from dit_jax.untrusted import check_within, open_regular, read_json_text, shown

TOKENIZER, VOCAB, MERGES, PIECES = "tokenizer.json", "vocab.json", "merges.txt", "spiece.model"
OPTIONS, SPECIAL, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
CLIP, T5 = "CLIP", "T5"

_MAX_BYTES = 128 * 2**20
_MAX_LENGTH = 10**6  # a longer "limit" is transformers' way to say that there is none
_PADDING = {CLIP: "<|endoftext|>", T5: "<pad>"}
_CLIP_BOS, _CLIP_EOS = "<|startoftext|>", "<|endoftext|>"
# Words, contractions, single digits and runs of anything else (CLIP, as published).
_CLIP_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts as an encoder takes them.

    Attributes:
        ids: int32 [n, l], every prompt padded to the same length.
        mask: bool [n, l], False for padding.
        cut: of each prompt the text that did not fit, '' if all did.
    """

    ids: np.ndarray
    mask: np.ndarray
    cut: tuple[str, ...]


class PromptTokenizer:
    """Prompts to token ids.

    Args:
        backend: a `tokenizers.Tokenizer`.
        padding: the token that prompts are filled up with.
        max_length: the longest prompt in tokens, special ones included; None for no limit.
        files: what `save` writes, by file name.

    Raises:
        InteropError: it has no such token.
    """

    def __init__(
        self,
        backend: Any,
        padding: str,
        max_length: int | None = None,
        files: Mapping[str, bytes] | None = None,
    ):
        self._backend, self.max_length, self.files = backend, max_length, dict(files or {})
        backend.no_padding()
        backend.no_truncation()
        self.padding_id = backend.token_to_id(padding)
        if self.padding_id is None:
            raise InteropError(f"the tokenizer has no token {shown(padding)} to pad prompts with")

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return 1 + max(self._backend.get_vocab(with_added_tokens=True).values())

    def __call__(self, prompts: Sequence[str], max_length: int | None = None) -> Prompts:
        """Tokenizes prompts.

        Args:
            prompts: the texts; '' is one.
            max_length: what all are padded or cut to; default: the tokenizer's own limit, or
                without one the longest prompt.

        Raises:
            ValueError: a prompt that is no string, or no room for one token beside special ones.
        """
        if isinstance(prompts, str) or not all(isinstance(text, str) for text in prompts):
            raise ValueError("prompts: expected a list of strings")
        encoded = [self._backend.encode(text) for text in prompts]
        longest = max((len(one.ids) for one in encoded), default=0)
        length = max_length or self.max_length or longest
        ids = np.full((len(encoded), length), self.padding_id, np.int32)
        mask, cut = np.zeros(ids.shape, bool), []
        for row, (text, one) in enumerate(zip(prompts, encoded, strict=True)):
            kept, rest = _truncated(text, one, length)
            ids[row, : len(kept)], mask[row, : len(kept)] = kept, True
            cut.append(rest)
        return Prompts(ids, mask, tuple(cut))

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the files it was read from; `folder` must not exist."""
        folder = Path(folder)
        folder.mkdir(parents=True)
        for name, content in self.files.items():
            (folder / name).write_bytes(content)


def _truncated(text: str, encoded: Any, length: int) -> tuple[list[int], str]:
    """The ids that fit, the special ones at the end kept, and the text of those that do not."""
    ids, special = encoded.ids, encoded.special_tokens_mask
    if len(ids) <= length:
        return ids, ""
    ends = next((i for i, flag in enumerate(reversed(special)) if not flag), len(ids))
    starts = next((i for i, flag in enumerate(special) if not flag), len(ids))
    if length <= starts + ends:
        raise ValueError(
            f"max_length={length}: a prompt has {counted(starts + ends, 'special token')} and "
            "needs room for others"
        )
    first, last = length - ends, len(ids) - ends
    spans = encoded.offsets[first:last]
    return ids[:first] + ids[last:], text[spans[0][0] : spans[-1][1]]


def load_tokenizer(
    folder: str | os.PathLike, kind: str, *, within: str | os.PathLike | None = None
) -> PromptTokenizer:
    """Reads a tokenizer that transformers saved, or that a checkpoint came with.

    Args:
        folder: tokenizer.json, or of CLIP vocab.json and merges.txt; besides, if there are,
            tokenizer_config.json and special_tokens_map.json.
        kind: `CLIP` or `T5`.
        within: a folder that links may not lead out of, by default `folder`.

    Raises:
        InteropError: a file is missing, or not what it should be.
        ImportError: the library `tokenizers` is not installed.
        ValueError: another `kind`.
    """
    if kind not in _PADDING:
        raise ValueError(f"kind={kind!r}: expected one of {', '.join(_PADDING)}")
    folder = Path(folder).expanduser()
    within = within or folder
    if not folder.is_dir():
        raise InteropError(f"there is no folder {folder}: expected {kind}'s tokenizer in it")
    _require_library()
    options = _options(folder, within)
    special = {
        name: _content(options.get(name))
        for name in ("pad_token", "bos_token", "eos_token", "unk_token")
    }
    if (folder / TOKENIZER).is_file():
        backend = _read_backend(folder / TOKENIZER, within)
    elif kind == CLIP:
        backend = _build_clip(folder, within, special)
    else:
        raise InteropError(_without_tokenizer(folder))
    limit = options.get("model_max_length")
    known = type(limit) in (int, float) and 1 < limit < _MAX_LENGTH
    max_length = int(limit) if known else (77 if kind == CLIP else None)
    names = (TOKENIZER, VOCAB, MERGES, PIECES, OPTIONS, SPECIAL, ADDED)
    files = {name: _bytes(folder / name, within) for name in names if (folder / name).is_file()}
    try:
        return PromptTokenizer(backend, special["pad_token"] or _PADDING[kind], max_length, files)
    except InteropError as error:
        raise InteropError(f"{folder}: {error}") from error


def _require_library() -> None:
    try:
        import tokenizers  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "prompts need the library tokenizers: pip install 'dit-jax[text]'"
        ) from error


def _options(folder: Path, within: Any) -> dict[str, Any]:
    """What tokenizer_config.json and special_tokens_map.json say, the former first."""
    found: dict[str, Any] = {}
    for name in (SPECIAL, OPTIONS):
        if (folder / name).is_file():
            values = read_object(folder / name, within)
            found.update({key: value for key, value in values.items() if value is not None})
    return found


def _content(token: Any) -> str | None:
    """A special token, which files write as a string or as an object with its content."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _bytes(path: Path, within: Any) -> bytes:
    with refusals():
        check_within(path, within)
        with open_regular(path) as file:
            content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise InteropError(f"{path} is longer than {_MAX_BYTES} bytes, the most of a tokenizer")
    return content


def _read_backend(path: Path, within: Any) -> Any:
    from tokenizers import Tokenizer

    with refusals():
        check_within(path, within)
        text = read_json_text(path, max_bytes=_MAX_BYTES)
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise InteropError(f"{path} is no tokenizer that tokenizers reads: {error}") from error


def _without_tokenizer(folder: Path) -> str:
    if not (folder / PIECES).is_file():
        return f"{folder} has no {TOKENIZER}: it holds no T5 tokenizer"
    return (
        f"{folder} has {PIECES} alone, which the library tokenizers does not read. Make its "
        f'{TOKENIZER} once, where transformers and sentencepiece are installed: python -c "from '
        f"transformers import T5TokenizerFast as T; T.from_pretrained('{folder}').save_pretrained("
        f"'{folder}')\""
    )


def _build_clip(folder: Path, within: Any, special: Mapping[str, str | None]) -> Any:
    """CLIP's tokenizer of a vocabulary and merges, as transformers builds it."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.processors import RobertaProcessing

    for name in (VOCAB, MERGES):
        if not (folder / name).is_file():
            raise InteropError(
                f"{folder} has neither {TOKENIZER} nor {name}: CLIP's tokenizer is either the "
                f"former, or {VOCAB} and {MERGES}"
            )
    vocab = read_object(folder / VOCAB, within)
    if not all(type(number) is int and number >= 0 for number in vocab.values()):
        raise InteropError(f"{folder / VOCAB} is no vocabulary: expected numbers of tokens")
    bos, eos = special["bos_token"] or _CLIP_BOS, special["eos_token"] or _CLIP_EOS
    pad = special["pad_token"] or _PADDING[CLIP]
    for token in (bos, eos):
        if token not in vocab:
            raise InteropError(f"{folder / VOCAB} has no token {shown(token)}")
    unknown = special["unk_token"] or eos
    try:
        model = BPE(
            vocab=vocab,
            merges=_merges(folder / MERGES, within),
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            fuse_unk=False,
            unk_token=unknown,
        )
    except Exception as error:  # the library raises nothing narrower
        raise InteropError(f"{folder}: {VOCAB} and {MERGES} do not fit: {error}") from error
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    added = dict.fromkeys((bos, eos, unknown, pad))
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in added])
    backend.post_processor = RobertaProcessing(
        (eos, vocab[eos]), (bos, vocab[bos]), trim_offsets=False, add_prefix_space=False
    )
    return backend


def _merges(path: Path, within: Any) -> list[tuple[str, str]]:
    try:
        lines = _bytes(path, within).decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InteropError(f"{path} is no text: expected pairs of tokens, one a line") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#version"):
            continue
        parts = line.rstrip("\r").split(" ")
        if len(parts) != 2:
            raise InteropError(f"{path}, line {number}: expected two tokens and a space between")
        found.append((parts[0], parts[1]))
    return found

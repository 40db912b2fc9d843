"""Tokenizers of CLIP's and T5's kind, trained on a few texts: for small models and demonstrations.

Both are folders that `tokenizer_files.load_tokenizer` and transformers read. Training takes the
library `tokenizers` and no other.
"""

import collections
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit_jax.interop.tokenizer_files import MERGES, OPTIONS, TOKENIZER, VOCAB

CLIP_BOS, CLIP_EOS = "<|startoftext|>", "<|endoftext|>"
PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"


def train_clip_tokenizer(
    texts: Sequence[str], folder: Path, *, max_length: int = 77, merges: int = 200
) -> None:
    """Writes a tokenizer of byte pairs as CLIP's: lower case, a mark at the end of every word.

    Any text can be told in it, letter by letter if it has to be.

    Args:
        texts: what it is trained on.
        folder: where vocab.json, merges.txt and tokenizer_config.json go; must not exist.
        max_length: of a prompt in tokens, both special ones included.
        merges: at most so many pairs that are one token.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", True)
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(alphabet) + merges,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    model = json.loads(backend.to_str())["model"]
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else pair for pair in model["merges"]]
    # Letters, letters at the end of a word, what is merged, special tokens: the order of CLIP's.
    names = dict.fromkeys([*alphabet, *(f"{letter}</w>" for letter in alphabet)])
    names.update(dict.fromkeys(map("".join, pairs)))
    names.update(dict.fromkeys([CLIP_BOS, CLIP_EOS]))
    vocabulary = {name: number for number, name in enumerate(names)}
    lines = ["#version: 0.2", *(" ".join(pair) for pair in pairs), ""]
    options = {
        "bos_token": CLIP_BOS,
        "eos_token": CLIP_EOS,
        "pad_token": CLIP_EOS,
        "unk_token": CLIP_EOS,
        "model_max_length": max_length,
        "tokenizer_class": "CLIPTokenizer",
    }
    folder.mkdir(parents=True)
    _write_json(folder / VOCAB, vocabulary)
    (folder / MERGES).write_text("\n".join(lines), encoding="utf-8")
    _write_json(folder / OPTIONS, options)


def train_t5_tokenizer(texts: Sequence[str], folder: Path, *, max_length: int = 512) -> None:
    """Writes a unigram tokenizer as T5's: '▁' where a word begins, </s> at the end.

    A piece's score is the logarithm of its share. The pieces are the words of the texts and, for
    words that they lack, letters: the trainer of `tokenizers` counts distinct words, of which a few
    texts have too few for it to find any piece that is a word.

    Args:
        texts: what it is trained on; letters that they lack become <unk>.
        folder: where tokenizer.json and tokenizer_config.json go; must not exist.
        max_length: of a prompt in tokens, the last one included.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = collections.Counter(f"▁{word}" for text in texts for word in text.split())
    letters = collections.Counter("".join(words))
    total = words.total()
    scores = {word: math.log(count / total) for word, count in words.most_common()}
    rare = min(scores.values()) - 1
    for letter, count in letters.most_common():
        scores.setdefault(letter, rare + math.log(count / letters.total()))
    special = [(PAD, 0.0), (EOS, 0.0), (UNKNOWN, 0.0)]  # 0, 1 and 2, as T5's
    backend = Tokenizer(models.Unigram([*special, *scores.items()], unk_id=2))
    backend.add_special_tokens([PAD, EOS, UNKNOWN])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, 1)]
    )
    options = {
        "pad_token": PAD,
        "eos_token": EOS,
        "unk_token": UNKNOWN,
        "extra_ids": 0,
        "model_max_length": max_length,
        "tokenizer_class": "T5TokenizerFast",
    }
    folder.mkdir(parents=True)
    (folder / TOKENIZER).write_text(backend.to_str(), encoding="utf-8")
    _write_json(folder / OPTIONS, options)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")

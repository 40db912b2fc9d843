"""Small tokenizers of CLIP's and T5's kind, trained on a few sentences, and saved as theirs are."""

import json

TEXTS = [
    "a photo of a cat holding a sign that says hello world",
    "A handwritten seven, three and five side by side on a canvas!",
    "the quick brown fox jumps over the lazy dog; it's 1984 & we're here",
    "Ein Bär läuft über die Straße. Où est l'éléphant? 猫は7匹です。",
    "an astronaut riding a horse on mars, oil painting, 4k, highly detailed",
]
PROMPTS = [
    "",
    "a cat",
    "  A   CAT\twith\nspaces  ",
    "Straße, ÉLÉPHANT, 猫 and something never seen: ∂ƒ 🦊 Ωmega",
    "it's we're I'll 1234567 !!! ... <|endoftext|> </s> <pad> <extra_id_0>",
    "e\u0301te\u0301 decomposed, \u00a0no-break, \u200bzero width",
    "the quick brown fox jumps over the lazy dog " * 4,
]


def write_clip(folder, vocab_size=320):
    """vocab.json, merges.txt, tokenizer_config.json and special_tokens_map.json, as OpenAI's."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 258,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    letters = sorted(alphabet)
    names = dict.fromkeys([*letters, *(f"{letter}</w>" for letter in letters)])
    names.update(dict.fromkeys(model["vocab"]))
    names.update(dict.fromkeys(["<|startoftext|>", "<|endoftext|>"]))
    folder.mkdir(parents=True)
    vocab = {name: number for number, name in enumerate(names)}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")

    def token(content, normalized):
        flags = {"lstrip": False, "rstrip": False, "single_word": False}
        return {"content": content, "normalized": normalized, **flags}

    special = {
        "bos_token": token("<|startoftext|>", True),
        "eos_token": token("<|endoftext|>", True),
        "unk_token": token("<|endoftext|>", True),
        "pad_token": "<|endoftext|>",
    }
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    options = {**special, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    return len(vocab)


def write_t5(folder, vocab_size=150, extra_ids=4):
    """What transformers' T5Tokenizer saves: tokenizer.json and tokenizer_config.json."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size - extra_ids,
        special_tokens=special,
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    vocab = [tuple(entry) for entry in json.loads(tokenizer.to_str())["model"]["vocab"]]
    vocab += [(f"<extra_id_{number}>", 0.0) for number in range(extra_ids - 1, -1, -1)]
    saved = transformers.T5TokenizerFast(vocab=vocab, extra_ids=extra_ids, model_max_length=512)
    saved.save_pretrained(folder)
    return len(vocab)

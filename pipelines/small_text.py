"""Text encoders of FLUX's kind that are small and untrained: for demonstrations and tests.

CLIP and T5 are real, and their tokenizers are trained on the given texts. Their weights are random
and stay so: a network that is trained on their states learns what they mean, as long as different
texts have different ones. Drawn as such encoders are before training, T5's would hardly tell the
order of words; here its distances count (`_BIAS`), so that the state of a word depends on what
stands before it and after it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from dit_jax.interop.parameters import flatten, unflatten
from dit_jax.interop.small_tokenizers import train_clip_tokenizer, train_t5_tokenizer
from dit_jax.interop.text_encoders import save_text_encoder
from dit_jax.interop.tokenizer_files import load_tokenizer
from dit_jax.models.text import CLIPTextConfig, T5Config, TextEncoder

_BIAS = 2.0  # standard deviation of what a distance adds to a score of T5's attention
_DRAWN = 0.02  # that of the embeddings as they are drawn for training
_SPREAD = {"token_embedding": 1.0, "position_embedding": 1.0, "relative_bias": _BIAS}


def write_text_encoders(
    folder: Path,
    texts: Sequence[str],
    *,
    text_dim: int = 64,
    pooled_dim: int = 32,
    max_length: int = 16,
    seed: int = 0,
) -> None:
    """Writes tokenizer/, text_encoder/ (CLIP), tokenizer_2/ and text_encoder_2/ (T5).

    Args:
        folder: where they go; none of them may exist.
        texts: what the tokenizers are trained on.
        text_dim: width of T5's states, a multiple of 16.
        pooled_dim: width of CLIP's vector, a multiple of 8.
        max_length: of CLIP's prompts in tokens, its two special ones included.
        seed: of the weights.
    """
    train_clip_tokenizer(texts, folder / "tokenizer", max_length=max_length)
    train_t5_tokenizer(texts, folder / "tokenizer_2")
    words = load_tokenizer(folder / "tokenizer", "CLIP")
    clip = CLIPTextConfig(
        vocab_size=words.vocab_size,
        hidden_size=pooled_dim,
        intermediate_size=2 * pooled_dim,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=max_length,
        projection_dim=pooled_dim,
        eos_token_id=words.padding_id,  # the same token, as in CLIP
        dtype="float32",
    )
    t5 = T5Config(
        vocab_size=load_tokenizer(folder / "tokenizer_2", "T5").vocab_size,
        d_model=text_dim,
        d_kv=text_dim // 4,
        d_ff=2 * text_dim,
        num_layers=2,
        num_heads=4,
        dtype="float32",
    )
    keys = jax.random.split(jax.random.key(seed))
    for config, name, key in zip((clip, t5), ("text_encoder", "text_encoder_2"), keys, strict=True):
        encoder = TextEncoder(config)
        save_text_encoder(folder / name, encoder, spread(jax.jit(encoder.init)(key)))


def spread(params: dict[str, Any]) -> dict[str, Any]:
    """Fresh parameters of an encoder with embeddings that different texts are told apart by."""
    wider = {name: size / _DRAWN for name, size in _SPREAD.items()}
    return unflatten(
        (path, leaf * wider.get(path.split(".")[0], 1)) for path, leaf in flatten(params)
    )

"""Small text encoders of transformers, every parameter random, for comparison."""

import functools

import torch

CLIP = {
    "vocab_size": 70,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 12,
    "projection_dim": 24,
    "bos_token_id": 0,
    "pad_token_id": 1,
}
T5 = {
    "vocab_size": 60,
    "d_model": 32,
    "d_kv": 6,
    "d_ff": 40,
    "num_layers": 3,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
}


def randomise(model, seed=0):
    """Fills every parameter with something random; matrices keep activations of order one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                parameter.copy_(centre + 0.2 * noise)
            else:
                is_table = "embedding" in name or "embed_tokens" in name or "bias" in name
                parameter.copy_(noise * (1.0 if is_table else parameter.shape[1] ** -0.5))
    return model.eval()


@functools.cache
def clip(eos_token_id=2, hidden_act="quick_gelu", projection=False):
    """A CLIP text model."""
    import transformers

    config = transformers.CLIPTextConfig(**CLIP, eos_token_id=eos_token_id, hidden_act=hidden_act)
    name = "CLIPTextModelWithProjection" if projection else "CLIPTextModel"
    return randomise(getattr(transformers, name)(config))


@functools.cache
def t5(**changes):
    """A T5 encoder."""
    import transformers

    return randomise(transformers.T5EncoderModel(transformers.T5Config(**{**T5, **changes})))

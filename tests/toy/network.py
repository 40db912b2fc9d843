"""A small transformer that is told a text, by joint attention over text and image tokens."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from dit_jax.conditions import Condition
from dit_jax.models import Request, Result, attention, layers, register_network, stack, step_cache
from dit_jax.models.attention_options import AttentionOptions
from dit_jax.models.linear import Linear
from dit_jax.models.transformer_config import TransformerConfig
from dit_jax.options import option
from dit_jax.ranges import COUNT


@dataclasses.dataclass(frozen=True)
class ToyConfig(TransformerConfig):
    image_size: int = 8
    in_channels: int = 1
    num_classes: int = 0
    text_dim: int = option(4, "width of a token of the text", COUNT)
    hidden_size: int = option(16, "width of the blocks", COUNT)
    patch_size, depth, num_heads, learn_sigma = 2, 2, 2, False
    title, flops_per_example = "a toy", 1e5

    @property
    def conditions(self):
        text = Condition((None, self.text_dim), null_is_given=True)
        return {"text": text, "text_mask": Condition((None,), "bool", null=False)}


class Block(nnx.Module):
    def __init__(self, config, *, rngs):
        dim, self.num_heads = config.hidden_size, config.num_heads
        self.qkv = Linear(dim, 3 * dim, rngs=rngs)
        self.proj = Linear(dim, dim, rngs=rngs)
        self.mlp = layers.Mlp(dim, 2 * dim, rngs=rngs)

    def __call__(self, x, state, shift, options, attend):
        qkv = self.qkv(layers.layer_norm(x) + shift[:, None])
        q, k, v = jnp.moveaxis(qkv.reshape(*x.shape[:2], 3, self.num_heads, -1), 2, 0)
        out, state = attend(q, k, v, state, options)
        x = x + self.proj(out.reshape(x.shape))
        return x + self.mlp(layers.layer_norm(x)), state


class Toy(nnx.Module):
    def __init__(self, config, *, rngs):
        self.config, dim = config, config.hidden_size
        patch = config.patch_size**2 * config.in_channels
        self.x_embedder = Linear(patch, dim, rngs=rngs)
        self.t_embedder = layers.TimestepEmbedder(dim, rngs=rngs)
        self.text_embedder = Linear(config.text_dim, dim, rngs=rngs)
        self.blocks = stack.create_stack(lambda r: Block(config, rngs=r), config.depth, rngs)
        self.out = Linear(dim, patch, rngs=rngs)

    def __call__(self, request: Request) -> Result:
        config, x, told = self.config, request.x, request.conditions
        attend = request.attention or attention.LocalAttention(config.attention)
        image, own = layers.embed_patches(self.x_embedder, x, config.patch_size, attend)
        text = self.text_embedder(told["text"].astype(jnp.float32))
        options = AttentionOptions(key_mask=told["text_mask"], replicated=text.shape[1])
        tokens, carry, maps = step_cache.run_stack(
            request,
            self.blocks,
            lambda block, x, state, *rest: block(x, state, *rest, attend),
            jnp.concatenate([text, image], axis=1),
            *(jax.nn.silu(self.t_embedder(request.t)), options),
            **{"depth": config.depth, **attention.prefetching(attend)},
        )
        tokens, *maps = (a[:, text.shape[1] :] for a in (tokens, *maps))
        out = layers.unpatchify(self.out(layers.layer_norm(tokens)), config.patch_size, own)
        return Result(out, tuple(m.reshape(x.shape[0], *own, -1) for m in maps), carry)


def register() -> None:
    register_network("toy", ToyConfig, Toy)

"""The FLUX.1 transformer: text and image in joint attention, first as two streams, then as one.

Black Forest Labs, FLUX.1 (github.com/black-forest-labs/flux, 2024); with reference images FLUX.1
Kontext (arXiv 2506.15742). It is trained as a rectified flow whose network sees 1000 t and predicts
eps - x0 (`process.RectifiedFlow` of network_convention 'flux' and time_scale 1000).

The tokens of a sequence are, in this order, the text's, those of a reference image, and the
image's: what stands before the image's is the same on all devices that share an image.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dit_jax.models import attention as attention_lib
from dit_jax.models import cpu_kernels, layers, rotary, stack, step_cache
from dit_jax.models.attention_options import AttentionOptions
from dit_jax.models.call import Request, Result
from dit_jax.models.dit import FinalLayer
from dit_jax.models.flux_ahead import Modulations, modulations_ahead
from dit_jax.models.flux_config import ROTARY_AXES, ROTARY_THETA, FluxConfig
from dit_jax.models.linear import ZEROS, Linear, Precision, resolve_dtype

Streams = tuple[Array, Array]


@dataclasses.dataclass(frozen=True)
class JointAttention:
    """How the tokens of a layer attend to one another.

    Attributes:
        strategy: of the attention seam.
        replicated: tokens before the image's: text, and a reference image's.
    """

    strategy: attention_lib.Attention
    replicated: int

    def __call__(
        self,
        q: Float[Array, "b l h d"],
        k: Float[Array, "b l h d"],
        v: Float[Array, "b l h d"],
        table: Any,
        state: Any,
    ) -> tuple[Float[Array, "b l width"], Any]:
        """Turns queries and keys by their positions, attends, and joins the heads."""
        q, k = (rotary.apply_rotary(a, table) for a in (q, k))
        out, state = self.strategy(q, k, v, state, AttentionOptions(replicated=self.replicated))
        return out.reshape(*out.shape[:2], -1), state


class QKNorm(nnx.Module):
    """Normalisation of the queries and keys of every head, each with a scale of its own."""

    def __init__(self, config: FluxConfig):
        self.num_heads = config.num_heads
        self.query_norm = layers.RMSNorm(config.head_dim)
        self.key_norm = layers.RMSNorm(config.head_dim)

    def __call__(self, qkv: Float[Array, "b l width"]):
        """Queries, keys and values [b, l, h, d] of a fused projection."""
        qkv = qkv.reshape(*qkv.shape[:2], 3, self.num_heads, -1)
        return self.query_norm(qkv[:, :, 0]), self.key_norm(qkv[:, :, 1]), qkv[:, :, 2]


class StreamAttention(nnx.Module):
    """A stream's projections to and from joint attention."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs):
        dim, options = config.hidden_size, {"rngs": rngs, "precision": config.precision}
        self.qkv = Linear(dim, 3 * dim, **options)
        self.norm = QKNorm(config)
        self.proj = Linear(dim, dim, **options)


class Stream(nnx.Module):
    """What a double block does to the tokens of one kind, text or image."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs):
        dim, precision = config.hidden_size, config.precision
        custom = cpu_kernels.resolve_custom_gradients(config.custom_gradients)
        self.custom_gradients = custom
        self.attn = StreamAttention(config, rngs=rngs)
        self.mlp = layers.Mlp(
            dim, config.mlp_hidden, rngs=rngs, precision=precision, custom_gradients=custom
        )
        self.adaLN_modulation = Linear(
            dim, 6 * dim, rngs=rngs, init=ZEROS, precision=precision, role="modulation"
        )

    def modulation(self, condition: Array | None, known: Array | None) -> list[Array]:
        """Shift, scale and gate [b, d] of attention, and of the MLP; of those `known`, if any."""
        made = self.adaLN_modulation(condition) if known is None else known
        return jnp.split(made, 6, axis=-1)

    def project(self, x: Float[Array, "b l d"], modulation: list[Array]):
        """Normalised queries, normalised keys, and values [b, l, h, d]."""
        shift, scale = modulation[:2]
        custom = {"custom_gradients": self.custom_gradients}
        return self.attn.norm(layers.modulated_product(self.attn.qkv, x, shift, scale, **custom)[0])

    def update(
        self, x: Float[Array, "b l d"], attended: Float[Array, "b l d"], modulation: list[Array]
    ) -> Float[Array, "b l d"]:
        """The tokens with what attention gave, and then the MLP, added."""
        _, _, gate_attention, shift, scale, gate = modulation
        custom = {"custom_gradients": self.custom_gradients}
        x = layers.gated_residual(x, self.attn.proj(attended), gate_attention, **custom)
        return layers.gated_residual(x, self.mlp.modulated(x, shift, scale), gate, **custom)


class DoubleBlock(nnx.Module):
    """Joint attention of text and image, each with projections, MLP and modulation of its own."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs):
        self.image = Stream(config, rngs=rngs)
        self.text = Stream(config, rngs=rngs)

    def __call__(
        self,
        streams: Streams,
        condition: Float[Array, "b d"] | None,
        table: Any,
        attention: JointAttention,
        state: Any = None,
        modulations: tuple[Array, Array] = (None, None),
    ) -> tuple[Streams, Any]:
        """`streams` are (text, reference and image); `condition` has passed SiLU already.

        `modulations` are what the streams' `adaLN_modulation` make of it, if that is known.

        Returns:
            The streams and the attention state.
        """
        text, image = streams
        of_text = self.text.modulation(condition, modulations[0])
        of_image = self.image.modulation(condition, modulations[1])
        both = self.text.project(text, of_text), self.image.project(image, of_image)
        q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip(*both, strict=True))
        attended, state = attention(q, k, v, table, state)
        length = text.shape[1]
        text = self.text.update(text, attended[:, :length], of_text)
        image = self.image.update(image, attended[:, length:], of_image)
        return (text, image), state


class SingleBlock(nnx.Module):
    """Attention and MLP side by side on all tokens, between one projection in and one out."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs):
        dim, hidden, precision = config.hidden_size, config.mlp_hidden, config.precision
        options = {"rngs": rngs, "precision": precision}
        self.custom_gradients = cpu_kernels.resolve_custom_gradients(config.custom_gradients)
        self.linear1 = Linear(dim, 3 * dim + hidden, **options)
        self.linear2 = Linear(dim + hidden, dim, **options)
        self.norm = QKNorm(config)
        self.adaLN_modulation = Linear(dim, 3 * dim, init=ZEROS, role="modulation", **options)

    def __call__(
        self,
        x: Float[Array, "b l d"],
        condition: Float[Array, "b d"] | None,
        table: Any,
        attention: JointAttention,
        state: Any = None,
        modulation: Float[Array, "b m"] | None = None,
    ):
        """As `DoubleBlock`, of the tokens of both streams together."""
        if modulation is None:
            modulation = self.adaLN_modulation(condition)
        shift, scale, gate = jnp.split(modulation, 3, axis=-1)
        custom = {"custom_gradients": self.custom_gradients}
        projected, _ = layers.modulated_product(self.linear1, x, shift, scale, **custom)
        qkv, hidden = jnp.split(projected, [3 * x.shape[-1]], axis=-1)
        attended, state = attention(*self.norm(qkv), table, state)
        hidden = layers.gelu(hidden, **custom)
        update = self.linear2(jnp.concatenate([attended, hidden], axis=-1))
        return layers.gated_residual(x, update, gate, **custom), state


class VectorEmbedder(nnx.Module):
    """The vector of the whole text through a two-layer MLP with SiLU."""

    def __init__(self, dim: int, hidden_size: int, *, rngs: nnx.Rngs, precision: Precision):
        options = {"rngs": rngs, "precision": precision, "role": "conditioning"}
        self.fc1 = Linear(dim, hidden_size, **options)
        self.fc2 = Linear(hidden_size, hidden_size, **options)

    def __call__(self, vector: Float[Array, "b i"]) -> Float[Array, "b d"]:
        """Embeds it."""
        return self.fc2(jax.nn.silu(self.fc1(vector)))


class Flux(nnx.Module):
    """(noisy latents, time, text) -> velocity, through double and then single blocks."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs):
        dim, options = config.hidden_size, {"rngs": rngs, "precision": config.precision}
        patch_dim = config.patch_size**2 * config.in_channels
        self.config = config
        self.x_embedder = Linear(patch_dim, dim, role="embedding", **options)
        self.text_embedder = Linear(config.text_dim, dim, role="embedding", **options)
        self.t_embedder = layers.TimestepEmbedder(dim, **options)
        self.pooled_embedder = VectorEmbedder(config.pooled_dim, dim, **options)
        if config.guidance_embedding:
            self.guidance_embedder = layers.TimestepEmbedder(dim, **options)
        self.double_blocks = stack.create_stack(
            lambda rngs: DoubleBlock(config, rngs=rngs), config.depth, rngs
        )
        self.single_blocks = stack.create_stack(
            lambda rngs: SingleBlock(config, rngs=rngs), config.single_depth, rngs
        )
        self.final_layer = FinalLayer(config, rngs=rngs)

    def __call__(self, request: Request) -> Result:
        """Predicts from the noisy latents, of whose rows a strategy may give a part.

        Any height and width go that are multiples of the patch size; positions are those of the
        input's grid, a reference image's those of its own.

        Feature maps are the image's tokens after the blocks of these numbers, those of two streams
        first, [b, rows, columns, width]. A carry has what is carried for each of the two stacks,
        leaves with a leading layer axis.

        Raises:
            ValueError: latents, or a reference image's, whose sides are no multiples of the patch
                size; features that are not ascending numbers of blocks, or any with a step cache.
        """
        config, x = self.config, request.x
        strategy = request.attention or attention_lib.LocalAttention(
            config.attention, cpu_kernels.resolve_custom_gradients(config.custom_gradients)
        )
        own = tuple(side // config.patch_size for side in x.shape[1:3])
        count = own[0] * own[1]
        text = self.text_embedder(request.conditions["text"])
        image = self.x_embedder(self._patches(x, request.conditions.get("reference")))
        replicated = text.shape[1] + image.shape[1] - count
        ahead: Modulations | None = request.ahead
        condition = None if ahead else self.condition(request.t, request.conditions)
        table = self._table(strategy, own, text.shape[1], request.conditions.get("reference"))
        stacks = _Stacks(
            config,
            self.double_blocks,
            self.single_blocks,
            JointAttention(strategy, replicated),
            (condition, table),
            count,
            ahead.of_layers() if ahead else (None, None),
        )
        tokens, carry, captured = stacks.run(request, (text, image))
        patches = self.final_layer(tokens, condition, ahead and ahead.final)
        maps = (x.shape[0], *own, config.hidden_size)
        return Result(
            layers.unpatchify(patches, config.patch_size, own),
            tuple(tokens.reshape(maps) for tokens in captured),
            carry,
        )

    def ahead(self, t: Float[Array, " n"], conditions: dict[str, Array]) -> Modulations | None:
        """See `Network.ahead`."""
        return modulations_ahead(self, t, conditions)

    def _patches(self, x: Array, reference: Array | None) -> Float[Array, "b l i"]:
        """Patches of a reference image, if there is one, and of the image."""
        size = self.config.patch_size
        images = [x] if reference is None else [reference, x]
        if any(side % size for image in images for side in image.shape[1:3]):
            shapes = " and ".join(f"{image.shape[1]}x{image.shape[2]}" for image in images)
            raise ValueError(
                f"latents of {shapes}: FLUX takes heights and widths that are multiples of {size}"
            )
        patches = [layers.patchify(image.astype(x.dtype), size) for image in images]
        return jnp.concatenate(patches, axis=1)

    def _table(
        self,
        strategy: attention_lib.Attention,
        own: tuple[int, int],
        text: int,
        reference: Array | None,
    ) -> Any:
        """Rotary angles of all tokens: text at the origin, a reference image on axis 0 at 1."""
        config = self.config

        def table(ids):
            return rotary.rotary_table(ids, config.axes_channels, ROTARY_THETA)

        def of_grid(grid):
            return table(rotary.grid_ids(grid, axes=ROTARY_AXES))

        parts = [table(rotary.grid_ids((text,), axes=ROTARY_AXES) * 0)]
        if reference is not None:
            grid = tuple(side // config.patch_size for side in reference.shape[1:3])
            ids = rotary.grid_ids(grid, axes=ROTARY_AXES)
            ids[:, 0] = 1
            parts.append(table(ids))
        parts.append(attention_lib.own_positions(strategy, own, of_grid))
        return jnp.concatenate(parts, axis=0)

    def condition(self, t: Array, conditions: dict[str, Array]) -> Float[Array, "b d"]:
        """What modulates every block: time, guidance and the whole text, through SiLU."""
        condition = self.t_embedder(t) + self.pooled_embedder(conditions["pooled"])
        if self.config.guidance_embedding:
            told = told_guidance(conditions["guidance"], resolve_dtype(self.config.dtype))
            condition = condition + self.guidance_embedder(told)
        return jax.nn.silu(condition).astype(resolve_dtype(self.config.dtype))


def told_guidance(guidance: Float[Array, " b"], dtype: jnp.dtype) -> Float[Array, " b"]:
    """1000 times the scale, as of time.

    In bfloat16 rounded as the published implementations round it (3.5 becomes 3504), which is what
    their users see: a constant shift of a setting, unlike the rounding of times, which stay exact.
    """
    if dtype != jnp.bfloat16:
        return 1000.0 * guidance

    def rounded(x):
        # XLA may leave out a conversion to bfloat16 and back, but not this.
        return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)

    return rounded(1000.0 * rounded(guidance))


@dataclasses.dataclass(frozen=True)
class _Stacks:
    """The double blocks and after them the single ones, as one stack with one carry.

    Attributes:
        config: of the network.
        double: the blocks of two streams.
        single: those of one.
        attention: of all of them.
        shared: what all of them take: condition and rotary table.
        count: the image's tokens, the last ones of a sequence.
        own: modulations of the double and of the single blocks, leaves with a leading layer axis;
            None where they are computed of the condition.
    """

    config: FluxConfig
    double: nnx.Module
    single: nnx.Module
    attention: JointAttention
    shared: tuple[Any, Any]
    count: int
    own: tuple[Any, Any] = (None, None)

    def run(self, request: Request, streams: Streams) -> tuple[Array, Any, tuple[Array, ...]]:
        """The image's tokens after all blocks, the new carry, and the feature maps."""
        if request.step_cache is not None:
            return self._run_cached(request, streams)
        depth, wanted = self.config.depth, request.features
        stack.check_capture(wanted, depth + self.config.single_depth)
        double, single = request.carry or (None, None)
        first = tuple(i for i in wanted if i < depth)
        later = tuple(i - depth for i in wanted if i >= depth)
        streams, double, maps = self._run_double(streams, double, capture=first)
        tokens, single, more = self._run_single(streams, single, capture=later)
        captured = (*(image for _, image in maps), *more)
        carry = None if request.carry is None else (double, single)
        return self._image(tokens), carry, tuple(map(self._image, captured))

    def _run_cached(self, request: Request, streams: Streams) -> tuple[Array, Any, tuple]:
        """With a step cache, which compares and keeps the image's tokens alone."""
        if request.features:
            raise ValueError(f"features {request.features} with a step cache: expected none")
        depth, (double, single) = self.config.depth, request.carry.layers or (None, None)
        first, double, _ = self._run_double(streams, double, layers=(0, 1))

        def rest(_, states):
            double, single = states
            streams = first
            if depth > 1:
                streams, double, _ = self._run_double(first, double, layers=(1, depth))
            tokens, single, _ = self._run_single(streams, single)
            return self._image(tokens), (double, single)

        tokens, cache, states = step_cache.run_cached(
            request.step_cache,
            request.carry.cache,
            self._image(streams[1]),
            self._image(first[1]),
            rest,
            (double, single),
        )
        layers = None if request.carry.layers is None else states
        return tokens, step_cache.CachedCarry(layers, cache), ()

    def _image(self, tokens: Float[Array, "b l d"]) -> Float[Array, "b n d"]:
        return tokens[:, tokens.shape[1] - self.count :]

    def _run_double(self, streams: Streams, state: Any, **options: Any):
        options["own"] = self.own[0]
        return self._run(self.double, self.config.depth, streams, state, options)

    def _run_single(self, streams: Streams, state: Any, **options: Any):
        tokens = jnp.concatenate(streams, axis=1)
        options["own"] = self.own[1]
        return self._run(self.single, self.config.single_depth, tokens, state, options)

    def _run(self, blocks: nnx.Module, depth: int, x: Any, state: Any, options: dict[str, Any]):
        return stack.run_stack(
            blocks,
            lambda block, x, state, condition, table, *own: block(
                x, condition, table, self.attention, state, *own
            ),
            x,
            *self.shared,
            state=state,
            depth=depth,
            layer_loop=self.config.layer_loop,
            remat=self.config.remat,
            **attention_lib.prefetching(self.attention.strategy),
            **options,
        )

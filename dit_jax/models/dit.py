"""The diffusion transformer (DiT) with adaLN-zero conditioning.

Peebles and Xie, "Scalable Diffusion Models with Transformers" (arXiv 2212.09748). SiT
(arXiv 2401.08740) is the same network trained as a rectified flow, its variance channels unused.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dit_jax import conditions as conditions_lib
from dit_jax.models import attention as attention_lib
from dit_jax.models import cpu_kernels, layers, stack, step_cache
from dit_jax.models.batch_axes import divided_by_rows
from dit_jax.models.call import Request, Result
from dit_jax.models.linear import ZEROS, Linear, Precision
from dit_jax.models.transformer_config import TransformerConfig
from dit_jax.nearest import one_of
from dit_jax.options import option
from dit_jax.ranges import COUNT, POSITIVE

# The paper's table 1: (depth, hidden size, heads).
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}


@dataclasses.dataclass(frozen=True)
class DiTConfig(TransformerConfig):
    """Shape and execution of a DiT, of any height and width that are multiples of the patch's.

    `null_class`: a DiT trained without label dropout has no row of its class table for "no class".
    `time_frequency_spacing`: see `layers.timestep_frequencies`. `mlp_norm_epsilon`: diffusers'
    default is of the norm before the MLP alone, its other norms have 1e-6 all the same.
    `layer_loop`: see `stack.resolve_layer_loop`.
    """

    patch_size: int = option(2, "side of the square of the input that becomes a token", COUNT)
    hidden_size: int = option(1152, "width of the blocks", COUNT)
    depth: int = option(28, "blocks", COUNT)
    num_heads: int = option(16, "of attention", COUNT)
    mlp_ratio: float = option(4.0, "width of a block's MLP over hidden_size", POSITIVE)
    null_class: bool = option(True, 'whether there is a "no class", which guidance needs')
    learn_sigma: bool = option(True, "predict the variance, too (of process ddpm)")
    time_frequency_spacing: str = option("original", "original | diffusers")
    mlp_norm_epsilon: float = option(1e-6, "1e-5 in diffusers' default DiT", POSITIVE)
    layer_loop: str = option("auto", "scan | unroll | auto: by backend")

    stacks = ("blocks",)  # no option, and the same in all

    def __post_init__(self):
        for name in ("in_channels", "patch_size", "hidden_size", "depth", "num_heads"):
            if getattr(self, name) < 1:
                key = name if name == "in_channels" else f"dit.{name}"
                raise ValueError(f"model.{key}={getattr(self, name)}: expected at least 1")
        if self.num_classes < 0:
            raise ValueError(f"model.num_classes={self.num_classes}: expected 0 or more")
        if any(side < 1 or side % self.patch_size for side in self.input_size):
            key = "image_size" if isinstance(self.image_size, int) else "input_size"
            raise ValueError(
                f"model.{key}={self.image_size} is not divisible by model.dit.patch_size="
                f"{self.patch_size}: choose a patch size that divides both sides"
            )
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ValueError(
                f"model.dit.hidden_size={self.hidden_size} must be a multiple of "
                f"model.dit.num_heads={self.num_heads} and of 4 (sine-cosine positions)"
            )
        if self.time_frequency_spacing not in layers.TIME_FREQUENCY_SPACINGS:
            raise ValueError(
                f"model.dit.time_frequency_spacing={self.time_frequency_spacing!r}: expected "
                f"one of {layers.TIME_FREQUENCY_SPACINGS}"
            )
        if not self.mlp_norm_epsilon > 0:
            raise ValueError(
                f"model.dit.mlp_norm_epsilon={self.mlp_norm_epsilon}: expected above 0"
            )
        if self.second_time not in layers.SECOND_TIMES:
            expected = one_of(self.second_time, layers.SECOND_TIMES)
            raise ValueError(f"model.second_time={self.second_time!r}: {expected}")
        if self.augment_dim < 0:
            raise ValueError(f"model.augment_dim={self.augment_dim}: expected 0 or more")
        stack.resolve_layer_loop(self.layer_loop)
        stack.rematerialised(lambda: None, self.remat)
        cpu_kernels.resolve_custom_gradients(self.custom_gradients)
        dtype = self.precision.dtype("hidden")
        attention_lib.resolve_implementation(self.attention, dtype, self.head_dim)

    @property
    def title(self) -> str:
        """The paper's name, 'DiT-XL/2', or the shape."""
        shape = (self.depth, self.hidden_size, self.num_heads)
        for size, named in SIZES.items():
            if shape == named:
                return f"DiT-{size}/{self.patch_size}"
        return (
            f"DiT of depth {self.depth}, width {self.hidden_size}, {self.num_heads} heads, patches "
            f"of {self.patch_size}"
        )

    @property
    def out_channels(self) -> int:
        """Channels of the output: twice the input's when the variance is learned."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def conditions(self) -> dict[str, conditions_lib.Condition]:
        """What it takes: a label, a second time and augmentation, as configured."""
        return {
            **conditions_lib.class_label(self.num_classes, null=self.null_class),
            **(conditions_lib.second_time() if self.second_time != "none" else {}),
            **conditions_lib.augmentation(self.augment_dim),
        }

    @property
    def flops_per_example(self) -> float:
        """See `flops_per_example`."""
        return flops_per_example(self)

    def stack_shape(self, size: tuple[int, int]) -> tuple[int, int]:
        """(tokens, width) of the blocks' activations for an input of (height, width)."""
        rows, columns = (side // self.patch_size for side in size)
        return rows * columns, self.hidden_size

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> "DiTConfig":
        """The paper's model called `name`, for instance 'DiT-XL/2'."""
        return cls(**{**named_size(name), **overrides})


def named_size(name: str) -> dict[str, int]:
    """Depth, width, heads and patch size of 'DiT-{S,B,L,XL}/{2,4,8}'."""
    size, _, patch_size = name.removeprefix("DiT-").partition("/")
    if not name.startswith("DiT-") or size not in SIZES or patch_size not in ("2", "4", "8"):
        raise ValueError(f"unknown model {name!r}: expected DiT-{{S,B,L,XL}}/{{2,4,8}}")
    depth, hidden_size, num_heads = SIZES[size]
    return {
        "depth": depth,
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        "patch_size": int(patch_size),
    }


class SelfAttention(nnx.Module):
    """Multi-head self-attention with one fused projection to queries, keys and values."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        rngs: nnx.Rngs,
        precision: Precision,
        custom_gradients: bool = False,
    ):
        self.num_heads, self.custom_gradients = num_heads, custom_gradients
        self.qkv = Linear(dim, 3 * dim, rngs=rngs, precision=precision)
        self.proj = Linear(dim, dim, rngs=rngs, precision=precision)

    def __call__(
        self,
        x: Float[Array, "b l d"],
        shift: Float[Array, "b d"],
        scale: Float[Array, "b d"],
        attention: attention_lib.Attention,
        state: Any,
    ):
        """Attends among the tokens `layers.modulated_layer_norm(x, shift, scale)`.

        Returns:
            The projected attention output and the layer's attention state.
        """
        b, length, dim = x.shape
        qkv, _ = layers.modulated_product(
            self.qkv, x, shift, scale, custom_gradients=self.custom_gradients
        )
        qkv = divided_by_rows(qkv).reshape(b, length, 3, self.num_heads, dim // self.num_heads)
        out, state = attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], state)
        return divided_by_rows(self.proj(out.reshape(b, length, dim))), state


class DiTBlock(nnx.Module):
    """Attention and MLP, each modulated and gated by the condition (DiT, figure 3)."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        dim, precision = config.hidden_size, config.precision
        self.mlp_norm_epsilon = config.mlp_norm_epsilon
        self.custom_gradients = cpu_kernels.resolve_custom_gradients(config.custom_gradients)
        options = {"rngs": rngs, "precision": precision, "custom_gradients": self.custom_gradients}
        self.attn = SelfAttention(dim, config.num_heads, **options)
        self.mlp = layers.Mlp(dim, int(dim * config.mlp_ratio), **options)
        self.adaLN_modulation = Linear(
            dim, 6 * dim, rngs=rngs, init=ZEROS, precision=precision, role="modulation"
        )

    def __call__(
        self,
        x: Float[Array, "b l d"],
        condition: Float[Array, "b d"],
        attention: attention_lib.Attention,
        state: Any = None,
    ):
        """`condition` has passed SiLU already. Returns the tokens and the attention state."""
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = jnp.split(
            self.adaLN_modulation(condition), 6, axis=-1
        )
        custom = {"custom_gradients": self.custom_gradients}
        h, state = self.attn(x, shift_msa, scale_msa, attention, state)
        x = layers.gated_residual(x, h, gate_msa, **custom)
        h = self.mlp.modulated(x, shift_mlp, scale_mlp, self.mlp_norm_epsilon)
        return layers.gated_residual(x, h, gate_mlp, **custom), state


class FinalLayer(nnx.Module):
    """Modulated normalisation and the projection back to patches of pixels.

    `config` is a DiT's, or another's that says what is named here.
    """

    def __init__(self, config: Any, *, rngs: nnx.Rngs):
        dim = config.hidden_size
        options = {"rngs": rngs, "init": ZEROS, "precision": config.precision}
        self.custom_gradients = cpu_kernels.resolve_custom_gradients(config.custom_gradients)
        patch_dim = config.patch_size**2 * config.out_channels
        self.adaLN_modulation = Linear(dim, 2 * dim, role="modulation", **options)
        self.linear = Linear(dim, patch_dim, role="output", **options)

    def __call__(
        self,
        x: Float[Array, "b l d"],
        condition: Float[Array, "b d"] | None,
        modulation: Float[Array, "b m"] | None = None,
    ):
        """Returns float32 patches [b, l, patch_size^2 * out_channels].

        `modulation` is what `adaLN_modulation` makes of the condition, if that is known.
        """
        if modulation is None:
            modulation = self.adaLN_modulation(condition)
        shift, scale = jnp.split(modulation, 2, axis=-1)
        custom = {"custom_gradients": self.custom_gradients}
        return layers.modulated_product(self.linear, x, shift, scale, **custom)[0]


class DiT(nnx.Module):
    """A transformer on patches: (noisy image or latent, time, class) -> raw prediction."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        dim, options = config.hidden_size, {"rngs": rngs, "precision": config.precision}
        patch_dim = config.patch_size**2 * config.in_channels
        spacing = config.time_frequency_spacing
        self.config = config
        self.x_embedder = Linear(patch_dim, dim, role="embedding", **options)
        self.t_embedder = layers.TimestepEmbedder(dim, spacing=spacing, **options)
        if config.num_classes:
            self.y_embedder = layers.LabelEmbedder(
                config.num_classes, dim, null_class=config.null_class, **options
            )
        if config.second_time != "none":
            # Its last layer starts at zero: started from a network of one time, it is that network.
            self.r_embedder = layers.TimestepEmbedder(
                dim, spacing=spacing, zero_init=True, **options
            )
        if config.augment_dim:
            self.augment_embedder = Linear(
                config.augment_dim, dim, init=ZEROS, use_bias=False, role="conditioning", **options
            )
        self.blocks = stack.create_stack(
            lambda rngs: DiTBlock(config, rngs=rngs), config.depth, rngs
        )
        self.final_layer = FinalLayer(config, rngs=rngs)

    def __call__(self, request: Request) -> Result:
        """Predicts from the noisy input, of whose rows a strategy may give a part.

        Any height and width go that are multiples of the patch size: positions are those of the
        input's grid.

        Feature maps are the tokens after the blocks of these numbers, [b, rows, columns, width].
        Dropout keys are taken for the sake of networks with dropout; DiT has none. A carry has
        leaves with a leading layer axis.
        """
        config, x = self.config, request.x
        attention = request.attention or attention_lib.LocalAttention(
            config.attention, cpu_kernels.resolve_custom_gradients(config.custom_gradients)
        )
        tokens, own = layers.embed_patches(self.x_embedder, x, config.patch_size, attention)
        condition = self._condition(request.t, request.conditions).astype(tokens.dtype)

        tokens, carry, captured = step_cache.run_stack(
            request,
            self.blocks,
            lambda block, tokens, state, condition: block(tokens, condition, attention, state),
            tokens,
            condition,
            depth=config.depth,
            layer_loop=config.layer_loop,
            remat=config.remat,
            **attention_lib.prefetching(attention),
        )
        patches = self.final_layer(tokens, condition)
        maps = (x.shape[0], *own, config.hidden_size)
        return Result(
            layers.unpatchify(patches, config.patch_size, own),
            tuple(tokens.reshape(maps) for tokens in captured),
            carry,
        )

    def _condition(self, t: Array, conditions: dict[str, Array]) -> Float[Array, "b d"]:
        """What modulates every block: times, class and augmentation, through SiLU."""
        config = self.config
        condition = self.t_embedder(t)
        if config.second_time != "none":
            r = conditions.get("r", t)
            condition = condition + self.r_embedder(r if config.second_time == "r" else t - r)
        if config.num_classes:
            condition = condition + self.y_embedder(conditions["label"])
        if config.augment_dim and "augment" in conditions:
            condition = condition + self.augment_embedder(conditions["augment"])
        return jax.nn.silu(condition)


def flops_per_example(config: DiTConfig) -> float:
    """Floating-point operations of one forward pass of one example, a multiply-add being two.

    2 x (length x weights seen by every token + weights of the conditioning path) + attention's
    4 x length^2 x width a block. The backward pass costs twice as much.
    """
    length, dim = config.grid[0] * config.grid[1], config.hidden_size
    patch = config.patch_size**2
    token_weights = config.depth * dim * dim * (4 + 2 * config.mlp_ratio)
    token_weights += patch * (config.in_channels + config.out_channels) * dim
    condition_weights = dim * dim * (6 * config.depth + 2 + 1) + 256 * dim
    attention = 4 * config.depth * length**2 * dim
    return 2 * (length * token_weights + condition_weights) + attention

"""The U-Nets of EDM: DDPM++ and NCSN++ (`SongUNet`) and ADM (`DhariwalUNet`).

Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (arXiv
2206.00364), after Song et al. (arXiv 2011.13456) and Dhariwal & Nichol (arXiv 2105.05233).
Parameters are named as in the released networks ('enc.32x32_block0.conv0', ...), a second time
(MeanFlow) adds `map_second_time` to them. What is inside a block is in edm_layers.py, which blocks
there are in edm_plan.py.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dit_jax.models import attention as attention_lib
from dit_jax.models import cpu_kernels, edm_layers, edm_plan, layers
from dit_jax.models.call import Request, Result
from dit_jax.models.convolution import Conv
from dit_jax.models.edm_config import DhariwalUNetConfig, SongUNetConfig, UNetConfig
from dit_jax.models.linear import Initialization, Linear, resolve_dtype
from dit_jax.models.spatial import LOCAL

__all__ = ["DhariwalUNet", "DhariwalUNetConfig", "SongUNet", "SongUNetConfig"]


class SecondTime(nnx.Module):
    """What a second time adds to the first layer of the mapping.

    The same as widening that layer's input by features of r (with maps of class and augmentation of
    their own), written as a sum: the layer starts at zero, so that a network started from one that
    knows no r equals it.
    """

    def __init__(self, config: UNetConfig, *, label: bool, fourier: bool, rngs: nnx.Rngs):
        dim, zeros = config.noise_channels, Initialization(scale=0.0)
        options = _conditioning(config, rngs)
        self.noise = edm_layers.FourierFeatures(dim, rngs=rngs) if fourier else None
        self.label = _label_map(config, rngs) if label and config.num_classes else None
        self.augment = (
            Linear(config.augment_dim, dim, use_bias=False, **options)
            if config.augment_dim
            else None
        )
        self.layer0 = Linear(dim, config.emb_channels, init=zeros, use_bias=False, **options)


def _label_map(config: UNetConfig, rngs: nnx.Rngs) -> edm_layers.LabelMap:
    options = {"gain": math.sqrt(config.num_classes), **_conditioning(config, rngs)}
    return edm_layers.LabelMap(config.num_classes, config.noise_channels, **options)


def _conditioning(config: UNetConfig, rngs: nnx.Rngs) -> dict[str, Any]:
    """Options of the layers that depend on time and conditions alone."""
    return {"rngs": rngs, "precision": config.precision, "role": "conditioning"}


class _UNet(nnx.Module):
    """The walk through encoder and decoder; what differs is how the embedding is made."""

    def __init__(self, config: UNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.enc = self._create(config.encoder, rngs)
        self.dec = self._create(config.decoder, rngs)

    def _create(self, plan: tuple[edm_plan.Layer, ...], rngs: nnx.Rngs) -> nnx.Dict:
        modules = {layer.name: edm_plan.create(layer, self.config, rngs) for layer in plan}
        return nnx.Dict({name: module for name, module in modules.items() if module is not None})

    def __call__(self, request: Request) -> Result:
        """Predicts from the noisy input, of whose rows `request.spatial` may give a part.

        Feature maps are the encoder's output at the resolutions of these numbers, [b, h', w', c'].
        The carry is a tuple of a state for each attention layer.

        Raises:
            ValueError: features this network does not have.
        """
        config, spatial = self.config, request.spatial or LOCAL
        count, wanted = len(config.channel_mult), list(request.features)
        if wanted != sorted(set(wanted)) or not all(0 <= i < count for i in wanted):
            raise ValueError(f"features {wanted}: expected ascending numbers of 0 to {count - 1}")
        attention = (
            request.attention
            or spatial.attention
            or attention_lib.LocalAttention(
                config.attention, cpu_kernels.resolve_custom_gradients(config.custom_gradients)
            )
        )
        emb = self._embedding(request.t, request.conditions)
        walk = _Walk(config, emb, request.dropout_keys, attention, spatial)
        walk.states = None if request.carry is None else list(request.carry)
        maps, skips = self._encode(request.x.astype(resolve_dtype(config.dtype)), walk)
        out = self._decode(skips, walk).astype(jnp.float32)
        carry = None if request.carry is None else tuple(walk.new_states)
        return Result(out, tuple(maps[i] for i in wanted), carry)

    def _embedding(self, t: Array, conditions: dict[str, Array]) -> Float[Array, "b e"]:
        raise NotImplementedError

    def _second_time(self, t: Array, conditions: dict[str, Array]) -> Float[Array, " b"]:
        r = conditions.get("r", t)
        return r if self.config.second_time == "r" else t - r

    def _encode(self, x: Array, walk: "_Walk") -> tuple[list[Array], list[Array]]:
        """Feature maps, and what the decoder takes up again (the last being its input)."""
        maps: list[Array] = []
        skips: list[Array] = []
        aux = x
        for layer in self.config.encoder:
            module = self.enc.get(layer.name)
            if layer.kind == "aux_down":
                aux = edm_layers.downsample(aux, self.config.resample_filter, spatial=walk.spatial)
            elif layer.kind == "aux_skip":
                x = skips[-1] = x + module(aux)
            elif layer.kind == "aux_residual":
                taps = self.config.resample_filter
                wide = module(aux, walk.spatial, padding=1 + (len(taps) - 1) // 2)
                aux = (x + edm_layers.downsample(wide, taps, padding=0)) * math.sqrt(0.5)
                x = skips[-1] = aux
            else:
                x = module(x, walk.spatial) if layer.kind == "conv" else walk.block(module, x)
                skips.append(x)
            if layer.is_feature:
                maps.append(x)
        return maps, skips

    def _decode(self, skips: list[Array], walk: "_Walk") -> Array:
        x, aux, normalised = skips[-1], None, None
        for layer in self.config.decoder:
            module = self.dec.get(layer.name)
            if layer.kind == "aux_up":
                aux = edm_layers.upsample(aux, self.config.resample_filter, spatial=walk.spatial)
            elif layer.kind == "aux_norm":
                normalised = module(x, spatial=walk.spatial)
            elif layer.kind == "aux_conv":
                out = module(jax.nn.silu(normalised), walk.spatial)
                aux = out if aux is None else out + aux
            else:
                if layer.concatenates:
                    x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = walk.block(module, x)
        return x if aux is None else aux


class _Walk:
    """Runs blocks one after the other: what they share, and what is counted along the way."""

    def __init__(self, config, emb, dropout_keys, attention, spatial):
        self.config, self.emb, self.attention = config, emb, attention
        self.spatial = spatial
        self.dropout_keys = dropout_keys if config.dropout else None
        self.states, self.new_states, self.blocks = None, [], 0

    def block(self, block: edm_layers.UNetBlock, x: Array) -> Array:
        """The block's output."""
        keys = None
        if self.dropout_keys is not None:
            number = self.blocks
            keys = jax.vmap(lambda key: jax.random.fold_in(key, number))(self.dropout_keys)
        state = self.states.pop(0) if self.states is not None and block.num_heads else None
        graph, params = nnx.split(block)

        def run(params, x, emb, state, keys):
            return nnx.merge(graph, params)(x, emb, self.attention, state, keys, self.spatial)

        run = edm_layers.rematerialised(run, self.config.remat)
        x, state = run(params, x, self.emb, state, keys)
        self.blocks += 1
        if block.num_heads:
            self.new_states.append(state)
        return x


class SongUNet(_UNet):
    """DDPM++ and NCSN++: (noisy image, c_noise, conditions) -> raw prediction."""

    def __init__(self, config: SongUNetConfig, *, rngs: nnx.Rngs):
        dim, fourier = config.noise_channels, config.embedding_type == "fourier"
        options = _conditioning(config, rngs)
        self.map_noise = edm_layers.FourierFeatures(dim, rngs=rngs) if fourier else None
        self.map_label = _label_map(config, rngs) if config.num_classes else None
        self.map_augment = (
            Linear(config.augment_dim, dim, use_bias=False, **options)
            if config.augment_dim
            else None
        )
        self.map_layer0 = Linear(dim, config.emb_channels, **options)
        self.map_layer1 = Linear(config.emb_channels, config.emb_channels, **options)
        self.map_second_time = (
            SecondTime(config, label=True, fourier=fourier, rngs=rngs)
            if config.second_time != "none"
            else None
        )
        super().__init__(config, rngs=rngs)

    def _features(self, t: Array, noise: edm_layers.FourierFeatures | None) -> Array:
        if noise is not None:
            features = noise(t)
        else:
            features = layers.timestep_frequencies(
                t, self.config.noise_channels, spacing="diffusers"
            )
        return jnp.roll(features, features.shape[-1] // 2, axis=-1)  # sines first

    def _embedding(self, t: Array, conditions: dict[str, Array]) -> Float[Array, "b e"]:
        emb = self.map_layer0(
            _conditioned(
                self._features(t, self.map_noise), self.map_label, self.map_augment, conditions
            )
        )
        if self.map_second_time is not None:
            second = self.map_second_time
            r = self._features(self._second_time(t, conditions), second.noise)
            emb = emb + second.layer0(_conditioned(r, second.label, second.augment, conditions))
        return jax.nn.silu(self.map_layer1(jax.nn.silu(emb)))


def _conditioned(features, label_map, augment_map, conditions: dict[str, Array]) -> Array:
    """Features of time plus those of class and augmentation, where the network knows them."""
    if label_map is not None:
        features = features + label_map(conditions["label"])
    if augment_map is not None and "augment" in conditions:
        features = features + augment_map(conditions["augment"])
    return features


class DhariwalUNet(_UNet):
    """ADM: (noisy image, c_noise, conditions) -> raw prediction."""

    def __init__(self, config: DhariwalUNetConfig, *, rngs: nnx.Rngs):
        dim, style = config.model_channels, config.style
        options = _conditioning(config, rngs)
        self.map_augment = (
            Linear(config.augment_dim, dim, init=style.init_zero, use_bias=False, **options)
            if config.augment_dim
            else None
        )
        self.map_layer0 = Linear(dim, config.emb_channels, init=style.init, **options)
        self.map_layer1 = Linear(
            config.emb_channels, config.emb_channels, init=style.init, **options
        )
        normal = {"init": Initialization(mode="normal"), "use_bias": False, **options}
        self.map_label = (
            edm_layers.LabelMap(config.num_classes, config.emb_channels, **normal)
            if config.num_classes
            else None
        )
        self.map_second_time = (
            SecondTime(config, label=False, fourier=False, rngs=rngs)
            if config.second_time != "none"
            else None
        )
        super().__init__(config, rngs=rngs)
        width = config.decoder[-1].out_channels
        self.out_norm = edm_layers.GroupNorm(width, style.epsilon)
        options = {"rngs": rngs, "precision": config.precision, "role": "output"}
        self.out_conv = Conv(width, config.out_channels, init=style.init_zero, **options)

    def _embedding(self, t: Array, conditions: dict[str, Array]) -> Float[Array, "b e"]:
        dim = self.config.model_channels
        emb = self.map_layer0(
            _conditioned(layers.timestep_frequencies(t, dim), None, self.map_augment, conditions)
        )
        if self.map_second_time is not None:
            second = self.map_second_time
            r = layers.timestep_frequencies(self._second_time(t, conditions), dim)
            emb = emb + second.layer0(_conditioned(r, None, second.augment, conditions))
        emb = self.map_layer1(jax.nn.silu(emb))
        return jax.nn.silu(_conditioned(emb, self.map_label, None, conditions))

    def _decode(self, skips: list[Array], walk: _Walk) -> Array:
        x = self.out_norm(super()._decode(skips, walk), spatial=walk.spatial)
        return self.out_conv(jax.nn.silu(x), walk.spatial)

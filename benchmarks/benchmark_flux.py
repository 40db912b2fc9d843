"""One evaluation of a FLUX transformer: this project's against diffusers', which runs eagerly.

2 blocks of two streams and 4 of one, 8 heads of 128 channels, 64 x 64 latents (1,024 tokens) and
128 tokens of text: FLUX.1's layers in a width and number that a CPU finishes.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import benchmark_parameters
import turns
from dit_jax.models import FluxConfig, Network, Request

SIDE, TEXT = 64, 128
CONFIG = FluxConfig(
    image_size=SIDE,
    in_channels=16,
    hidden_size=1024,
    depth=2,
    single_depth=4,
    num_heads=8,
    text_dim=512,
    pooled_dim=256,
    text_length=TEXT,
    guidance_embedding=True,
    layer_loop="unroll",
)


def inputs(batch_size: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Latents [b, h, w, 16] and conditions, the same for both sides."""
    random = np.random.default_rng(0)

    def draw(*shape):
        return random.standard_normal((batch_size, *shape), np.float32)

    told = {"text": draw(TEXT, CONFIG.text_dim), "pooled": draw(CONFIG.pooled_dim)}
    told["guidance"] = np.full(batch_size, 3.5, np.float32)
    return draw(SIDE, SIDE, CONFIG.in_channels), told


def jax_forward(batch_size: int) -> tuple[Callable[[], Any], dict[str, Any]]:
    """A function that evaluates the network once to its end, and facts about it."""
    network = Network(CONFIG)
    params = benchmark_parameters.random(network)
    x, told = jax.device_put(inputs(batch_size))
    t = jax.numpy.full(batch_size, 500.0)
    started = time.perf_counter()
    evaluate = jax.jit(lambda params, x, t, told: network.apply(params, Request(x, t, told)).out)
    compiled = evaluate.lower(params, x, t, told).compile()
    facts = {
        "compile_seconds": time.perf_counter() - started,
        "flops": network.flops_per_example * batch_size,
    }
    return lambda: jax.block_until_ready(compiled(params, x, t, told)), facts


def torch_forward(batch_size: int) -> tuple[Callable[[], Any], dict[str, Any]]:
    """The same of diffusers' `FluxTransformer2DModel`."""
    import torch

    from tests.references import diffusers_flux

    device = turns.torch_device()
    model = diffusers_flux.create_model(CONFIG).eval().to(device)
    x, told = inputs(batch_size)
    patches = x.reshape(batch_size, SIDE // 2, 2, SIDE // 2, 2, -1).transpose(0, 1, 3, 5, 2, 4)
    rows, columns = np.indices((SIDE // 2, SIDE // 2)).reshape(2, -1)
    call = {
        "hidden_states": torch.tensor(patches.reshape(batch_size, rows.size, -1)),
        "encoder_hidden_states": torch.tensor(told["text"]),
        "pooled_projections": torch.tensor(told["pooled"]),
        "guidance": torch.tensor(told["guidance"]),
        "timestep": torch.full((batch_size,), 0.5),
        "img_ids": torch.tensor(np.stack([0 * rows, rows, columns], axis=1), dtype=torch.float32),
        "txt_ids": torch.zeros(TEXT, 3),
    }
    call = {name: tensor.to(device) for name, tensor in call.items()}

    def run() -> None:
        with torch.no_grad():
            model(**call)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run, {"compile_seconds": 0.0}

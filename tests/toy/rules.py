"""Where the toy network's parameters live, and how one image of it is split."""

from dit_jax.parallel.network import register_image_network
from dit_jax.parallel.partitioning import BOTH, COLUMNS, ROWS, VECTOR, Rule, register_rules
from dit_jax.parallel.transformer import ParallelTransformer
from tests.toy.network import ToyConfig

RULES = (
    Rule(r"blocks/(qkv|mlp/fc1)/kernel", COLUMNS),
    Rule(r"blocks/(proj|mlp/fc2)/kernel", ROWS),
    Rule(r"(x|text)_embedder/kernel", (None, BOTH)),
    Rule(r"t_embedder/fc1/kernel", COLUMNS),
    Rule(r"t_embedder/fc2/kernel", ROWS),
    Rule(r"out/kernel", (BOTH, None)),
    Rule(r".*bias", VECTOR),
)


def register() -> None:
    register_rules("toy", RULES)
    register_image_network(ToyConfig, ParallelTransformer)

"""The toy network's parameters in a state dict of other names."""

from dit_jax.interop.kinds import register_state_dict
from dit_jax.interop.table import Table, affine
from dit_jax.interop.transforms import linear
from tests.toy.network import ToyConfig

NAMES = {
    "x_embedder": "patches",
    "text_embedder": "words",
    "t_embedder.fc1": "time.0",
    "t_embedder.fc2": "time.1",
    "blocks.qkv": tuple(f"layers.{{layer}}.{part}" for part in ("query", "key", "value")),
    "blocks.proj": "layers.{layer}.joined",
    "blocks.mlp.fc1": "layers.{layer}.wide",
    "blocks.mlp.fc2": "layers.{layer}.narrow",
    "out": "pixels",
}


def table(config: ToyConfig) -> Table:
    rows = [row for ours, theirs in NAMES.items() for row in affine(ours, theirs, linear())]
    return Table("a toy", tuple(rows))


def network(file) -> ToyConfig:
    hidden_size, text_dim = file.specs["words.weight"].shape
    return ToyConfig(hidden_size=hidden_size, text_dim=text_dim)


def register() -> None:
    sections = {"process": {"name": "flow"}, "sampling": {"solver": "euler"}}
    register_state_dict("toy_pt", ToyConfig, table, network, sections)

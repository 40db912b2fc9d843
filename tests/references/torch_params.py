"""A PyTorch DiT's state dict as our parameters (the reference's, not every checkpoint's)."""

import jax
import numpy as np

from dit_jax.models import DiTConfig

LINEAR = {
    "t_embedder.fc1": "t_embedder.mlp.0",
    "t_embedder.fc2": "t_embedder.mlp.2",
    "final_layer.linear": "final_layer.linear",
    "final_layer.adaLN_modulation": "final_layer.adaLN_modulation.1",
}
BLOCK = {
    "attn.qkv": "attn.qkv",
    "attn.proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "adaLN_modulation": "adaLN_modulation.1",
}


def from_torch(state_dict, config: DiTConfig) -> dict:
    """Our nested parameters with a DiT state dict's values."""
    values = {name: np.array(tensor.detach()) for name, tensor in state_dict.items()}

    def linear(name):
        return {"kernel": values[f"{name}.weight"].T, "bias": values[f"{name}.bias"]}

    params: dict = {}
    for ours, theirs in LINEAR.items():
        _put(params, ours, linear(theirs))
    layers = [f"blocks.{layer}." for layer in range(config.depth)]
    for ours, theirs in BLOCK.items():
        stacked = jax.tree.map(
            lambda *a: np.stack(a), *(linear(layer + theirs) for layer in layers)
        )
        _put(params, f"blocks.{ours}", stacked)
    # A convolution's kernel [out, channel, row, column]; our patches are (row, column, channel).
    kernel = values["x_embedder.proj.weight"].transpose(2, 3, 1, 0)
    params["x_embedder"] = {
        "kernel": kernel.reshape(-1, config.hidden_size),
        "bias": values["x_embedder.proj.bias"],
    }
    if config.num_classes:
        params["y_embedder"] = {"embedding": values["y_embedder.embedding_table.weight"]}
    return params


def _put(tree: dict, path: str, value) -> None:
    *parents, leaf = path.split(".")
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[leaf] = value

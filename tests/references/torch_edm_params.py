"""Parameters of EDM's PyTorch networks, by their released names, as ours."""

import numpy as np

NORMS = ("norm0", "norm1", "norm2", "out_norm", "aux_norm")
WIDENED = ("map_layer0.weight", "map_label.weight", "map_label.bias", "map_augment.weight")


def from_torch(state_dict, *, noise_channels: int | None = None) -> dict:
    """Our nested parameters with a state dict's values.

    With `noise_channels` the network has FastGen's second time, whose features are concatenated to
    those of the first: the rows and columns beyond that width are `map_second_time`'s.
    """
    params: dict = {}
    for name, tensor in state_dict.items():
        value = np.array(tensor.detach(), np.float32)
        module, _, leaf = name.rpartition(".")
        if leaf == "resample_filter" or module == "logvar_linear":
            continue
        if name == "r_timestep.freqs":
            _put(params, "map_second_time.noise.freqs", value)
            continue
        path = f"{module}.{_leaf(module, leaf)}"
        value = _ours(value)
        axis = 0 if module == "map_layer0" else -1
        if noise_channels and name in WIDENED and value.shape[axis] == 2 * noise_channels:
            value, second = np.split(value, 2, axis=axis)
            _put(params, "map_second_time." + path.removeprefix("map_"), second)
        _put(params, path, value)
    return params


def _leaf(module: str, leaf: str) -> str:
    if leaf != "weight":
        return leaf
    return "scale" if module.endswith(NORMS) else "kernel"


def _ours(value: np.ndarray) -> np.ndarray:
    if value.ndim == 4:  # [out, in, rows, columns]
        value = value.transpose(2, 3, 1, 0)
        return value[0, 0] if value.shape[:2] == (1, 1) else value
    return value.T


def _put(tree: dict, path: str, value) -> None:
    *parents, leaf = path.split(".")
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[leaf] = value

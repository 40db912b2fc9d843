"""Network pickles in NVlabs' layout, made without NVlabs' code.

A class decorated by their `torch_utils.persistence` pickles as a call of one function with a
dictionary: the source code of its module, its name and its attributes. Here a stand-in of that
function is named while pickling; the source code would leave a trace if anything executed it.
"""

import contextlib
import pickle
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import torch

TRACE = "executed"
SOURCE = f"open({TRACE!r}, 'w').close()\n"


def _reconstruct_persistent_obj(meta):
    """What NVlabs' function of this name does first."""
    exec(meta["module_src"], {})
    raise AssertionError("the source code in a pickle was executed")


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


class Persistent:
    """Pickles as an instance of a persistent class."""

    def __init__(self, class_name, **state):
        self.meta = {
            "type": "class",
            "version": 6,
            "module_src": SOURCE,
            "class_name": class_name,
            "state": state,
        }

    def __reduce__(self):
        return (_reconstruct_persistent_obj, (self.meta,))


class EasyDict(dict):
    """Their dictionary with attributes."""


EasyDict.__module__ = "dnnlib.util"


@contextlib.contextmanager
def named_modules():
    """While pickling, pickle looks the names up."""
    persistence = types.ModuleType("torch_utils.persistence")
    persistence._reconstruct_persistent_obj = _reconstruct_persistent_obj
    util = types.ModuleType("dnnlib.util")
    util.EasyDict = EasyDict
    added = {
        "torch_utils": types.ModuleType("torch_utils"),
        "torch_utils.persistence": persistence,
        "dnnlib": types.ModuleType("dnnlib"),
        "dnnlib.util": util,
    }
    sys.modules.update(added)
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]


def dump(path: Path, content, protocol: int = pickle.DEFAULT_PROTOCOL) -> Path:
    """Write the pickle."""
    with named_modules():
        path.write_bytes(pickle.dumps(content, protocol))
    return path


def random_tensors(shapes, resample_filter=(1, 1)) -> dict[str, np.ndarray]:
    """Every tensor random, the same for the same name and shape; filters as they have to be."""
    tensors = {}
    for name, shape in shapes.items():
        generator = np.random.default_rng(zlib.crc32(name.encode()))
        values = generator.normal(size=shape)
        if name.endswith("resample_filter"):
            taps = np.asarray(resample_filter)
            values = np.outer(taps, taps)[None, None] / taps.sum() ** 2
        elif len(shape) > 1:
            values /= np.sqrt(np.prod(shape[1:]))
        elif "norm" in name and name.endswith("weight"):
            values = 1 + 0.1 * values
        elif not name.endswith("freqs"):
            values *= 0.1
        tensors[name] = values.astype(np.float32)
    return tensors


def module_state(**attributes):
    """Attributes that every torch module has."""
    state = {
        "training": False,
        "_parameters": {},
        "_buffers": {},
        "_non_persistent_buffers_set": set(),
        "_backward_hooks": torch.nn.Module()._backward_hooks,
        "_modules": {},
    }
    return state | attributes


def network(tensors, arguments, class_name="EDMPrecond"):
    """The tree of modules that holds the tensors under their dotted names."""
    root = Persistent(class_name, **module_state(_init_args=(), _init_kwargs=arguments))
    modules = {"": (root, root.meta["state"])}
    for name, values in tensors.items():
        *parents, leaf = name.split(".")
        for depth in range(1, len(parents) + 1):
            path = ".".join(parents[:depth])
            if path not in modules:
                modules[path] = _module(path, arguments)
                above = modules[".".join(parents[: depth - 1])][1]
                above["_modules"][parents[depth - 1]] = modules[path][0]
        state = modules[".".join(parents)][1]
        tensor = torch.from_numpy(values)
        if leaf in ("resample_filter", "freqs"):
            state["_buffers"][leaf] = tensor
        else:
            state["_parameters"][leaf] = torch.nn.Parameter(tensor, requires_grad=False)
    return root


def _module(path, arguments):
    if path in ("model.enc", "model.dec"):
        container = torch.nn.ModuleDict()
        return container, container.__dict__
    class_name = arguments.get("model_type", "DhariwalUNet") if path == "model" else "Layer"
    # As initial scales are: NumPy's numbers among the settings.
    kwargs = {"init_weight": np.sqrt(1 / 3), "init_mode": "xavier_uniform"}
    state = module_state(_init_args=(), _init_kwargs=kwargs, skip_scale=np.sqrt(0.5), bias=None)
    module = Persistent(class_name, **state)
    return module, module.meta["state"]


def snapshot(tensors, arguments, **entries):
    """What the training loop pickles."""
    return {
        "ema": network(tensors, arguments),
        "loss_fn": Persistent("EDMLoss", P_mean=-1.2, P_std=1.2, sigma_data=0.5),
        "augment_pipe": Persistent("AugmentPipe", p=0.12, xflip=1e8),
        "dataset_kwargs": EasyDict(path="data.zip", resolution=8, use_labels=True),
    } | entries

"""Runs NVlabs' own code (a checkout of NVlabs/edm), in a process of its own.

    python -m tests.interop.edm_originals make CHECKOUT FOLDER
    python -m tests.interop.edm_originals load CHECKOUT STATE_DICT CASE

`make` writes for every case CASE.pkl as the training loop does, CASE.pt (the state dict), and
originals.npz: names and shapes of the tensors, inputs and outputs. (That file is also kept in
tests/references/data, as edm_originals.npz.) `load` loads a state dict into a fresh network and
prints the largest absolute difference of its outputs from those of `make`.
"""

import copy
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import torch

from tests.interop.edm_pickles import random_tensors

SONG = {
    "model_type": "SongUNet",
    "model_channels": 16,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
    "dropout": 0.13,
    "use_fp16": False,
    "img_resolution": 8,
    "img_channels": 3,
}
CASES = {
    "ddpmpp": {
        **SONG,
        "embedding_type": "positional",
        "encoder_type": "standard",
        "decoder_type": "standard",
        "channel_mult_noise": 1,
        "resample_filter": [1, 1],
        "augment_dim": 9,
        "label_dim": 4,
    },
    "ncsnpp": {
        **SONG,
        "embedding_type": "fourier",
        "encoder_type": "residual",
        "decoder_type": "standard",
        "channel_mult_noise": 2,
        "resample_filter": [1, 3, 3, 1],
        "label_dim": 0,
    },
    "skip": {
        **SONG,
        "channel_mult": [2, 1, 1],
        "channel_mult_emb": 2,
        "num_blocks": 2,
        "attn_resolutions": [8, 2],
        "encoder_type": "skip",
        "decoder_type": "skip",
        "resample_filter": [1, 3, 3, 1],
        "img_channels": 1,
        "label_dim": 3,
    },
    "adm": {
        "model_type": "DhariwalUNet",
        "model_channels": 32,
        "channel_mult": [1, 4],
        "num_blocks": 1,
        "attn_resolutions": [4],
        "img_resolution": 8,
        "img_channels": 3,
        "label_dim": 4,
        "sigma_data": 0.4,
    },
}
SIGMAS = (0.02, 0.7, 30.0)
DATA = Path(__file__).parents[1] / "references" / "data" / "edm_originals.npz"


def inputs(arguments):
    """Noisy images [b, h, w, c] of unit scale, and a class each (the last one: none)."""
    size, channels = arguments["img_resolution"], arguments["img_channels"]
    x = np.random.default_rng(1).normal(size=(2, size, size, channels)).astype(np.float32)
    return x, np.array([1, arguments["label_dim"]], np.int32)


def outputs(net, arguments):
    """The denoised images at each noise level."""
    x, labels = inputs(arguments)
    one_hot = torch.eye(max(arguments["label_dim"], 1) + 1)[labels, :-1]
    with torch.no_grad():
        denoised = [
            net(torch.from_numpy(x).permute(0, 3, 1, 2) * sigma, torch.full((2,), sigma), one_hot)
            for sigma in SIGMAS
        ]
    return torch.stack(denoised).permute(0, 1, 3, 4, 2).numpy()


def randomised(net, arguments):
    """The network with random weights, as the training loop snapshots it."""
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    tensors = random_tensors(shapes, arguments.get("resample_filter", (1, 1)))
    net.load_state_dict({name: torch.from_numpy(value) for name, value in tensors.items()})
    return copy.deepcopy(net).eval().requires_grad_(False).cpu(), shapes


def construct(checkout, arguments):
    sys.path.insert(0, checkout)
    import dnnlib

    name = "training.networks.EDMPrecond"
    return dnnlib.util.construct_class_by_name(class_name=name, **arguments)


def make(checkout, folder):
    arrays = {}
    for case, arguments in CASES.items():
        ema, shapes = randomised(construct(checkout, arguments), arguments)
        import dnnlib

        parts = {
            "loss_fn": {"class_name": "training.loss.EDMLoss"},
            "augment_pipe": {"class_name": "training.augment.AugmentPipe", "p": 0.12, "xflip": 1},
        }
        parts = {k: dnnlib.util.construct_class_by_name(**v) for k, v in parts.items()}
        data = {"ema": ema, **parts, "dataset_kwargs": {"path": "data.zip"}}
        with open(f"{folder}/{case}.pkl", "wb") as file:
            pickle.dump(data, file)
        torch.save(ema.state_dict(), f"{folder}/{case}.pt")
        arrays[f"{case}_shapes"] = np.array(json.dumps(shapes, separators=(",", ":")))
        arrays[f"{case}_denoised"] = outputs(ema, arguments)
    np.savez_compressed(f"{folder}/originals.npz", **arrays)


def load(checkout, state_dict, case):
    net = construct(checkout, CASES[case]).eval()
    net.load_state_dict(torch.load(state_dict, weights_only=True))
    expected = np.load(DATA)[f"{case}_denoised"]
    print(np.abs(outputs(net, CASES[case]) - expected).max())


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"make": make, "load": load}[sys.argv[1]](*sys.argv[2:])

"""The student's update of DMD2 as NVlabs/FastGen makes it, from a checkout of its repository.

Its own network, discriminator, method and losses, without its trainer: the update is what lies
between two batches, gradients, AdamW and one moving average. FastGen imports packages for video,
logging and configuration that such an update does not use; those that are not installed are
replaced by placeholders.
"""

import copy
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np

# fmt: off
OPTIONAL = (
    "av", "boto3", "botocore", "cv2", "decord", "diffusers", "easydict", "einops", "ftfy",
    "hydra", "imageio", "iopath", "loguru", "nvidia_smi", "omegaconf", "open_clip", "peft",
    "psutil", "pynvml", "requests", "s3fs", "torchvision", "transformers", "wandb",
    "webdataset",
)
# fmt: on
# FastGen's network of CIFAR-10 (EDM's DDPM++) and its discriminator.
NETWORK = {
    "img_resolution": 32,
    "img_channels": 3,
    "label_dim": 10,
    "model_type": "SongUNet",
    "augment_dim": 9,
    "model_channels": 128,
    "channel_mult": [2, 2, 2],
    "embedding_type": "positional",
    "encoder_type": "standard",
    "decoder_type": "standard",
    "resample_filter": [1, 1],
    "dropout": 0.0,
}
FEATURES, GAN_WEIGHT, EMA_DECAY = (0, 1, 2), 1e-3, 0.9999


class _Placeholders(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds packages that are not there."""

    def __init__(self):
        self._missing = {name for name in OPTIONAL if importlib.util.find_spec(name) is None}

    def find_spec(self, name, path, target=None):
        """A placeholder's place, for a missing package or a part of one."""
        if name.split(".")[0] in self._missing:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        """Something that has every attribute."""
        module = mock.MagicMock(name=spec.name)
        module.__path__, module.__name__, module.__spec__ = [], spec.name, spec
        return module

    def exec_module(self, module):
        """Nothing."""


def require_checkout(checkout: Path) -> None:
    """Raises a FileNotFoundError where there is no checkout of FastGen."""
    if not (Path(checkout) / "fastgen" / "methods").is_dir():
        raise FileNotFoundError(
            f"{checkout} is no checkout of FastGen: git clone https://github.com/NVlabs/FastGen"
        )


def make_importable(checkout: Path) -> None:
    """Lets `import fastgen` find a checkout, and placeholders for what it imports and lacks.

    Raises:
        FileNotFoundError: it is no checkout of FastGen.
    """
    require_checkout(checkout)
    sys.meta_path.append(_Placeholders())
    sys.path.append(str(checkout))


def student_step(checkout: Path, batch_size: int, device: str = "cpu") -> Callable[[], None]:
    """A function that makes one update of the student, of random weights, data and noise.

    Args:
        checkout: the repository's directory.
        batch_size: images.
        device: as PyTorch names it.

    Raises:
        FileNotFoundError: it is no checkout of FastGen.
    """
    make_importable(checkout)
    import torch
    from fastgen.methods import DMD2Model
    from fastgen.networks.discriminators import Discriminator_EDM
    from fastgen.networks.EDM.network import EDMPrecond

    torch.manual_seed(0)
    net = EDMPrecond(**NETWORK).to(device).train()
    teacher, fake_score, average = (copy.deepcopy(net).eval() for _ in range(3))
    discriminator = Discriminator_EDM(set(FEATURES), [32, 16, 8], 256).to(device).eval()
    for module in (teacher, fake_score, average, discriminator):
        module.requires_grad_(False)

    model = DMD2Model.__new__(DMD2Model)
    torch.nn.Module.__init__(model)
    model.net, model.teacher = net, teacher
    model.fake_score, model.discriminator = fake_score, discriminator
    model.config = types.SimpleNamespace(
        gan_loss_weight_gen=GAN_WEIGHT,
        guidance_scale=None,
        student_sample_steps=1,
        skip_layers=None,
    )
    scheduler = net.noise_scheduler
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, weight_decay=0.0)
    random = np.random.default_rng(0)
    real = torch.tensor(random.standard_normal((batch_size, 3, 32, 32), np.float32), device=device)
    label = torch.tensor(random.integers(0, 10, batch_size), device=device)
    condition = torch.nn.functional.one_hot(label, 10).float()

    def step() -> None:
        noise, eps = torch.randn_like(real), torch.randn_like(real)
        precision = scheduler.t_precision
        t_student = torch.full((batch_size,), scheduler.max_t, device=device, dtype=precision)
        t = torch.exp(1.2 * torch.randn(batch_size, device=device, dtype=precision) - 1.2)
        losses, _ = model._student_update_step(
            scheduler.latents(noise=noise), t_student, t, eps, {"real": real}, condition
        )
        optimizer.zero_grad(set_to_none=True)
        losses["total_loss"].backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(
                list(average.parameters()), list(net.parameters()), 1.0 - EMA_DECAY
            )

    return step

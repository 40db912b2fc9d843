"""A compact PyTorch Inception-V3 of the graph of 2015-12-05, and weights to share with it.

Its state dict has the names, shapes and counters of the standard weights file. It is written as
tables of layers and wiring, unlike ours, so that one misreading is less likely to be in both.
"""

import torch
from torch import nn
from torch.nn import functional

# name: (inputs, outputs, (rows, columns), stride, padding)
STEM = {
    "Conv2d_1a_3x3": (3, 32, (3, 3), 2, 0),
    "Conv2d_2a_3x3": (32, 32, (3, 3), 1, 0),
    "Conv2d_2b_3x3": (32, 64, (3, 3), 1, 1),
    "Conv2d_3b_1x1": (64, 80, (1, 1), 1, 0),
    "Conv2d_4a_3x3": (80, 192, (3, 3), 1, 0),
}
# Kind of a block -> its branches: a list of convolutions one after the other; a tuple in it forks.
WIRING = {
    "A": [
        ["branch1x1"],
        ["branch5x5_1", "branch5x5_2"],
        ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"],
        ["average", "branch_pool"],
    ],
    "B": [["branch3x3"], ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"], ["max/2"]],
    "C": [
        ["branch1x1"],
        ["branch7x7_1", "branch7x7_2", "branch7x7_3"],
        [f"branch7x7dbl_{i}" for i in range(1, 6)],
        ["average", "branch_pool"],
    ],
    "D": [
        ["branch3x3_1", "branch3x3_2"],
        [f"branch7x7x3_{i}" for i in range(1, 5)],
        ["max/2"],
    ],
    "E": [
        ["branch1x1"],
        ["branch3x3_1", ("branch3x3_2a", "branch3x3_2b")],
        ["branch3x3dbl_1", "branch3x3dbl_2", ("branch3x3dbl_3a", "branch3x3dbl_3b")],
        ["POOL", "branch_pool"],
    ],
}
POOLS = {
    "average": lambda x: functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    "max": lambda x: functional.max_pool2d(x, 3, 1, 1),
    "max/2": lambda x: functional.max_pool2d(x, 3, 2),
}
# (name, kind, inputs, the number that tells blocks of one kind apart)
BLOCKS = [
    ("Mixed_5b", "A", 192, 32),
    ("Mixed_5c", "A", 256, 64),
    ("Mixed_5d", "A", 288, 64),
    ("Mixed_6a", "B", 288, None),
    ("Mixed_6b", "C", 768, 128),
    ("Mixed_6c", "C", 768, 160),
    ("Mixed_6d", "C", 768, 160),
    ("Mixed_6e", "C", 768, 192),
    ("Mixed_7a", "D", 768, None),
    ("Mixed_7b", "E", 1280, "average"),
    ("Mixed_7c", "E", 2048, "max"),
]


def _same(inputs, outputs, rows=1, columns=1):
    return inputs, outputs, (rows, columns), 1, (rows // 2, columns // 2)


def _down(inputs, outputs):
    return inputs, outputs, (3, 3), 2, 0


def block_layers(kind, n, special):
    """Names and settings of a block's convolutions, for n input channels."""
    if kind == "A":
        return {
            "branch1x1": _same(n, 64),
            "branch5x5_1": _same(n, 48),
            "branch5x5_2": _same(48, 64, 5, 5),
            "branch3x3dbl_1": _same(n, 64),
            "branch3x3dbl_2": _same(64, 96, 3, 3),
            "branch3x3dbl_3": _same(96, 96, 3, 3),
            "branch_pool": _same(n, special),
        }
    if kind == "B":
        return {
            "branch3x3": _down(n, 384),
            "branch3x3dbl_1": _same(n, 64),
            "branch3x3dbl_2": _same(64, 96, 3, 3),
            "branch3x3dbl_3": _down(96, 96),
        }
    if kind == "C":
        return {
            "branch1x1": _same(n, 192),
            "branch7x7_1": _same(n, special),
            "branch7x7_2": _same(special, special, 1, 7),
            "branch7x7_3": _same(special, 192, 7, 1),
            "branch7x7dbl_1": _same(n, special),
            "branch7x7dbl_2": _same(special, special, 7, 1),
            "branch7x7dbl_3": _same(special, special, 1, 7),
            "branch7x7dbl_4": _same(special, special, 7, 1),
            "branch7x7dbl_5": _same(special, 192, 1, 7),
            "branch_pool": _same(n, 192),
        }
    if kind == "D":
        return {
            "branch3x3_1": _same(n, 192),
            "branch3x3_2": _down(192, 320),
            "branch7x7x3_1": _same(n, 192),
            "branch7x7x3_2": _same(192, 192, 1, 7),
            "branch7x7x3_3": _same(192, 192, 7, 1),
            "branch7x7x3_4": _down(192, 192),
        }
    return {
        "branch1x1": _same(n, 320),
        "branch3x3_1": _same(n, 384),
        "branch3x3_2a": _same(384, 384, 1, 3),
        "branch3x3_2b": _same(384, 384, 3, 1),
        "branch3x3dbl_1": _same(n, 448),
        "branch3x3dbl_2": _same(448, 384, 3, 3),
        "branch3x3dbl_3a": _same(384, 384, 1, 3),
        "branch3x3dbl_3b": _same(384, 384, 3, 1),
        "branch_pool": _same(n, 192),
    }


class Layer(nn.Module):
    def __init__(self, inputs, outputs, size, stride, padding):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x):
        return torch.relu(self.bn(self.conv(x)))


class Block(nn.Module):
    def __init__(self, kind, inputs, special):
        super().__init__()
        self.wiring, self.pool = WIRING[kind], special
        for name, settings in block_layers(kind, inputs, special).items():
            self.add_module(name, Layer(*settings))

    def forward(self, x):
        return torch.cat([y for branch in self.wiring for y in self._run(branch, x)], dim=1)

    def _run(self, branch, x):
        for step in branch:
            if isinstance(step, tuple):
                return [getattr(self, name)(x) for name in step]
            step = self.pool if step == "POOL" else step
            x = POOLS[step](x) if step in POOLS else getattr(self, step)(x)
        return [x]


class TorchInception(nn.Module):
    def __init__(self):
        super().__init__()
        for name, settings in STEM.items():
            self.add_module(name, Layer(*settings))
        for name, *settings in BLOCKS:
            self.add_module(name, Block(*settings))
        self.fc = nn.Linear(2048, 1008)

    def forward(self, images):
        """uint8 [n, 3, h, w] to pool, spatial, logits without bias, and logits with it."""
        x = (resize_like_tf1(images.float(), 299) - 128) / 128
        for i, name in enumerate(STEM):
            x = getattr(self, name)(x)
            x = POOLS["max/2"](x) if i in (2, 4) else x
        for name, *_ in BLOCKS:
            if name == "Mixed_6d":
                spatial = getattr(self, name).branch1x1(x)[:, :7].permute(0, 2, 3, 1).flatten(1)
            x = getattr(self, name)(x)
        pool = x.mean(dim=(2, 3))
        return pool, spatial, pool @ self.fc.weight.T, self.fc(pool)


def resize_like_tf1(x, size):
    """Bilinear, by two sparse matrices of weights."""
    rows, columns = (_weights(length, size) for length in x.shape[2:])
    return torch.einsum("yh,nchw,xw->ncyx", rows, x, columns)


def _weights(length, size):
    position = torch.arange(size, dtype=torch.float32) * torch.tensor(length / size)
    low = position.long()
    weights = torch.zeros(size, length)
    index = torch.arange(size)
    weights[index, low] += 1 - (position - low)
    weights[index, (low + 1).clamp(max=length - 1)] += position - low
    return weights


def random_inception(images, seed=0):
    """A network of random weights, every parameter and statistic of its own.

    Kernels of plain random networks map all images to nearly one point. Here the statistics of
    the normalisation are first taken from `images` (uint8 [n, 3, h, w]), as training would, and
    then disturbed: activations keep the order of 1, and differ between images.
    """
    generator = torch.Generator().manual_seed(seed)
    network = TorchInception()

    def normal(like, scale):
        return torch.randn(like.shape, generator=generator) * scale

    def uniform(like, low, high):
        return torch.rand(like.shape, generator=generator) * (high - low) + low

    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for name, value in network.named_parameters():
            if value.ndim > 1:
                value.copy_(normal(value, (2.0 / value[0].numel()) ** 0.5))
            elif name.endswith("bn.weight"):
                value.copy_(uniform(value, 0.7, 1.4))
            else:
                value.copy_(normal(value, 0.2))
        for norm in norms:
            norm.momentum = 1.0
        network.train()(images)
        for norm in norms:
            norm.running_mean += normal(norm.running_mean, 0.2) * norm.running_var.sqrt()
            norm.running_var *= uniform(norm.running_var, 0.7, 1.4)
    return network.eval().requires_grad_(False)


def params_of(network):
    """The network's values as nested parameters of ours, by hand rather than by interop's table."""
    params = {"fc": {"kernel": network.fc.weight.numpy().T, "bias": network.fc.bias.numpy()}}
    for path, layer in network.named_modules():
        if isinstance(layer, Layer):
            *parents, name = path.split(".")
            node = params
            for parent in parents:
                node = node.setdefault(parent, {})
            node[name] = {
                "kernel": layer.conv.weight.permute(2, 3, 1, 0).numpy(),
                "scale": layer.bn.weight.numpy(),
                "bias": layer.bn.bias.numpy(),
                "mean": layer.bn.running_mean.numpy(),
                "var": layer.bn.running_var.numpy(),
            }
    return params

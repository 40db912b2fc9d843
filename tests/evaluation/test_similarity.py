import hashlib
import sys

import numpy as np
import pytest

from dit_jax.evaluation import load_lpips, psnr, ssim


def ssim_by_definition(a: np.ndarray, b: np.ndarray, data_range: float) -> float:
    """Every window of every channel by itself, from the formulas of the paper."""
    offsets = np.arange(11) - 5
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = []
    for channel in range(a.shape[2]):
        for i in range(a.shape[0] - 10):
            for j in range(a.shape[1] - 10):
                x = a[i : i + 11, j : j + 11, channel].astype(np.float64)
                y = b[i : i + 11, j : j + 11, channel].astype(np.float64)
                mx, my = (weights * x).sum(), (weights * y).sum()
                vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
                cov = (weights * (x - mx) * (y - my)).sum()
                value = (2 * mx * my + c1) * (2 * cov + c2)
                values.append(value / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(values))


def image_pair(seed: int, shape=(3, 14, 17, 3)):
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 256, shape).astype(np.uint8)
    b = np.clip(a + rng.normal(0, 40, shape), 0, 255).astype(np.uint8)
    return a, b


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_is_its_definition_for_bytes_and_floats(channels, monkeypatch):
    a, b = image_pair(channels, (3, 14, 17, channels))
    expected = [ssim_by_definition(x, y, 255.0) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(ssim(a, b), expected, rtol=1e-9)
    np.testing.assert_allclose(ssim(a / 127.5 - 1, a / 127.5 - 1), 1.0, rtol=1e-12)
    halves = ssim_by_definition(a[0] / 127.5 - 1, b[0] / 127.5 - 1, 2.0)
    assert ssim(a / 127.5 - 1, b / 127.5 - 1)[0] == pytest.approx(halves, rel=1e-9)
    monkeypatch.setattr("dit_jax.evaluation.similarity._BATCH_BYTES", 1)  # one image at a time
    np.testing.assert_allclose(ssim(a, b), expected, rtol=1e-9)


def test_ssim_orders_and_bounds():
    a, b = image_pair(5)
    assert (ssim(a, b) < 1).all()
    np.testing.assert_allclose(ssim(a, b), ssim(b, a), rtol=1e-12)
    assert ssim(a, 255 - a)[0] < 0
    assert len(ssim(a[:0], b[:0])) == 0
    assert np.isfinite(psnr(a, b)).all()


def test_ssim_of_unlike_or_small_images_refused():
    a, b = image_pair(0)
    with pytest.raises(ValueError, match="equal shapes"):
        ssim(a, b[:2])
    with pytest.raises(ValueError, match="one kind"):
        ssim(a, b / 127.5 - 1)
    with pytest.raises(ValueError, match="at least 11x11 pixels, got 10x17"):
        ssim(a[:, :10], b[:, :10])


def test_lpips_without_its_library_says_what_to_install_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ImportError, match="pip install lpips torchvision"):
        load_lpips()
    with pytest.raises(ValueError, match="'alex' or 'vgg'"):
        load_lpips("resnet")


class FakeLpips:
    """The library's outward shape: slices of a backbone, distances of NCHW images in [-1, 1]."""

    __version__ = "9"

    def LPIPS(self, *, net, pnet_rand, verbose):
        import torch

        assert pnet_rand, "weights must not be downloaded"

        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.net = torch.nn.Module()
                self.net.slice1 = torch.nn.Sequential()
                self.net.slice1.add_module("0", torch.nn.Conv2d(3, 2, 3))

            def forward(self, a, b):
                assert a.shape[1] == 3 and not self.training
                difference = self.net.slice1(a) - self.net.slice1(b)
                return difference.square().mean((1, 2, 3), keepdim=True)

        return Model()


def test_lpips_uses_the_weights_at_hand_and_checks_them(monkeypatch, tmp_path):
    torch = pytest.importorskip("torch")
    monkeypatch.setitem(sys.modules, "lpips", FakeLpips())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"alexnet-owt-7be5be79.pth"):
        load_lpips()
    layer = torch.nn.Conv2d(3, 2, 3)
    path = tmp_path / "weights.pth"
    state = {f"features.0.{name}": value for name, value in layer.state_dict().items()}
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"SHA-256 begins with .*not 7be5be79"):
        load_lpips(weights=path)
    distance = load_lpips(weights=path, allow_other_weights=True, batch_size=2)
    assert distance.fingerprint == hashlib.sha256(path.read_bytes()).hexdigest()
    assert distance.name == "lpips-9-alex"
    a, b = image_pair(1)
    with torch.no_grad():
        x, y = (torch.tensor(z.transpose(0, 3, 1, 2) / 127.5 - 1).float() for z in (a, b))
        expected = (layer(x) - layer(y)).square().mean((1, 2, 3)).numpy()
    np.testing.assert_allclose(distance(a, b), expected, rtol=1e-4)
    np.testing.assert_array_equal(distance(a, a), 0)
    with pytest.raises(ValueError, match="RGB"):
        distance(a[..., :1], b[..., :1])
    torch.save({"features.0.bias": layer.bias.detach()}, path)
    with pytest.raises(ValueError, match=r"lacks 1 of LPIPS's weights, such as features.0.weight"):
        load_lpips(weights=path, allow_other_weights=True)

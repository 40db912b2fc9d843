"""convert, sample and train from a network pickle of EDM."""

import numpy as np
import pytest

from dit_jax.config import default_config
from dit_jax.evaluation import load_adm_npz
from dit_jax.interop import edm
from dit_jax.interop.models import open_model
from dit_jax.interop.parameters import flatten, parameter_shapes
from dit_jax.interop.table import export_arrays, export_specs
from dit_jax.launch import convert, sample, train
from dit_jax.models import Network
from dit_jax.models.edm import SongUNetConfig
from tests.interop.edm_pickles import TRACE, dump, snapshot
from tests.interop.test_models import assert_same, random_params

NETWORK = {
    "model_channels": 8,
    "channel_mult": (1,),
    "num_blocks": 1,
    "attn_resolutions": (),
}
CONFIG = SongUNetConfig(image_size=8, in_channels=1, num_classes=10, **NETWORK)
PARAMS = random_params(Network(CONFIG))


@pytest.fixture
def network_pickle(tmp_path):
    """NVlabs' layout, with a network for digits."""
    leaves, shapes = dict(flatten(PARAMS)), parameter_shapes(Network(CONFIG))
    table = edm.edm_table(CONFIG, shapes)
    arrays = export_arrays(table, shapes, leaves.__getitem__)
    tensors = dict(zip(export_specs(table, shapes), arrays, strict=True))
    arguments = {"img_resolution": 8, "img_channels": 1, "label_dim": 10, "model_type": "SongUNet"}
    path = dump(tmp_path / "network.pkl", snapshot(tensors, arguments | NETWORK))
    yield path
    assert not (tmp_path / TRACE).exists()


def test_convert_and_sample(network_pickle, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    convert.main(["--from=edm_pkl", "--to=edm_pt", str(network_pickle), "a.pt"])
    out = capsys.readouterr().out
    assert "as edm_pkl" in out and "note: load it into EDMPrecond(img_resolution=8" in out
    convert.main(["--to=dit_jax", "a.pt", "ours"])
    assert "sigma_data" in capsys.readouterr().out
    assert "DDPM++ of 8 channels" in (tmp_path / "ours" / "README.md").read_text()
    options = ["--steps=2", "--num_images=8", "--batch_size=8"]
    made = []
    for number, source in enumerate((f"edm_pkl:{network_pickle}", "a.pt", "ours")):
        sample.main([f"--init_from={source}", f"--out={number}.npz", *options])
        made.append(load_adm_npz(tmp_path / f"{number}.npz")[0])
    assert made[0].shape == (8, 8, 8, 1) and made[0].std() > 1
    np.testing.assert_array_equal(made[0], made[1])
    np.testing.assert_array_equal(made[0], made[2])
    with pytest.raises(SystemExit):
        convert.main(["--to=edm_pkl", "a.pt", "b.pkl"])


def test_training_starts_from_it(network_pickle, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = default_config()
    config.data.name = "digits"
    config.model.update(name="song_unet", image_size=8, in_channels=1, num_classes=10)
    config.model.song_unet.update(NETWORK, dropout=0.0)
    config.process.name = "edm"
    config.timesteps.name = "log_normal"
    config.optimizer.learning_rate = 1e-30
    config.ema.decays = (0.9,)
    config.training.update(num_steps=1, batch_size=16, tensorboard=False)
    config.sampling.update(solver="heun", steps=2, batch_size=16)
    train.run(config, tmp_path / "run", init_from=str(network_pickle))
    assert "starting from edm_pkl" in capsys.readouterr().out
    for weights in ("raw", "ema"):
        assert_same(open_model(tmp_path / "run", weights=weights), PARAMS)
    config.model.song_unet.num_blocks = 2
    with pytest.raises(ValueError, match=r"--config\.model\.song_unet\.num_blocks=1"):
        train.run(config, tmp_path / "other", init_from=str(network_pickle))

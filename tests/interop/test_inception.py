import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import jax
import numpy as np
import pytest
import torch

from dit_jax.evaluation.inception import parameter_shapes
from dit_jax.interop import inception as subject
from dit_jax.interop.inception import inception_table, load_extractor, load_inception
from dit_jax.interop.parameters import flat_shapes, flatten
from dit_jax.interop.table import export_arrays, export_specs
from dit_jax.interop.tensors import InteropError
from tests.references.torch_inception import params_of, random_inception


@pytest.fixture(scope="module")
def network():
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (2, 3, 8, 8), dtype=np.uint8)
    return random_inception(torch.from_numpy(images))


@pytest.fixture(scope="module")
def weights(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture
def published(weights, monkeypatch):
    """The random weights pass for the published ones."""
    monkeypatch.setattr(subject, "SHA256_PREFIX", subject._sha256(weights)[:8])


def changed(network, path, **tensors):
    state = network.state_dict() | tensors
    torch.save({name: value for name, value in state.items() if value is not None}, path)
    return path


def assert_identical(found, expected):
    found, expected = dict(flatten(found)), dict(flatten(expected))
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        assert found[path].dtype == np.float32
        np.testing.assert_array_equal(found[path], array)


def test_the_files_tensors_become_our_parameters(network, weights):
    assert_identical(load_inception(weights, allow_other=True), params_of(network))


def test_counters_may_be_absent(network, tmp_path):
    # The published file was written without them.
    counters = [name for name in network.state_dict() if name.endswith("num_batches_tracked")]
    assert len(counters) == 94
    path = changed(network, tmp_path / "x.pth", **dict.fromkeys(counters))
    assert_identical(load_inception(path, allow_other=True), params_of(network))


def test_export_is_the_state_dict_bit_for_bit(network):
    shapes = flat_shapes(parameter_shapes())
    ours = dict(flatten(params_of(network)))
    specs = export_specs(inception_table(), shapes)
    arrays = export_arrays(inception_table(), shapes, ours.__getitem__)
    state = network.state_dict()
    assert set(specs) == {name for name in state if not name.endswith("num_batches_tracked")}
    for name, array in zip(specs, arrays, strict=True):
        np.testing.assert_array_equal(array, state[name].numpy())


def test_the_published_file_is_known_by_its_hash(weights, monkeypatch):
    assert not load_extractor(weights, allow_other=True).standard
    with pytest.raises(InteropError, match=r"SHA-256 begins with .*expected 6726825d"):
        load_extractor(weights)
    monkeypatch.setattr(subject, "SHA256_PREFIX", subject._sha256(weights)[:8])
    mesh = jax.make_mesh((8,), ("data",))
    extractor = load_extractor(weights, batch_size=16, mesh=mesh, grey="repeat")
    assert extractor.standard
    assert (extractor.batch_size, extractor.mesh, extractor.grey) == (16, mesh, "repeat")


def test_wrong_tensors_are_listed_in_one_error(network, tmp_path):
    path = changed(
        network,
        tmp_path / "x.pth",
        **{
            "Mixed_5b.branch_pool.bn.running_var": None,
            "AuxLogits.fc.weight": torch.zeros(3),
            "fc.weight": torch.zeros(1000, 2048),
        },
    )
    with pytest.raises(InteropError) as error:
        load_inception(path, allow_other=True)
    for expected in ("Mixed_5b.branch_pool.bn.running_var", "AuxLogits.fc.weight", "1000"):
        assert expected in str(error.value)


def test_missing_file_error_says_which(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no weights file .*x.pth; .*pytorch-fid/releases"):
        load_inception(tmp_path / "x.pth")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def server(weights, monkeypatch):
    """Serves the weights' folder; the first address of two is broken."""
    handler = partial(Quiet, directory=weights.parent)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(subject, "URLS", (f"{base}/absent.pth", f"{base}/{weights.name}"))
        yield server
        server.shutdown()


def test_download_once_into_the_cache(network, server, published, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert_identical(load_inception(), params_of(network))
    assert [file.name for file in (tmp_path / "dit-jax").iterdir()] == [subject.FILE_NAME]
    monkeypatch.setattr(subject, "URLS", ())
    assert_identical(load_inception(), params_of(network))


def test_download_of_other_bytes_refused_and_not_kept(server, tmp_path):
    # allow_other is for files given by path: a download is the published file or nothing.
    with pytest.raises(InteropError, match=r"(?s)404.*expected 6726825d"):
        load_inception(cache_dir=tmp_path, allow_other=True)
    assert not list(tmp_path.iterdir())


def test_offline_error_says_what_to_fetch_and_which_flag(tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise OSError("network is unreachable")

    monkeypatch.setattr(subject.urllib.request, "urlopen", unreachable)
    with pytest.raises(InteropError) as error:
        load_inception(cache_dir=tmp_path / "cache", flag="--inception=PATH")
    for expected in (*subject.URLS, "--inception=PATH", subject.FILE_NAME, "unreachable"):
        assert expected in str(error.value)

"""Latents extracted by the command: what they hold, resuming, what is refused, training on them."""

import dataclasses
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dit_jax.data import RecordWriter, open_source
from dit_jax.data.records import writer as writer_lib
from dit_jax.interop.autoencoder_kl import save_autoencoder
from dit_jax.interop.parameters import abstract_params
from dit_jax.launch import extract_features, extraction, train
from dit_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from tests.launch.conftest import run, start, tiny_config

CONFIG = AutoencoderKLConfig(
    scaling_factor=0.5,
    shift_factor=0.25,
    block_out_channels=(8, 8),
    layers_per_block=1,
    norm_num_groups=4,
)
COUNT = 44  # two classes; no multiple of batch or shard


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """(folder, autoencoder, parameters) of a small random VAE."""
    random = np.random.default_rng(0)
    autoencoder = AutoencoderKL(CONFIG)

    def draw(leaf):
        spread = np.prod(leaf.shape[:-1]) ** -0.5 if len(leaf.shape) > 1 else 0.3
        return jnp.asarray(random.normal(size=leaf.shape) * spread, jnp.float32)

    params = jax.tree.map(draw, abstract_params(autoencoder))
    folder = tmp_path_factory.mktemp("models") / "tiny-vae"
    save_autoencoder(folder, autoencoder, params)
    return folder, autoencoder, params


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of pictures of several sizes, two classes."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(1)
    for i in range(COUNT):
        path = root / "ab"[i % 2] / f"{i:03d}.png"
        path.parent.mkdir(exist_ok=True)
        side = (int(random.integers(16, 40)), int(random.integers(16, 40)))
        coarse = random.integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(coarse).resize(side, Image.Resampling.BICUBIC).save(path)
    return root


def arguments(images, vae, out, /, **changes):
    options = {
        "data": "image_folder",
        "path": images,
        "vae": vae[0],
        "out": out,
        "image_size": 16,
        "batch_size": 8,
        "shard_size": 16,
        "dtype": "float32",
    }
    options.update(changes)
    return [f"--{name}={value}" for name, value in options.items() if value is not None]


def extract(*given, **changes):
    args = extract_features.parse_arguments(arguments(*given, **changes))
    return extraction.run(args)[0]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stored(folder):
    return np.concatenate([np.load(path) for path in sorted(folder.glob("*.latents.npy"))])


@pytest.fixture(scope="module")
def extracted(images, vae, tmp_path_factory):
    """The folder of an uninterrupted extraction, of moments of pairs."""
    return extract(images, vae, tmp_path_factory.mktemp("latents"))


def test_latents_are_the_encoded_images(images, vae, extracted):
    _, autoencoder, params = vae
    source = open_source("image_folder", "train", path=str(images), image_size=16, resize="adm")
    pixels = np.stack([source[i]["image"] for i in range(COUNT)])
    pixels = jnp.asarray(pixels / 127.5 - 1, jnp.float32)
    latents = stored(extracted)
    assert latents.shape == (COUNT, 2, 8, 8, 8) and latents.dtype == np.float32
    for flip, x in enumerate((pixels, pixels[:, :, ::-1])):
        expected = np.concatenate(jax.jit(autoencoder.encode)(params, x), axis=-1)
        assert expected.std() > 0.2
        np.testing.assert_allclose(latents[:, flip], expected, atol=1e-4)
    read = open_source("latents", "train", path=str(extracted.parent), verify_checksums=True)
    made, field = read.header.provenance, read.header.fields["latents"]
    assert made["vae_name"] == "tiny-vae" and len(made["vae_sha256"]) == 64
    assert made["source_fingerprint"] == source.info.fingerprint
    assert (field.scale, field.shift, field.shape) == (0.5, 0.25, (8, 8, 4))
    assert read.header.class_names == ("a", "b")
    labels = [read[i]["label"] for i in range(COUNT)]
    assert labels == [source[i]["label"] for i in range(COUNT)]
    mean = latents[:, 0, ..., :4]
    np.testing.assert_allclose(read[5]["image"], (mean[5] - 0.25) * 0.5, atol=1e-6)


@pytest.mark.parametrize("failing_call", [1, 2, 5, 6])
def test_after_a_failure_the_same_command_ends_with_the_same_bits(
    images, vae, extracted, tmp_path, monkeypatch, capsys, failing_call
):
    calls, add = [], RecordWriter.add

    def failing(self, **arrays):
        calls.append(1)
        if len(calls) == failing_call:
            raise OSError("disk full")
        add(self, **arrays)

    with monkeypatch.context() as patch:
        patch.setattr(RecordWriter, "add", failing)
        with pytest.raises(OSError, match="disk full"):
            extract(images, vae, tmp_path)
    assert not (tmp_path / "train" / "header.json").exists()
    capsys.readouterr()
    extract(images, vae, tmp_path)
    on_disk = (failing_call - 1) * 8 // 16 * 16
    assert (f"continuing after {on_disk} images" in capsys.readouterr().out) == bool(on_disk)
    assert contents(tmp_path / "train") == contents(extracted)


def test_killed_before_the_header_is_written_it_ends_with_the_same_bits(
    images, vae, extracted, tmp_path, monkeypatch
):
    save_text = writer_lib.save_text

    def failing(path, text):
        if path.name == "header.json":
            raise OSError("disk full")
        save_text(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(writer_lib, "save_text", failing)
        with pytest.raises(OSError, match="disk full"):
            extract(images, vae, tmp_path)
    extract(images, vae, tmp_path)
    assert contents(tmp_path / "train") == contents(extracted)


def test_killed_as_a_process_it_ends_with_the_same_bits(images, vae, tmp_path):
    options = {"shard_size": 1, "batch_size": 1, "kind": "samples", "dtype": "float16"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    out, _ = run("extract_features", *arguments(images, vae, whole, **options))
    assert "encoded 44/44" in out and "images/s" in out and "--config.model.in_channels=4" in out
    process = start("extract_features", *arguments(images, vae, killed, **options))
    deadline = time.time() + 120
    while time.time() < deadline and not list((killed / "train").glob("shard-0000[3-9].label*")):
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (killed / "train" / "header.json").exists()
    out, _ = run("extract_features", *arguments(images, vae, killed, **options))
    assert "continuing after" in out
    assert contents(killed / "train") == contents(whole / "train")


def test_samples_depend_on_the_image_and_the_seed_only(images, vae, tmp_path):
    # In this process there are 8 devices, in the other one.
    first = stored(extract(images, vae, tmp_path / "a", kind="samples"))
    assert first.shape == (COUNT, 2, 8, 8, 4)
    again = stored(
        extract(images, vae, tmp_path / "b", kind="samples", batch_size=16, shard_size=None)
    )
    np.testing.assert_allclose(again, first, atol=1e-4)
    options = {"kind": "samples", "batch_size": 5, "shard_size": 10}
    run("extract_features", *arguments(images, vae, tmp_path / "c", **options))
    np.testing.assert_allclose(stored(tmp_path / "c" / "train"), first, atol=1e-4)
    other = stored(extract(images, vae, tmp_path / "d", kind="samples", seed=1))
    moments = stored(extract(images, vae, tmp_path / "e"))
    mean, logvar = np.split(moments, 2, axis=-1)
    for drawn in (first, other):
        eps = (drawn - mean) / np.exp(logvar / 2)
        assert abs(eps.mean()) < 0.02 and abs(eps.std() - 1) < 0.02
    assert abs(np.corrcoef((first - mean).ravel(), (other - mean).ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef((first - mean)[:, 0].ravel(), (first - mean)[:, 1].ravel())[0, 1]) < 0.03


def test_other_sources_and_no_flips(vae, tmp_path):
    random = np.random.default_rng(0)
    grey = dataclasses.replace(CONFIG, in_channels=1)
    autoencoder = AutoencoderKL(grey)
    save_autoencoder(tmp_path / "vae", autoencoder, autoencoder.init(jax.random.key(0)))
    options = {"data": "digits", "path": None, "image_size": None, "flip": "none"}
    folder = extract(
        None, (tmp_path / "vae",), tmp_path / "out", **options, shard_size=None, split="test"
    )
    assert folder.name == "test" and stored(folder).shape == (355, 1, 4, 4, 8)

    from io import BytesIO

    files = []
    for _ in range(11):
        buffer = BytesIO()
        Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)).save(buffer, "JPEG")
        files.append(buffer.getvalue())
    np.savez(
        tmp_path / "small_train.npz",
        jpeg=np.frombuffer(b"".join(files), np.uint8),
        offsets=np.cumsum([0, *map(len, files)]),
        labels=np.arange(11) % 3,
    )
    options = {"data": "jpeg_npz", "image_size": 8, "dtype": "float16", "flip": "none"}
    folder = extract(tmp_path / "small_{split}.npz", vae, tmp_path / "npz", **options)
    assert stored(folder).shape == (11, 1, 4, 4, 8) and stored(folder).dtype == np.float16


def test_training_reads_what_was_extracted(extracted, tmp_path):
    changes = {
        "data.name": "latents",
        "data.latents.path": str(extracted.parent),
        "data.horizontal_flip": True,
        "model.image_size": 8,
        "model.in_channels": 4,
        "model.num_classes": 2,
        "training.num_steps": 4,
    }
    result = train.run(tiny_config(**changes), tmp_path)
    assert result.step == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 15}, "multiples of 2"),
        ({"batch_size": 12}, "--batch_size=12: expected a multiple of 8 devices"),
        ({"shard_size": 12}, "--shard_size=12: expected a multiple of the batch size, 8"),
        ({"vae": "nowhere"}, "no autoencoder at nowhere"),
        ({"path": None}, "--data=image_folder needs --path"),
        ({"path": "nowhere"}, "nowhere does not exist"),
        ({"dataset": "cifar10"}, "--dataset does nothing with --data=image_folder"),
        ({"data": "digits"}, "--path does nothing with --data=digits"),
        ({"data": "digits", "path": None, "image_size": 8}, "have 1 channels, the VAE encodes 3"),
        ({"data": "digits", "path": None, "buckets": "8x8"}, "--buckets does nothing with --data"),
        ({"buckets": "16x16,15x16"}, "multiples of 2"),
        ({"buckets": "16"}, "--buckets='16': expected heights and widths"),
        ({"image_size": None, "buckets": "auto:8"}, "--buckets='auto:8' needs --image_size"),
        ({"data": "tfds"}, "--data=tfds needs --dataset"),
        ({"image_size": None}, "mixed sizes"),
        ({"compute_dtype": "float16"}, "exceed float16's range"),
    ],
)
def test_bad_combinations_are_refused(images, vae, tmp_path, capsys, changes, message):
    given = arguments(images, vae, tmp_path / "out", **changes)
    with pytest.raises(SystemExit) as ending:
        extract_features.main(given)
    assert ending.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_existing_folders_are_refused(images, vae, extracted, tmp_path, monkeypatch):
    with pytest.raises(FileExistsError, match="holds a finished set"):
        extract(images, vae, extracted.parent)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "thesis.txt").write_text("")
    with pytest.raises(FileExistsError, match="holds other things: choose another --out"):
        extract(images, vae, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(RecordWriter, "add", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            extract(images, vae, tmp_path / "begun")
    with pytest.raises(ValueError, match=r"other settings \(seed: 0 -> 1\)"):
        extract(images, vae, tmp_path / "begun", seed=1)
    with pytest.raises(ValueError, match=r"other settings \(posterior: True -> False\)"):
        extract(images, vae, tmp_path / "begun", kind="samples")


BUCKETS = {"image_size": None, "buckets": "12x20,16x16,20x12"}


def test_images_of_several_sizes_are_extracted_by_size(images, vae, tmp_path, monkeypatch, capsys):
    whole = extract(images, vae, tmp_path / "whole", **BUCKETS)
    assert "sizes, of images of 12x20 (" in capsys.readouterr().out
    source = open_source("latents", "train", path=str(whole.parent))
    options = {"buckets": BUCKETS["buckets"], "resize": "adm"}
    pixels = open_source("image_folder", "train", path=str(images), **options)
    doubled = [(2 * b.size[0], 2 * b.size[1], b.count) for b in source.info.buckets]
    assert doubled == [(*b.size, b.count) for b in pixels.info.buckets] and len(doubled) == 3
    _, autoencoder, params = vae
    for bucket in range(3):
        places, numbers = pixels.members(bucket), source.members(bucket)
        given = pixels.batch(places)
        x = jnp.asarray(given["image"] / 127.5 - 1, jnp.float32)
        mean, _ = jax.jit(autoencoder.encode)(params, x)
        read = source.batch(numbers)
        np.testing.assert_allclose(read["image"], (mean - 0.25) * 0.5, atol=1e-4)
        np.testing.assert_array_equal(read["label"], given["label"])
    # Ended in the middle of the second size, the same command ends with the same bits.
    add, calls = RecordWriter.add, []

    def failing(self, **arrays):
        calls.append(1)
        if len(calls) == 5:
            raise OSError("disk full")
        add(self, **arrays)

    with monkeypatch.context() as patch:
        patch.setattr(RecordWriter, "add", failing)
        with pytest.raises(OSError, match="disk full"):
            extract(images, vae, tmp_path / "parts", **BUCKETS)
    parts = extract(images, vae, tmp_path / "parts", **BUCKETS)
    assert "continuing after" in capsys.readouterr().out
    assert contents(parts) == contents(whole)


def test_rectangles_are_extracted(images, vae, tmp_path):
    folder = extract(images, vae, tmp_path, image_size="12x20", flip="none")
    source = open_source("latents", "train", path=str(folder.parent))
    assert source.info.image_shape == (6, 10, 4) and not source.info.buckets


def test_tfds_is_extracted(vae, tmp_path):
    import tensorflow_datasets as tfds

    class ExtractedTiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = tmp_path
        __module__ = "__main__"  # for classes in packages TFDS wants importlib_resources

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(names=["ant", "bee"]),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(12):
                pixels = np.random.default_rng(i).integers(0, 256, (16 + i, 20, 3), np.uint8)
                yield i, {"image": pixels, "label": i % 2}

    data = tmp_path / "tfds"
    ExtractedTiny(data_dir=data, file_format="array_record").download_and_prepare()
    options = {"data": "tfds", "dataset": "extracted_tiny", "split": "train[:10]"}
    folder = extract(data, vae, tmp_path / "out", **options)
    assert folder.name == "train" and stored(folder).shape == (10, 2, 8, 8, 8)
    header = open_source("latents", "train", path=str(folder)).header
    assert header.class_names == ("ant", "bee")
    assert header.provenance["source_name"] == "tfds/extracted_tiny"

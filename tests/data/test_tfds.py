import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from dit_jax.data import make_loader, open_source


def pixels(index):
    return np.random.default_rng(index).integers(0, 256, (8, 8, 3), np.uint8)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Three tiny data sets, prepared by TFDS itself."""
    import tensorflow_datasets as tfds

    folder = tmp_path_factory.mktemp("tfds")

    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = pathlib.Path(folder)
        shape = (8, 8, 3)
        names = ("ant", "bee", "cow")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(shape=self.shape),
                        "label": tfds.features.ClassLabel(names=self.names),
                    }
                ),
            )

        def _split_generators(self, manager):
            return {"train": self._generate_examples(12), "validation": self._generate_examples(6)}

        def _generate_examples(self, count):
            for index in range(count):
                image = pixels(index)
                if self.shape[0] is None and index:
                    image = np.concatenate([image, image], axis=0)
                yield index, {"image": image, "label": index % 3}

    class TinyMixed(Tiny):
        shape = (None, None, 3)

    class TinyRecord(Tiny):
        pass

    for builder, file_format in ((Tiny, 1), (TinyMixed, 1), (TinyRecord, 0)):
        file_format = ("tfrecord", "array_record")[file_format]
        builder(data_dir=folder, file_format=file_format).download_and_prepare()
    return str(folder)


def open_tiny(data_dir, split="train", dataset="tiny", **options):
    return open_source("tfds", split, dataset=dataset, data_dir=data_dir, **options)


def test_examples(data_dir):
    source = open_tiny(data_dir)
    assert source.info.image_shape == (8, 8, 3) and len(source) == 12
    assert source.info.class_names == ("ant", "bee", "cow") and source.info.num_classes == 3
    # TFDS shuffles when it prepares: find each image among the originals, with its label.
    originals = {pixels(i).tobytes(): i % 3 for i in range(12)}
    found = [source[i] for i in range(12)]
    assert {example["image"].tobytes() for example in found} == set(originals)
    assert all(originals[e["image"].tobytes()] == e["label"] for e in found)
    batch = next(iter(make_loader(source, batch_size=4, seed=0)))
    assert batch["image"].shape == (4, 8, 8, 3)


def test_splits_and_resizing(data_dir):
    assert len(open_tiny(data_dir, "test")) == 6  # falls back on validation
    assert len(open_tiny(data_dir, "train[:50%]")) == 6
    with pytest.raises(ValueError, match=r"no split 'dev'; it has \['train', 'validation'\]"):
        open_tiny(data_dir, "dev")
    grey = open_tiny(data_dir, channels=1, resize="adm", image_size=4)
    assert grey[0]["image"].shape == (4, 4, 1)
    assert grey.info.fingerprint != open_tiny(data_dir).info.fingerprint
    with pytest.raises(ValueError, match=r"are 8x8 .*not image_size=16"):
        open_tiny(data_dir, image_size=16)
    with pytest.raises(ValueError, match="mixed sizes: set resize='adm'"):
        open_tiny(data_dir, dataset="tiny_mixed")
    mixed = open_tiny(data_dir, dataset="tiny_mixed", resize="adm", image_size=8)
    assert {mixed[i]["image"].shape for i in range(12)} == {(8, 8, 3)}
    with pytest.raises(ValueError, match=r"no Image feature 'picture'; set image_key to one of"):
        open_tiny(data_dir, image_key="picture")


def test_what_to_run_when_not_prepared(data_dir, tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        open_tiny(str(tmp_path), dataset="cifar10")
    assert "'cifar10' is not prepared" in str(error.value)
    assert (
        'python -c \'import tensorflow_datasets as tfds; tfds.builder("cifar10", '
        f'data_dir="{tmp_path}", file_format="array_record").download_and_prepare()\''
    ) in str(error.value)
    assert not os.listdir(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"(?s)as tfrecord, which has no random access.*run"
    ):
        open_tiny(data_dir, dataset="tiny_record")
    with pytest.raises(ValueError, match=r"knows no data set 'cifar100x'.*did you mean cifar100"):
        open_tiny(str(tmp_path), dataset="cifar100x")


def test_reading_needs_no_tensorflow(data_dir):
    program = (
        "import sys\n"
        "from dit_jax.data import open_source\n"
        f"source = open_source('tfds', 'train', dataset='tiny', data_dir={data_dir!r})\n"
        "print(source[3]['image'].shape, 'tensorflow' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "(8, 8, 3) False"


def test_tensorflow_sees_no_accelerator(data_dir):
    tensorflow = sys.modules["tensorflow"]  # imported by TFDS to prepare the data
    open_tiny(data_dir)
    assert tensorflow.config.get_visible_devices("GPU") == []

"""Images of several sizes: which bucket each goes to, and the stream of batches of one bucket."""

import collections
import logging
from pathlib import Path

import numpy as np
import pytest

from dit_jax.data import make_loader, open_source
from dit_jax.data.buckets import MAX_ROUND, Turns, aspect_buckets, nearest_bucket, parse_buckets

BUCKETS = "8x16,12x12,16x8"
SIZES = {(8, 16): 5, (12, 12): 9, (16, 8): 2}  # (height, width): images


def test_sizes_are_named_or_counted_out():
    assert parse_buckets("192x320, 256x256", 0) == ((192, 320), (256, 256))
    assert parse_buckets("auto:64", 256**2) == ((192, 320), (256, 256), (320, 192))
    many = aspect_buckets(1024**2, 64)
    assert (1024, 1024) in many and (768, 1344) in many and (1344, 768) in many
    assert list(many) == sorted(many, key=lambda size: size[0] / size[1])
    for height, width in many:
        assert height * width <= 1024**2 and max(height, width) <= 2 * min(height, width)
        assert height % 64 == width % 64 == 0 and height * (width + 64) > 1024**2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("192", "expected heights and widths as '192x320"),
        ("192x320;256x256", "expected heights and widths"),
        ("auto:", "or 'auto:64' for all"),
        ("auto:0", "or 'auto:64' for all"),
        ("auto:512", "no rectangle of multiples of 512 has at most 65536 pixels"),
        ("0x16", "a side of 0 pixels"),
        ("16x32,8x16", "16x32 and 8x16 have the same aspect ratio"),
        ("16x32,16x32", "16x32 and 16x32 have the same aspect ratio"),
    ],
)
def test_bad_buckets_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_buckets(text, 256**2)


def test_the_nearest_aspect_is_nearest_on_a_logarithmic_scale():
    sizes = np.array([[300, 300], [200, 100], [139, 100], [143, 100], [100, 143], [10, 1000]])
    buckets = ((8, 16), (12, 12), (16, 8))  # borders at the square root of 2
    assert nearest_bucket(sizes, buckets).tolist() == [1, 0, 1, 0, 2, 2]


@pytest.fixture
def folder(tmp_path, write_image):
    """The images of `SIZES`, in two classes, in no order of their sizes."""
    number = 0
    for (height, width), count in SIZES.items():
        for _ in range(count):
            name = f"{'ab'[number % 2]}/{number * 7 % 16:02d}.png"
            write_image(name, size=(2 * width, 2 * height), seed=number)
            number += 1
    return tmp_path


def open_buckets(folder, buckets=BUCKETS, **options):
    options = {"image_size": 12, "resize": "adm", "channels": 1, **options}
    return open_source("image_folder", "train", path=str(folder), buckets=buckets, **options)


def test_an_image_goes_to_its_bucket(folder):
    source = open_buckets(folder)
    assert {bucket.size: bucket.count for bucket in source.info.buckets} == SIZES
    assert source.info.image_shape == (12, 12, 1)  # of the most pixels
    members = [source.members(i) for i in range(3)]
    assert sorted(np.concatenate(members).tolist()) == list(range(16))
    for bucket, indices in zip(source.info.buckets, members, strict=True):
        assert source.batch(indices)["image"].shape == (bucket.count, *bucket.size, 1)
        assert source[int(indices[0])]["image"].shape == (*bucket.size, 1)
    with pytest.raises(ValueError, match=r"several sizes \(8x16, 12x12\): read together only"):
        source.batch(np.concatenate(members[:2]))
    with pytest.raises(ValueError, match="a batch holds one: such a stream has no last batch"):
        make_loader(source, batch_size=4, seed=0, repeat=False)
    other = open_buckets(folder, "8x16,12x12,16x10")
    assert other.info.fingerprint != source.info.fingerprint
    with pytest.raises(ValueError, match="needs resize='adm'"):
        open_buckets(folder, resize="none")
    with pytest.raises(ValueError, match="has no buckets"):
        open_source("digits", "train").members(0)


def test_an_empty_bucket_is_left_out(folder, caplog):
    caplog.set_level(logging.WARNING)
    source = open_buckets(folder, "4x32,8x16,12x12,16x8")
    assert {bucket.size: bucket.count for bucket in source.info.buckets} == SIZES
    assert "no image is nearest to the aspect ratio of 4x32 (height x width)" in caplog.text


def test_a_damaged_image_is_replaced_by_one_of_its_size(folder, caplog):
    source = open_buckets(folder, verify="fast")
    for index in source.members(2)[:1]:
        path = Path(source.describe(int(index)))
        content = path.read_bytes()
        path.write_bytes(content[:40] + b"\0" * (len(content) - 40))
        np.testing.assert_array_equal(source[int(index)]["image"].shape, (16, 8, 1))
    assert "cannot be decoded, using the next image instead" in caplog.text


def stream(source, count, start=0, **options):
    options = {"batch_size": 4, "seed": 3, "horizontal_flip": True, **options}
    batches = iter(make_loader(source, **options))
    batches.set_state({**batches.get_state(), "next_batch": start})
    found = [next(batches) for _ in range(count)]
    state = batches.get_state()
    batches.close()
    return found, state


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])
        np.testing.assert_array_equal(a["conditions"]["label"], b["conditions"]["label"])


def test_batch_k_is_a_function_of_seed_and_k(folder):
    source = open_buckets(folder)
    whole, state = stream(source, 20)
    sizes = [batch["image"].shape[1:3] for batch in whole]
    assert set(sizes) == set(SIZES) and sizes != sorted(sizes)
    rest, _ = stream(source, 9, start=11)
    assert_same(whole[11:], rest)
    batches = iter(make_loader(source, batch_size=4, seed=3, horizontal_flip=True))
    assert set(batches.image_sizes) == set(SIZES)
    batches.set_state({**state, "next_batch": 7})
    assert_same([next(batches)], whole[7:8])
    batches.close()
    # Of several processes each has its stretch of the same batches, of one bucket.
    halves = [stream(source, 20, process_index=i, process_count=2)[0] for i in range(2)]
    joined = [
        {
            "image": np.concatenate([a["image"], b["image"]]),
            "conditions": {
                "label": np.concatenate([a["conditions"]["label"], b["conditions"]["label"]])
            },
        }
        for a, b in zip(*halves, strict=True)
    ]
    assert_same(joined, whole)
    assert [b["image"].shape for b in stream(source, 20, seed=4)[0]] != [
        b["image"].shape for b in whole
    ]


def test_all_images_are_seen_equally_often(folder):
    source = open_buckets(folder)
    loader = make_loader(source, batch_size=4, seed=0)
    seen = collections.Counter()
    for piece in range(16):  # a round: as many batches as images
        seen.update(loader.reader._indices(4 * piece, 4).tolist())
    assert set(seen.values()) == {4} and len(seen) == 16


def test_turns_are_shares_of_the_images():
    turns = Turns((50, 25, 25), seed=1)
    assert turns.per_round == (2, 1, 1)
    found = [turns(k) for k in range(40)]
    for bucket in range(3):
        numbers = [number for which, number in found if which == bucket]
        assert numbers == list(range(len(numbers))) and len(numbers) == (20, 10, 10)[bucket]
    assert [turns(k) for k in (33, 7)] == [found[33], found[7]]
    ordered = Turns((2, 1), seed=0, shuffle=False)
    assert [ordered(k) for k in range(4)] == [(0, 0), (0, 1), (1, 0), (0, 2)]
    large = Turns((10**8, 3 * 10**7 + 1, 7), seed=0)
    assert abs(sum(large.per_round) - MAX_ROUND) < 3 and min(large.per_round) == 1

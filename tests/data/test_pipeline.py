import json

import jax
import numpy as np
import pytest

from dit_jax.data import ArraySource, make_loader


def numbered(count, num_classes=None):
    """Images 6x4 whose first pixels spell their number; not symmetric."""
    images = np.random.default_rng(0).integers(0, 256, (count, 6, 4, 1), np.uint8)
    images[:, 0, 0, 0] = np.arange(count) % 256
    images[:, 0, 3, 0] = np.arange(count) % 256
    labels = np.arange(count)
    return ArraySource(images, labels, name="numbered", split="train", num_classes=count)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_equal(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys() == {"image", "conditions"}
        jax.tree.map(np.testing.assert_array_equal, a, b)


def labels_of(batches):
    return np.concatenate([batch["conditions"]["label"] for batch in batches])


def test_batches_are_normalised():
    source = numbered(20)
    batch = next(iter(make_loader(source, batch_size=8, seed=0, shuffle=False)))
    assert batch["image"].dtype == np.float32 and batch["conditions"]["label"].dtype == np.int32
    expected = np.stack([source[i]["image"] for i in range(8)]) / 127.5 - 1
    np.testing.assert_allclose(batch["image"], expected, atol=1e-6)
    np.testing.assert_array_equal(batch["conditions"]["label"], np.arange(8))


def test_every_epoch_visits_every_example_once_in_a_new_order():
    # 10 batches of 8 are 4 epochs of 20: no remainder is dropped.
    labels = labels_of(take(iter(make_loader(numbered(20), batch_size=8, seed=0)), 10))
    epochs = labels.reshape(4, 20)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(20))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    other = labels_of(take(iter(make_loader(numbered(20), batch_size=8, seed=1)), 10))
    assert not np.array_equal(labels, other)


def test_a_batch_may_exceed_the_data():
    labels = labels_of(take(iter(make_loader(numbered(5), batch_size=12, seed=0)), 5))
    np.testing.assert_array_equal(np.bincount(labels), [12] * 5)


def test_flips_are_fair_and_change_between_epochs():
    source = numbered(16)
    plain = next(iter(make_loader(source, batch_size=16, seed=0, shuffle=False)))["image"]
    iterator = iter(make_loader(source, batch_size=16, seed=0, shuffle=False, horizontal_flip=True))
    flipped = []
    for batch in take(iterator, 30):
        same = (batch["image"] == plain).all(axis=(1, 2, 3))
        mirrored = (batch["image"] == plain[:, :, ::-1]).all(axis=(1, 2, 3))
        assert np.all(same ^ mirrored)
        flipped.append(mirrored)
    flipped = np.array(flipped)
    assert 0.4 < flipped.mean() < 0.6
    assert np.all(flipped.any(axis=0) & ~flipped.all(axis=0))


@pytest.mark.parametrize("stop", [0, 1, 7])
def test_resume_is_exact(stop):
    loader = make_loader(numbered(20), batch_size=8, seed=3, horizontal_flip=True)
    whole = take(iter(loader), 12)
    first = iter(loader)
    take(first, stop)
    state = json.loads(json.dumps(first.get_state()))
    other_threads = make_loader(
        numbered(20), batch_size=8, seed=3, horizontal_flip=True, num_threads=0
    )
    second = iter(other_threads)
    take(second, 2)  # set_state also rewinds an iterator that is under way
    second.set_state(state)
    assert_equal(take(second, 12 - stop), whole[stop:])


def test_workers_change_nothing():
    options = {"batch_size": 8, "seed": 3, "horizontal_flip": True}
    plain = iter(make_loader(numbered(20), **options))
    take(plain, 3)
    workers = iter(make_loader(numbered(20), **options, num_workers=2))
    workers.set_state(plain.get_state())
    assert_equal(take(workers, 5), take(plain, 5))
    assert workers.get_state() == plain.get_state()
    workers.close()


def test_processes_share_the_stream_of_one():
    options = {"batch_size": 8, "seed": 3, "horizontal_flip": True}
    whole = take(iter(make_loader(numbered(20), **options)), 6)
    parts = [
        iter(make_loader(numbered(20), **options, process_index=p, process_count=4))
        for p in range(4)
    ]
    pieces = [take(part, 6) for part in parts]
    joined = [
        jax.tree.map(lambda *parts: np.concatenate(parts), *row)
        for row in zip(*pieces, strict=True)
    ]
    assert_equal(joined, whole)
    assert all(len(piece[0]["conditions"]["label"]) == 2 for piece in pieces)
    # The position is the same everywhere, and fits another number of processes.
    states = [part.get_state() for part in parts]
    assert all(state == states[0] for state in states)
    single = iter(make_loader(numbered(20), **options))
    single.set_state(states[2])
    assert single.get_state()["next_batch"] == 6


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_evaluation_sees_everything_once(process_count):
    options = {"batch_size": 8, "seed": 0, "repeat": False}
    for shuffle in (False, True):
        loaders = [
            make_loader(
                numbered(21),
                **options,
                shuffle=shuffle,
                drop_remainder=False,
                process_index=p,
                process_count=process_count,
            )
            for p in range(process_count)
        ]
        batches = [list(loader) for loader in loaders]
        assert {len(part) for part in batches} == {3} == {len(loader) for loader in loaders}
        labels = [labels_of(part) for part in batches]
        np.testing.assert_array_equal(np.sort(np.concatenate(labels)), np.arange(21))
    assert sum(len(part[-1]["conditions"]["label"]) for part in batches) == 5
    loader = make_loader(numbered(21), **options)
    assert [len(batch["conditions"]["label"]) for batch in loader] == [8, 8] and len(loader) == 2
    assert loader.steps_per_epoch == 21 / 8


def test_an_endless_stream_has_no_length():
    with pytest.raises(TypeError, match="no length"):
        len(make_loader(numbered(21), batch_size=8, seed=0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 6, "process_count": 4}, "batch_size=6 .*multiple of process_count=4"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"process_count": 2, "process_index": 2}, r"process_index=2 must be in 0\.\.1"),
        ({"seed": -1}, "seed=-1 must be between"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"batch_size": 32, "repeat": False}, "no complete batch in the 20 examples"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        make_loader(numbered(20), **{"batch_size": 8, "seed": 0, **options})


def test_the_state_of_another_stream_is_refused():
    iterator = iter(make_loader(numbered(20), batch_size=8, seed=0))
    take(iterator, 5)
    other = iter(make_loader(numbered(21), batch_size=4, seed=1))
    with pytest.raises(ValueError, match=r"batch_size: 8 -> 4; seed: 0 -> 1;.*--force"):
        other.set_state(iterator.get_state())
    other.set_state(iterator.get_state(), strict=False)
    assert other.get_state()["next_batch"] == 10


def test_errors_of_a_source_reach_the_caller():
    source = numbered(20)
    source._labels[7] = 99
    with pytest.raises(ValueError, match="example 7 of numbered/train has label 99"):
        take(iter(make_loader(source, batch_size=20, seed=0)), 1)

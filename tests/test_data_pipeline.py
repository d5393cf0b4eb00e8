"""The input pipeline: every example once an epoch, the same stream from any point."""

import made_records
import numpy as np
import pytest

from jax_distill.data import loader, records
from jax_distill.data.loader import batches, example_of_row
from jax_distill.flow import Batch
from jax_distill.worlds.shapes import renderer
from jax_distill.worlds.shapes.captions import CaptionEncoder
from jax_distill.worlds.shapes.sources import CaptionedLatents, Pictures


class Numbers:
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return Batch(np.float32(index))


class Watched(Numbers):
    """Notes what is read."""

    def __init__(self, count):
        super().__init__(count)
        self.read = []

    def __getitem__(self, index):
        self.read.append(int(index))
        return super().__getitem__(index)


def take(iterator, count):
    return np.stack([next(iterator).x for _ in range(count)])


def test_an_epoch_holds_every_example_once_in_an_order_of_its_own():
    found = take(batches(Numbers(12), 4, seed=0), 9).reshape(3, 12)
    assert all(set(epoch) == set(range(12)) for epoch in found)
    assert len({tuple(epoch) for epoch in found}) == 3
    assert not np.array_equal(found[0], np.arange(12))


def test_batches_go_on_over_the_end_of_an_epoch():
    found = take(batches(Numbers(10), 4, seed=0), 5).reshape(2, 10)
    assert all(set(epoch) == set(range(10)) for epoch in found)


def test_order_depends_on_the_seed_alone():
    first, again, other = (take(batches(Numbers(50), 5, seed), 20) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("point", [0, 1, 7, 13])
def test_a_stream_goes_on_from_its_saved_position(point):
    whole = take(batches(Numbers(23), 4, seed=3), 20)
    iterator = batches(Numbers(23), 4, seed=3)
    [next(iterator) for _ in range(point)]
    position = iterator.get_state()
    take(iterator, 3)  # what is read ahead does not count
    restored = batches(Numbers(23), 4, seed=3)
    restored.set_state(position)
    np.testing.assert_array_equal(take(restored, 20 - point), whole[point:])


@pytest.mark.parametrize("seed", range(6))
def test_batches_of_changing_sizes_miss_no_example_and_repeat_none(seed):
    """Of runs that are killed, and go on with another batch, other rows and micro-batches."""
    rng = np.random.default_rng(seed)
    stream = take(batches(Numbers(24), 1, seed), 400).ravel()
    position, given = {"examples": 0}, []
    for _ in range(8):
        rows_per_example, accumulate = rng.integers(1, 4, 2)
        examples = rng.integers(1, 8) * accumulate
        size = examples * rows_per_example
        layout = example_of_row(size, accumulate, rows_per_example)
        run = batches(Numbers(24), size, seed, layout=layout)
        run.set_state(position)
        saved = rng.integers(0, 4)
        found = take(run, saved) if saved else np.zeros((0, size))
        firsts = np.unique(layout, return_index=True)[1]
        given.extend(found[:, firsts].ravel())
        position = run.get_state()
        take(run, rng.integers(1, 3))  # read after what was saved, and lost
    np.testing.assert_array_equal(given, stream[: len(given)])
    assert position == {"examples": len(given)} and len(given) > 24


@pytest.mark.parametrize("shares", [([0, 1, 2], [3, 4, 5]), ([0, 3], [1, 4], [2, 5])])
def test_processes_read_the_rows_of_one_stream(shares):
    """Together the batches of one process, from the same position."""
    single = batches(Numbers(24), 6, seed=0)
    whole = take(single, 9)
    for rows in shares:
        part = batches(Numbers(24), 6, seed=0, rows=rows)
        np.testing.assert_array_equal(take(part, 9), whole[:, rows])
        assert part.get_state() == single.get_state()


def test_no_row_of_another_process_is_read():
    source = Watched(24)
    whole = take(batches(Numbers(24), 6, seed=0), 4)  # an epoch
    take(batches(source, 6, seed=0, rows=[4, 5]), 4)
    assert set(source.read[:8]) == set(whole[:, 4:].ravel())


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("rows_per_example", [1, 2, 4])
def test_rows_of_one_example_are_neighbours_in_its_micro_batch(accumulate, rows_per_example):
    layout = example_of_row(24, accumulate, rows_per_example)
    micro = layout.reshape(-1, accumulate).T  # as the training step takes them
    groups = micro.reshape(accumulate, -1, rows_per_example)
    assert (groups == groups[..., :1]).all()
    assert sorted(groups[..., 0].ravel()) == list(range(24 // rows_per_example))


LAYOUT = example_of_row(12, 2, 3)


def test_an_example_of_several_rows_is_read_once_and_once_an_epoch():
    source = Watched(20)
    found = take(batches(source, 12, seed=0, layout=LAYOUT), 10)  # of four examples: two epochs
    firsts = [np.flatnonzero(LAYOUT == example)[0] for example in range(4)]
    np.testing.assert_array_equal(found, found[:, firsts][:, LAYOUT])
    order = found[:, firsts].reshape(2, 20)
    assert all(set(epoch) == set(range(20)) for epoch in order)
    np.testing.assert_array_equal(source.read[:40], order.ravel())
    # The same as of a batch of four, each of whose examples has one row.
    np.testing.assert_array_equal(order.reshape(10, 4), take(batches(Numbers(20), 4, seed=0), 10))


def test_a_stream_of_several_rows_goes_on_from_its_saved_position():
    whole = take(batches(Numbers(20), 12, seed=0, layout=LAYOUT), 12)
    iterator = batches(Numbers(20), 12, seed=0, layout=LAYOUT)
    take(iterator, 7)
    restored = batches(Numbers(20), 12, seed=0, layout=LAYOUT)
    restored.set_state(iterator.get_state())
    np.testing.assert_array_equal(take(restored, 5), whole[7:])


@pytest.mark.parametrize("rows", [[0, 1], [2, 3, 4], [5, 6, 7, 8, 9, 10, 11]])
def test_a_process_reads_the_examples_that_its_rows_are_of(rows):
    """Groups may lie on two processes: then both read their example."""
    whole = take(batches(Numbers(20), 12, seed=0, layout=LAYOUT), 5)
    source = Watched(20)
    part = batches(source, 12, seed=0, rows=rows, layout=LAYOUT)
    np.testing.assert_array_equal(take(part, 5), whole[:, rows])
    needed = len(set(LAYOUT[rows]))
    read = np.reshape(source.read[: 5 * needed], (5, needed))
    for batch, expected in zip(read, whole[:, rows]):
        assert sorted(batch) == sorted(set(expected))


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ValueError, match="batch_size: 9 is more than the 8 examples there are"):
        batches(Numbers(8), 9, seed=0)
    with pytest.raises(ValueError, match="batch_size: 12 is more than 3 times the 3 examples"):
        batches(Numbers(3), 12, seed=0, layout=LAYOUT)
    assert take(batches(Numbers(4), 12, seed=0, layout=LAYOUT), 1).size == 12
    with pytest.raises(ValueError, match="rescale.batch_size: 9 is more than"):
        loader.check_batch_size(9, 8, "rescale.batch_size")


def test_pictures_are_those_of_the_world():
    source = Pictures(5, seed=3)
    assert len(source) == 5
    picture = source[4].x
    assert picture.dtype == np.float32 and -1 <= picture.min() < picture.max() <= 1
    np.testing.assert_allclose((picture + 1) * 127.5, renderer.sample(3, 4).image, atol=1e-4)


def test_captions_are_encoded_as_they_are_read(tmp_path):
    latents = np.arange(32, dtype=np.float16).reshape(4, 8)
    captions = ["a red circle", "three crosses above a blue square"]
    made_records.write(tmp_path, [records.LatentRecord(latents, c) for c in captions])
    encoder = CaptionEncoder(4)
    source = CaptionedLatents(records.LatentRecords(tmp_path), encoder)
    sequence, pooled = encoder.encode(captions[:1])
    assert len(source) == 2 and source[0].x.dtype == np.float32
    np.testing.assert_array_equal(source[0].x, latents)
    np.testing.assert_array_equal(source[0].text.sequence, sequence[0])
    np.testing.assert_array_equal(source[0].text.pooled, pooled[0])
    with pytest.raises(
        ValueError, match="data.text_length, example 1: caption 'three .* limit is 4"
    ):
        source[1]
    with pytest.raises(ValueError, match="data.text_length, example 1"):
        take(batches(source, 2, seed=0), 1)

"""Several folders as one stream: shares, sizes of pictures, dropped captions, damaged examples."""

import json

import grain
import made_records
import numpy as np
import pytest
from absl import flags

from jax_distill.config import ConfigError, base
from jax_distill.config import check as check_config
from jax_distill.data import folders, mixture
from jax_distill.data.loader import Ahead, EmbeddedLatents, batches, example_of_row
from jax_distill.data.mixture import Mixture, Part
from jax_distill.data.records import LatentRecord, LatentRecords
from jax_distill.flow import Batch, Text
from jax_distill.storage.files import FileError, PassingError

NULL = Text(np.full((1, 3, 2), -1, np.float32), np.full((1, 2), -1, np.float32))


class Named:
    """Examples whose picture is their name, a number, on as many tokens as asked for."""

    def __init__(self, first, count, tokens=1, bad=(), error=FileError):
        self._names, self._tokens = range(first, first + count), tokens
        self._bad, self._error = bad, error
        self.null, self.empty = NULL, Text(NULL.sequence[0], NULL.pooled[0])

    def __len__(self):
        return len(self._names)

    def __getitem__(self, index):
        if index in self._bad:
            raise self._error(f"example {index} of 'here' is damaged")
        name = np.float32(self._names[index])
        text = Text(np.full((3, 2), name, np.float32), np.full(2, name, np.float32))
        return Batch(np.full((self._tokens, 1), name), text)


def names(batch):
    return batch.x[:, 0, 0].astype(int)


def take(iterator, count):
    return [names(next(iterator)) for _ in range(count)]


WEIGHTS = ([1], [1, 1], [7, 3], [0.5, 0.3, 0.2], [1, 2, 3, 4, 5.5], [1e-3, 1], [123457, 7654321, 9])


@pytest.mark.parametrize("weights", WEIGHTS[:-1], ids=str)
def test_after_any_number_of_examples_shares_are_right_to_one(weights):
    order = mixture.turns(mixture.rounds(weights))
    given = np.cumsum(order[:, None] == np.arange(len(weights)), axis=0)
    shares = np.array(weights) / np.sum(weights)
    ideal = np.arange(1, len(order) + 1)[:, None] * shares
    assert np.abs(given - ideal).max() < 1
    np.testing.assert_allclose(given[-1], ideal[-1], atol=1e-6)  # a round is exact


def test_of_two_folders_any_window_has_its_share_to_one():
    order = np.tile(mixture.turns(mixture.rounds([0.7, 0.3])), 3)
    for length in range(1, len(order)):
        counts = np.convolve(order == 1, np.ones(length), "valid")
        assert np.abs(counts - 0.3 * length).max() < 1


def test_weights_are_taken_as_they_are_written_and_long_ones_rounded():
    assert mixture.rounds([0.1, 0.2, 0.7]) == [1, 2, 7]
    assert mixture.rounds([0.5]) == mixture.rounds([3]) == [1]
    rounded = mixture.rounds([123457, 7654321, 99999])
    assert sum(rounded) == mixture.MOST_PARTS
    np.testing.assert_allclose(rounded, [156.75, 9716.29, 126.96], atol=1)
    with pytest.raises(ValueError, match="data.weights: 1e-06 is less than a ten-thousandth of"):
        mixture.rounds([1e-6, 1])


def test_one_folder_is_read_in_the_order_of_its_shuffle():
    """That of all runs before there were mixtures."""
    plain = grain.MapDataset.range(23).shuffle(seed=5).repeat()
    for source in (Named(0, 23), Mixture([Part(Named(0, 23), 0.3)])):
        stream = batches(source, 4, seed=5)
        found = np.concatenate(take(stream, 20))
        np.testing.assert_array_equal(found, [plain[i] for i in range(80)])
        assert stream.get_state() == {"examples": 80}


MIXED = Mixture([Part(Named(0, 10), 2), Part(Named(100, 10), 1), Part(Named(200, 7), 1)])


def test_every_source_has_epochs_of_its_own():
    found = np.concatenate(take(batches(MIXED, 4, seed=0), 70))
    orders = []
    for first, count, share in ((0, 10, 2), (100, 10, 1), (200, 7, 1)):
        mine = found[(found >= first) & (found < first + 100)] - first
        assert len(mine) == 70 * share
        epochs = mine.reshape(-1, count)
        assert all(set(epoch) == set(range(count)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
        orders.append(epochs[0].tolist())
    assert orders[0] != orders[1]  # of as many examples


@pytest.mark.parametrize("seed", range(3))
def test_a_mixture_goes_on_with_other_batches_on_other_processes(seed):
    rng = np.random.default_rng(seed)
    stream = np.concatenate(take(batches(MIXED, 1, seed), 300))
    position, given = {"examples": 0}, []
    for _ in range(6):
        processes, ahead = rng.integers(1, 4), Ahead(int(rng.integers(1, 3)), 2)
        size = int(processes * rng.integers(1, 4))
        shares = np.split(rng.permutation(size), processes)
        runs = [batches(MIXED, size, seed, rows, ahead=ahead) for rows in shares]
        for run in runs:
            run.set_state(json.loads(json.dumps(position)))
        for _ in range(rng.integers(1, 5)):
            batch = np.zeros(size, int)
            for run, rows in zip(runs, shares):
                batch[rows] = names(next(run))
            given.extend(batch)
        position = runs[0].get_state()
        assert all(run.get_state() == position for run in runs)
    np.testing.assert_array_equal(given, stream[: len(given)])


# Of 4 tokens two folders, of 6 one.
SIZED = Mixture(
    [
        Part(Named(0, 12, 4), 1, (32, 32)),
        Part(Named(100, 10, 6), 1, (32, 48)),
        Part(Named(200, 12, 4), 1, (32, 32)),
    ]
)


def sized(iterator, count):
    """Batches, each checked to be of one size: that size and the names."""
    found = []
    for _ in range(count):
        batch = next(iterator)
        assert batch.x.shape[1] == (4, 6)[iterator.size]
        assert SIZED.resolutions[iterator.size] == ((32, 32), (32, 48))[iterator.size]
        found.append((iterator.size, names(batch)))
    return found


def test_every_batch_is_of_one_size_and_sizes_have_their_shares():
    found = sized(batches(SIZED, 2, seed=0), 60)
    sizes = np.array([size for size, _ in found])
    assert all(row.sum() == 1 for row in sizes.reshape(20, 3))  # a third of each round
    assert len({tuple(row) for row in sizes.reshape(20, 3)}) == 3  # in an order that is drawn
    for size, first, count in ((0, 0, 12), (0, 200, 12), (1, 100, 10)):
        mine = np.concatenate([x for of, x in found if of == size])
        mine = mine[(mine >= first) & (mine < first + 100)] - first
        epochs = mine[: len(mine) // count * count].reshape(-1, count)
        assert len(epochs) >= 3 and all(set(epoch) == set(range(count)) for epoch in epochs)
    other = sized(batches(SIZED, 2, seed=1), 60)
    assert [size for size, _ in other] != sizes.tolist()


def test_sizes_do_not_fall_in_with_turns():
    """Of two sizes by halves, those of every second batch are both."""
    pair = Mixture([Part(Named(0, 9), 1, (16, 16)), Part(Named(0, 9, 2), 1, (16, 32))])
    sizes = [size for size, _ in sizes_of(batches(pair, 1, seed=0), 200)]
    assert 70 < sum(sizes[::2]) * 2 < 130


def sizes_of(iterator, count):
    return [(next(iterator), iterator.size)[::-1] for _ in range(count)]


def test_a_stream_of_sizes_goes_on_bit_for_bit():
    whole = sized(batches(SIZED, 2, seed=3), 30)
    iterator = batches(SIZED, 2, seed=3)
    sized(iterator, 13)
    position = json.loads(json.dumps(iterator.get_state()))
    assert position["examples"] == 26 == sum(position["of_sizes"])
    restored = batches(SIZED, 2, seed=3, ahead=Ahead(2, 3))
    restored.set_state(position)
    for (size, found), (expected_size, expected) in zip(sized(restored, 17), whole[13:]):
        assert size == expected_size
        np.testing.assert_array_equal(found, expected)


def test_sizes_miss_no_example_when_batches_change_in_length():
    orders = {0: [], 1: []}
    position = {"examples": 0}
    for size, count in ((2, 7), (6, 5), (4, 9), (1, 11)):
        run = batches(SIZED, size, seed=0)
        run.set_state(position)
        for which, found in sized(run, count):
            orders[which].extend(found)
        position = run.get_state()
    for which, found in orders.items():
        order = SIZED.orders(seed=0)[which]
        places = [order[i] for i in range(len(found))]
        expected = [
            names(Batch(SIZED.parts[p.part].source[order.index(p)].x[None]))[0] for p in places
        ]
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("source", [Named(0, 12, 4), SIZED], ids=["one", "sizes"])
def test_a_stream_goes_back(source):
    run = batches(source, 2, seed=4)
    assert not run.go_back(1)
    whole = take(run, 13)
    position = run.get_state()
    assert run.go_back(5)
    np.testing.assert_array_equal(take(run, 5), whole[8:])
    assert run.get_state() == position
    restored = batches(source, 2, seed=4)
    restored.set_state(position)
    assert restored.go_back(13) and not restored.go_back(1)
    np.testing.assert_array_equal(take(restored, 13), whole)


def test_a_position_of_other_data_is_refused():
    with pytest.raises(ValueError, match="is not one of data of 2 sizes"):
        batches(SIZED, 2, seed=0).set_state({"examples": 4})


@pytest.mark.parametrize("source", [Named(0, 20), SIZED], ids=["one", "sizes"])
def test_captions_are_dropped_by_position_alone(source):
    layout = example_of_row(4, 2, 2)

    def dropped(batch, rows=slice(None)):
        sequence, pooled = batch.text
        lost = pooled[:, 0] == -1
        np.testing.assert_array_equal(lost, (sequence == -1).all((1, 2)))
        kept = ~lost
        np.testing.assert_array_equal(pooled[kept, 0], names(batch)[kept])
        return lost

    def stream(rows=None, share=0.4, start=None):
        run = batches(source, 4, 7, rows, layout, caption_dropout=share)
        if start:
            run.set_state(start)
        return run

    run = stream()
    first = [dropped(next(run)) for _ in range(50)]
    state = run.get_state()
    whole = np.array(first + [dropped(next(run)) for _ in range(50)])
    assert 0.25 < whole.mean() < 0.55
    assert not np.array_equal(whole[0::2], whole[1::2])
    rest = stream(start=state)
    np.testing.assert_array_equal([dropped(next(rest)) for _ in range(50)], whole[50:])
    for rows in ([0, 3], [1, 2]):
        part = stream(rows)
        np.testing.assert_array_equal([dropped(next(part)) for _ in range(20)], whole[:20, rows])
    plain = stream(share=0.0)
    assert not any(dropped(next(plain)).any() for _ in range(20))


def test_a_damaged_example_is_replaced_by_the_next_good_one(warned):
    bad = {3, 8}
    whole = np.concatenate(take(batches(Named(0, 10), 5, seed=0), 8))
    run = batches(Named(0, 10, bad=bad), 5, seed=0, damaged_share=0.2)
    found = np.concatenate(take(run, 8))
    good = ~np.isin(whole, [*bad])
    np.testing.assert_array_equal(found[good], whole[good])  # no other place is changed
    for epoch in range(4):
        order, given = (x[10 * epoch : 10 * epoch + 10] for x in (whole, found))
        assert set(given) == set(range(10)) - bad
        for place in np.flatnonzero(np.isin(order, [*bad])):
            later = np.roll(order, -place)
            assert given[place] == next(x for x in later if x not in bad)
    assert sorted(line[-len("example 3 of 'here' is damaged") :] for line in warned) == [
        "example 3 of 'here' is damaged",
        "example 8 of 'here' is damaged",
    ]
    assert "2 of 10 so far" in warned[1]
    for rows in ([0, 1], [2, 3, 4]):  # whoever reads a row decides the same
        part = batches(Named(0, 10, bad=bad), 5, 0, rows, damaged_share=0.2)
        np.testing.assert_array_equal(take(part, 8), found.reshape(8, 5)[:, rows])


def test_damage_ends_a_run_that_allows_less_of_it(warned):
    def said(error=FileError, **options):
        with pytest.raises(error) as caught:
            take(batches(Named(0, 10, bad={3, 8}, error=error), 5, seed=0, **options), 2)
        return str(caught.value)

    assert said() in ("example 3 of 'here' is damaged", "example 8 of 'here' is damaged")
    assert said(damaged_share=0.1).endswith("is damaged; data.damaged_share=0.1 allows no more")
    said(PassingError, damaged_share=0.5)  # which is no damage


def test_worker_processes_give_the_same_batches_and_have_one_count_of_damage(tmp_path, warned):
    flags.FLAGS.mark_as_parsed()  # as commands have them: grain's workers read some
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((9, 4, 8)).astype(np.float16)
    rows = [LatentRecord(x, str(i), f"{i}.png", x[:3], x[0]) for i, x in enumerate(latents)]
    for number in (2, 7):
        rows[number] = rows[number]._replace(latents=np.full_like(latents[0], np.nan))
    null = Text(latents[:1, :3] + 1, latents[:1, 0] + 1)
    made_records.write(tmp_path / "data", rows, null=null)
    source = EmbeddedLatents(LatentRecords(tmp_path / "data", 0.3))
    expected = batches(source, 4, seed=2, damaged_share=0.3)
    expected.set_state({"examples": 8})
    found = batches(source, 4, seed=2, damaged_share=0.3, ahead=Ahead(1, 2, workers=2))
    found.set_state(expected.get_state())
    for _ in range(6):
        for a, b in zip(next(expected).text, next(found).text):
            np.testing.assert_array_equal(a, b)
    assert sorted(line.split("'")[1] for line in warned) == ["2.png"] * 2 + ["7.png"] * 2
    assert ["(1 of 9 so far)" in line for line in warned] == [True, True, False, False]
    assert all("(2 of 9 so far)" in line for line in warned[2:])


@pytest.mark.parametrize(
    ("path", "weights", "message"),
    [
        ("a,b", (1.0,), "data.weights: 1 for 2 folders of data.path; give one for each"),
        ("a", (1.0, 2.0), "data.weights: 2 for 1 folder of data.path; give one for each"),
        ("a,,b", (1.0,) * 3, "data.path: 'a,,b' has no name beside a comma; take the comma away"),
        ("a, ./a", (1.0, 1.0), "data.path: './a' is given twice; give it once"),
    ],
)
def test_folders_and_weights_that_do_not_fit_are_refused(path, weights, message):
    with pytest.raises(ValueError) as error:
        folders.weighed(path, weights)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("weights", (1.0, -1.0), "data.weights: (1.0, -1.0) is not a list of positive numbers"),
        ("weights", (0.0,), "data.weights: (0.0,) is not a list of positive numbers"),
        ("caption_dropout", 1.0, "data.caption_dropout: 1.0 is not at least 0 and less than 1"),
        ("damaged", "pass", "data.damaged: 'pass' is not one of fail, skip"),
        ("damaged_share", 1.1, "data.damaged_share: 1.1 is not from 0 to 1"),
        ("threads", 0, "data.threads: 0 is not positive"),
        ("workers", -1, "data.workers: -1 is not zero or more"),
    ],
)
def test_settings_out_of_range_are_refused(key, value, message):
    config = base()
    config.name, config.objective.name = "x", "flow_matching"
    config.data[key] = value
    with pytest.raises(ConfigError) as error:
        check_config(config.to_dict())
    assert str(error.value) == message

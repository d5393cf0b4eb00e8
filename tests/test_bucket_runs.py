"""Runs in a bucket: what is saved, logged and read there is what a disk gives back."""

import json
import tempfile

import jax
import made_records
import numpy as np
import plain_encoders
import pytest
from PIL import Image
from test_checkpoint import player, same, state_at

from jax_distill.data import shards
from jax_distill.data.identity import identity
from jax_distill.data.records import LatentRecords
from jax_distill.data.sources.opening import open_source
from jax_distill.interop import ported_folder
from jax_distill.runs import stored_network
from jax_distill.storage import buckets, contents, outputs, paths
from jax_distill.training import checkpoint
from jax_distill.training.checkpoint import Checkpoints
from jax_distill.training.progress import METRICS, Report


def latest(workdir):
    with Checkpoints(workdir / "checkpoints", keep=3) as checkpoints:
        return checkpoints.restore_latest(state_at(0))


def save(workdir, *steps):
    with Checkpoints(workdir / "checkpoints", keep=3) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_at(step), {"next_index": step})


def test_checkpoints_come_back_and_half_ones_do_not_count(bucket, faults):
    faults.next = ["unavailable", "lost_answer", "cut_write", "cut_read"]
    save(bucket, 1, 2, 3)
    step, saved = latest(bucket)
    assert step == 3 and same(saved.state, state_at(3)) and saved.position == {"next_index": 3}
    assert same(checkpoint.load_averaged(bucket), player(state_at(3)).ema)

    half = bucket / "checkpoints" / "3"
    (half / "commit_success.txt").unlink()  # written last: a process that dies before leaves this
    assert checkpoint.complete_steps(bucket) == [2, 1] and latest(bucket)[0] == 2
    save(bucket, 3)
    assert same(latest(bucket)[1].state, state_at(3))


def test_a_damaged_checkpoint_is_set_aside(bucket):
    save(bucket, 1, 2)
    folder = bucket / "checkpoints"
    largest = max(buckets.objects(folder / "2" / "state" / "ocdbt.process_0"), key=paths.size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 3] ^= 4
    largest.write_bytes(bytes(content))
    step, saved = latest(bucket)
    assert step == 1 and same(saved.state, state_at(1))
    names = {path.relative_to(folder).parts[0] for path in buckets.objects(folder)}
    assert names == {"1", "damaged-2"}
    aside = folder / "damaged-2" / largest.relative_to(folder / "2")
    assert aside.read_bytes() == bytes(content)


def test_metrics_are_there_with_the_checkpoint_and_go_on(bucket):
    def write(report, step):
        report.add({"loss": float(step)})
        report.write(step, {})

    for start, flushed in ((0, True), (2, False)):
        report = Report(bucket, total=9, batch_size=1)
        report.begin(start, {})
        report._next_copy = float("inf")
        for step in range(start + 1, start + 3):
            write(report, step)
        if flushed:
            report.flush()
        write(report, start + 3)  # of a step that will be taken again
        if not flushed:
            report.close()
    lines = [json.loads(line) for line in (bucket / METRICS).read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(n, n) for n in range(1, 6)]
    assert any(path.name.startswith("events.out") for path in buckets.objects(bucket))


def test_records_are_read_from_the_bucket(bucket, faults, tmp_path):
    rng = np.random.default_rng(0)
    written = made_records.some(40)
    made_records.write(tmp_path / "data", written, shard_records=10)
    with outputs.made_whole(bucket / "data") as partial:
        made_records.write(partial, written, shard_records=10)
    faults.next = ["cut_read", "unavailable"]
    read = LatentRecords(str(bucket / "data"))
    for index in rng.permutation(len(written)):
        assert read[int(index)].caption == written[index].caption
        np.testing.assert_array_equal(read[int(index)].latents, written[index].latents)
    assert identity(bucket / "data") == identity(tmp_path / "data")
    missing = bucket / "data" / read.description["shards"]["latents"][1]["name"]
    missing.unlink()
    with pytest.raises(ValueError, match=f"'{missing}' is missing"):
        LatentRecords(bucket / "data")


def test_data_made_in_a_bucket_goes_on_from_its_shards(bucket, faults, tmp_path, monkeypatch):
    """Each try is killed at another shard, and of another host: nothing is left but the bucket."""
    (tmp_path / "pictures").mkdir()
    for number in range(5):
        Image.new("RGB", (24, 16), (number, 0, 0)).save(tmp_path / "pictures" / f"{number}.png")
        (tmp_path / "pictures" / f"{number}.txt").write_text(f"caption {number % 3}")
    source, write = open_source([str(tmp_path / "pictures")]), shards.write_shard
    with outputs.made_in_tries(tmp_path / "disk") as folder:
        plain_encoders.prepare(source, folder)
    faults.next = ["unavailable", "cut_write"]
    output = bucket / "data"

    def killed(*arguments):
        write(*arguments)
        raise KeyboardInterrupt

    for number in range(2):  # of captions, and of latents
        (tmp_path / f"host{number}").mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / f"host{number}"))
        monkeypatch.setattr(shards, "write_shard", killed)
        with pytest.raises(KeyboardInterrupt), outputs.made_in_tries(output) as folder:
            plain_encoders.prepare(source, folder)
        assert sum(path.suffix == ".array_record" for path in contents.files(output)) == number + 1
        with pytest.raises(ValueError, match="is half made"):
            LatentRecords(output)
    monkeypatch.setattr(shards, "write_shard", None)  # nothing is left to write
    with outputs.made_in_tries(output) as folder:
        plain_encoders.prepare(source, folder)
    found, disk = (
        {path.name: path.read_bytes() for path in contents.files(folder)}
        for folder in (output, tmp_path / "disk")
    )
    assert found == disk
    assert not any(list((tmp_path / f"host{number}").iterdir()) for number in range(2))


@pytest.mark.slow
def test_a_ported_folder_is_read_as_on_a_disk(bucket, tmp_path):
    import random_pipeline

    from jax_distill.runs.porting import port
    from jax_distill.worlds.flux.tokenizers import FluxTokenizer

    random_pipeline.save_random(tmp_path / "flux")
    disk = tmp_path / "ported"
    for output in (disk, bucket / "ported"):
        port(str(tmp_path / "flux"), output)
    described = ported_folder.describe(disk)
    assert ported_folder.describe(bucket / "ported") == described
    for name in described["parts"]:
        like = ported_folder.open_part(disk, name, described["parts"][name])
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), like)
        parts = [ported_folder.load_part(x, name, shapes) for x in (disk, bucket / "ported")]
        jax.tree.map(np.testing.assert_array_equal, *parts)
    trees = [stored_network.open_network(str(x)).tree for x in (disk, bucket / "ported")]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.read(), b.read()), *trees)
    tokens = [FluxTokenizer.load(x, 8).encode(["a b"]) for x in (disk, bucket / "ported")]
    jax.tree.map(np.testing.assert_array_equal, *tokens)

"""Buckets: the promises of folders, kept by objects, while the store fails as networks do."""

import json
import logging
import os
import sys
import threading
from pathlib import Path

import pytest

from jax_distill import prepare
from jax_distill.data.records import LatentRecords
from jax_distill.runs import checks, commands
from jax_distill.storage import buckets, disks, files, lease, outputs, paths
from jax_distill.storage.files import FileError

pytest.importorskip("gcsfs", reason="pip install 'jax-distill[gcs]'")


def test_addresses_stay_addresses():
    found = paths.path("gs://test/a") / "b"
    assert str(found) == "gs://test/a/b" and str(paths.absolute(found)) == "gs://test/a/b"
    assert paths.is_bucket(found) and not paths.is_bucket(paths.path("a/gs:/b"))
    assert isinstance(paths.path("runs/a"), Path) and paths.absolute("a") == Path("a").resolve()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("s3://test/a", "is an address of a kind that is not read"),
        ("https://a.b/c", "is an address of a kind that is not read"),
        ("gs:/test/a", "names no bucket; write it as gs://bucket/folder"),
        ("gs://", "names no bucket"),
    ],
)
def test_other_addresses_are_refused(address, message):
    with pytest.raises(ValueError, match=message):
        paths.path(address)


def test_without_its_package_an_address_is_refused(monkeypatch):
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs gcsfs; pip install 'jax-distill\[gcs\]'"):
        paths.path("gs://test/a")


def test_libraries_that_reach_buckets_log_nothing_of_their_own():
    paths.path("gs://test/a")
    assert not logging.getLogger("gcsfs").isEnabledFor(logging.ERROR)
    assert not logging.getLogger("fsspec").isEnabledFor(logging.INFO)


def test_captions_of_a_bucket_are_read(bucket):
    files.write_atomically(bucket / "a.txt", "a fox\n\na hen\n")
    keys, captions = prepare.read_captions(f"{bucket}/a.txt")
    assert keys == ["a.txt:1", "a.txt:3"] and captions == ["a fox", "a hen"]
    with pytest.raises(ValueError, match="^--captions: 'gs://.*/no.txt' is missing"):
        prepare.read_captions(f"{bucket}/no.txt")
    with pytest.raises(ValueError, match="^--captions: 's3://a/b' is an address of a kind that"):
        prepare.read_captions("s3://a/b")


def test_files_are_written_and_read_as_on_a_disk(bucket, faults):
    faults.next = ["cut_write", "unavailable", "lost_answer"]
    files.write_json(bucket / "a.json", {"x": [1, 2]})
    faults.next = ["cut_read", "unavailable"]
    assert files.read_json(bucket / "a.json") == {"x": [1, 2]}
    files.write_atomically(bucket / "lines", "ä\r\nb\n")
    assert list(files.read_lines(bucket / "lines")) == [(1, "ä"), (2, "b")]
    with pytest.raises(FileNotFoundError):
        files.read_text(bucket / "none")
    with pytest.raises(FileError, match="is no regular file"):
        files.read_text(bucket)


def test_any_bytes_come_back(bucket):
    content = bytes(range(256)) * 3 + b"\r\n--==0==\r\n\r"
    files.write_atomically(bucket / "bytes", content)
    assert (bucket / "bytes").read_bytes() == content


def test_the_answer_to_the_end_of_an_upload_in_parts_may_be_lost(bucket, faults):
    content = os.urandom(6 * 2**20)
    with (bucket / "large").open("wb") as file:
        file.write(content)
        faults.next = ["lost_answer"]
    assert (bucket / "large").read_bytes() == content


def test_a_store_that_does_not_answer_is_named_and_is_no_damage(bucket, faults, monkeypatch):
    files.write_json(bucket / "a.json", {})
    faults.next = ["unavailable"] * 100
    with pytest.raises(Exception) as caught:
        files.read_json(bucket / "a.json")
    faults.next = []
    assert disks.passing(caught.value) and disks.of_network(caught.value)
    assert files.unread("'a'", caught.value) is not None
    monkeypatch.setattr(sys, "argv", ["main"])
    assert commands.explain(caught.value).startswith("the bucket: ")
    of_tensorstore = ValueError("Error reading gs://test/a: UNAVAILABLE: no answer")
    assert commands.explain(of_tensorstore).startswith("the bucket: ")
    unread = files.unread("'a'", caught.value)
    unread.__cause__ = caught.value
    assert commands.explain(unread) == str(unread) and str(unread).startswith("'a' cannot be read")
    monkeypatch.setattr(sys, "argv", ["main", "--config.data.path=gs://test/a", "--seed=1"])
    told = commands.explain(caught.value)
    assert told.startswith("the bucket (--config.data.path=gs://test/a): ")
    faults.next = ["unavailable"] * 100
    with pytest.raises(type(caught.value)):  # and does not say that nothing is there
        (bucket / "a.json").exists()
    faults.next = []


def test_an_object_is_replaced_only_as_it_was_seen(bucket, faults):
    path = bucket / "a"
    faults.next = ["lost_answer"]  # the second try finds what the first has written
    first = buckets.put(path, b"one", buckets.NEW)
    assert first and buckets.put(path, b"two", buckets.NEW) is None
    assert buckets.look(path)[:2] == (b"one", first) and buckets.look(path).silent < 60
    second = buckets.put(path, b"two", first)
    assert second and buckets.put(path, b"three", first) is None
    buckets.remove(path, first)
    assert buckets.look(path).content == b"two"
    buckets.remove(path, second)
    assert buckets.look(path) is None


def test_a_lease_is_held_by_one_and_given_back(bucket, faults):
    with lease.of_folder(bucket), lease.of_folder(bucket):
        held = buckets.look(bucket / lease.NAME)
        assert json.loads(held.content)["pid"] == os.getpid()
        other = lease._OnBucket(bucket / lease.NAME)
        other._object._content += b" "
        with pytest.raises(lease.InUse, match=f"is in use by process {os.getpid()}"):
            other.take("--workdir", "wait")
    assert buckets.look(bucket / lease.NAME) is None


def holder(**changes):
    own = {**lease._own(), "pid": 2**22 + 1, "process_started": "1", **changes}
    return (json.dumps(own) + "\n").encode()


def test_the_lease_of_a_dead_process_is_taken_over(bucket, monkeypatch):
    path = bucket / lease.NAME
    buckets.put(path, holder(), buckets.NEW)
    with lease.of_folder(bucket):
        assert json.loads(buckets.look(path).content)["pid"] == os.getpid()
    for content in (holder(host="elsewhere"), b"{"):
        buckets.put(path, content, buckets.NEW)
        with pytest.raises(lease.InUse, match="its lease ends after 180 s"):
            with lease.of_folder(bucket):
                pass
        with monkeypatch.context() as patch:
            patch.setattr(lease, "LIMIT", -60.0)
            with lease.of_folder(bucket):
                pass
        assert buckets.look(path) is None


def test_of_many_that_find_a_dead_lease_one_takes_it(bucket):
    path = bucket / lease.NAME
    buckets.put(path, holder(), buckets.NEW)
    begin, taken = threading.Barrier(4), []

    def take(number):
        own = lease._OnBucket(path)
        own._object._content = own._object._content.replace(b"}", b', "n": %d}' % number)
        begin.wait()
        try:
            own.take("--workdir", "wait")
            taken.append(number)
        except lease.InUse:
            pass

    threads = [threading.Thread(target=take, args=(number,)) for number in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(taken) == 1


def test_a_lease_is_renewed_and_its_loss_is_noticed(bucket, faults):
    own = lease._OnBucket(bucket / lease.NAME)
    own.take("--workdir", "wait")
    faults.next = ["lost_answer"]
    assert own.renew() and own.renew()
    buckets.remove(bucket / lease.NAME, buckets.look(bucket / lease.NAME).generation)
    assert own.renew()  # removed by hand
    seen = buckets.look(bucket / lease.NAME)
    other = holder(host="elsewhere")
    buckets.put(bucket / lease.NAME, other, seen.generation)
    assert not own.renew()
    own.give_back()
    assert buckets.look(bucket / lease.NAME).content == other


def filled(partial):
    (partial / "network").mkdir()
    (partial / "network" / "weights").write_bytes(os.urandom(1000))
    (partial / "ported.json").write_text("{}")


def test_a_folder_is_there_once_it_is_whole(bucket, faults):
    out = bucket / "out"
    faults.next = ["cut_write", "lost_answer", "unavailable"]
    with outputs.made_whole(out) as partial:
        filled(partial)
        assert not out.exists()
    names = [str(path.relative_to(out)) for path in buckets.objects(out)]
    assert names == ["network/weights", "ported.json"]
    with pytest.raises(FileError, match="exists; remove it"):
        outputs.check_absent(out)


def test_half_a_folder_is_refused_and_made_again(bucket, monkeypatch):
    out, sent = bucket / "out", []
    monkeypatch.setattr(buckets, "_md5", lambda file: sent.append(file.name) or "another")
    with pytest.raises(OSError, match="is not what was written"):
        with outputs.made_whole(out) as partial:
            filled(partial)
    assert sent == ["weights"]  # and the description never
    monkeypatch.undo()
    for name, read in {
        "data.path": LatentRecords,
        "--source": lambda path: files.check_no_partial(path, "--source"),
    }.items():
        with pytest.raises(FileError, match=f"^{name}: '{out}' is half made"):
            read(str(out))
    with outputs.made_whole(out) as partial:
        (partial / "README.md").write_text("other")
    assert [path.name for path in buckets.objects(out)] == ["README.md"]


def test_a_missing_bucket_is_named(bucket):
    with pytest.raises(FileError, match="there is no bucket 'nowhere'"):
        outputs.check_absent(paths.path("gs://nowhere/x"))
    with pytest.raises(ValueError, match="^--workdir: 'gs://nowhere/x': there is no bucket"):
        checks.check_workdir(paths.path("gs://nowhere/x"))
    with pytest.raises(FileError, match="^--output: 'gs://nowhere/x.png' cannot be written"):
        outputs.check_output("gs://nowhere/x.png", (".png",))
    outputs.check_output(bucket / "x.png", (".png",))
    assert not buckets.objects(bucket)


def test_a_folder_is_moved_and_copied_to_a_disk(bucket):
    files.write_atomically(bucket / "a" / "b" / "c", "c")
    files.write_atomically(bucket / "a" / "d", "d")
    buckets.move(bucket / "a", bucket / "e")
    assert [str(path.relative_to(bucket)) for path in buckets.objects(bucket)] == ["e/b/c", "e/d"]
    with buckets.on_disk(bucket / "e") as copy:
        assert (copy / "b" / "c").read_text() == "c" and copy.name == "e"
    buckets.remove_folder(bucket)
    assert not bucket.exists()

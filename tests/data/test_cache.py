"""The cache of decoded images."""

import os
import shutil

import numpy as np
import pytest

from segtrain.data.cache import Decoded
from segtrain.data.labels import published_table
from segtrain.data.loader import TrainingData, read_pixels
from segtrain.data.sampling import class_index
from segtrain.data.verify.file_facts import HEAD, FileFacts
from segtrain.errors import UsageError
from tests.helpers.samples import augmentation, picture, rare, steps, training_data


def cached(tmp_path, samples):
    told = []
    decoded = Decoded(tmp_path / "cache" / "decoded")
    decoded.build(samples, FileFacts(tmp_path / "cache", samples), told.append)
    return decoded, told


def test_the_cache_gives_the_same_pixels_and_notices_changes(tmp_path):
    samples = rare(tmp_path)
    decoded, told = cached(tmp_path, samples)
    assert "0.00 GB will be written" in told[0]
    for sample in samples:
        for found, expected in zip(decoded(sample), read_pixels(sample), strict=True):
            assert isinstance(found, np.memmap)
            assert (found == expected).all()
    assert cached(tmp_path, samples)[1] == [f"cache      {tmp_path}/cache/decoded: all images are decoded already"]
    picture(samples[3].image, 99, size=(64, 96))
    os.utime(samples[3].image, ns=(1, 1))
    assert (decoded(samples[3])[0] == 99).all()


def test_what_a_killed_process_left_half_written_goes_after_a_day(tmp_path):
    samples = rare(tmp_path)
    decoded, _ = cached(tmp_path, samples)
    old, young = (decoded.folder / name for name in (".a.npy.0123.tmp", ".b.npy.4567.tmp"))
    for path in (old, young):
        path.touch()
    os.utime(old, (1, 1))
    cached(tmp_path, samples)
    assert young.exists() and not old.exists()


def test_training_data_is_the_same_with_the_cache(scenes, tmp_path):
    plain = training_data(scenes)
    decoded, _ = cached(tmp_path, plain.samples)
    fast = TrainingData(plain.samples, plain.table, plain.augmentation, plain.seed, decoded)
    assert steps(fast, 0, 2, workers=2) == steps(plain, 0, 2, workers=0)


def test_class_uniform_sampling_reads_the_cache_too(tmp_path):
    samples, table = rare(tmp_path), published_table("cityscapes")
    index = class_index(samples, table, FileFacts(tmp_path / "cache", samples))
    both = [TrainingData(samples, table, augmentation(), 0, read, index, 1.0)
            for read in (read_pixels, cached(tmp_path, samples)[0])]  # fmt: skip
    for position in range(20):
        (first, second, *_), (again, labels, *_) = (data[position] for data in both)
        assert (first == again).all()
        assert (second == labels).all()


def test_a_cache_that_does_not_fit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**9))
    with pytest.raises(UsageError, match=r"dataset\.cache=decoded needs .*dataset\.cache_dir"):
        cached(tmp_path, rare(tmp_path))


GARBAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_bytes(b"garbage"),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "other numbers": lambda path: np.save(path, np.zeros((4, 4, 3), np.float32)),
    "other axes": lambda path: np.save(path, np.zeros(7, np.uint8)),
    "archive": lambda path: np.savez(path.open("wb"), a=np.zeros(7, np.uint8)),
    "objects": lambda path: np.save(path, np.array([{}]), allow_pickle=True),
}


@pytest.mark.parametrize("damage", GARBAGE.values(), ids=GARBAGE)
def test_a_damaged_file_of_the_cache_is_decoded_again(tmp_path, damage, capsys):
    samples = rare(tmp_path)
    decoded, _ = cached(tmp_path, samples)
    places = [decoded.place(path) for path in (samples[0].image, samples[0].label)]
    for place in places:
        damage(place)
    for found, expected in zip(decoded(samples[0]), read_pixels(samples[0]), strict=True):
        assert (found == expected).all()
    told = capsys.readouterr().out
    assert all(f"damaged    {place} holds no decoded image" in told for place in places)
    decoded(samples[0])
    assert capsys.readouterr().out == ""


def test_a_cache_on_a_full_disk_costs_the_time_only(tmp_path, monkeypatch, capsys):
    def full(path, data):
        raise OSError(28, "No space left on device", str(path))

    samples = rare(tmp_path)
    monkeypatch.setattr("segtrain.data.cache.write_atomically", full)
    monkeypatch.setattr("segtrain.files.warned", {})
    decoded, _ = cached(tmp_path, samples)
    for found, expected in zip(decoded(samples[0]), read_pixels(samples[0]), strict=True):
        assert (found == expected).all()
    assert capsys.readouterr().out.count("WARNING    cannot write ") == 1  # not one a file


@pytest.mark.parametrize(
    "content", ["", "garbage", "HEAD", "HEAD\n\t\n", "HEADx\tNAME\n", "HEADSTAMP \tNAME\n", "HEADSTAMP 5\tNAME\n",
                "HEADSTAMP " + "[" * 100000 + "\tNAME\n", "HEADSTAMP {}\tNAME", "HEAD\udcff\udcff\tNAME\n",
                'HEADSTAMP {"decoded": "big", "histogram": [[300, 1]]}\tNAME\n',
                'HEADSTAMP {"decoded": [1,2,9], "histogram": {"a": 1}}\tNAME\n'],
)  # fmt: skip
def test_damaged_facts_about_files_are_found_again(tmp_path, content):
    samples = rare(tmp_path)
    known = FileFacts(tmp_path, samples)
    expected = known.sample(samples[0])
    name, stamp, _ = known.entry(samples[0].label)
    content = content.replace("HEAD", HEAD).replace("STAMP", stamp).replace("NAME", name)
    known.path.write_bytes(os.fsencode(content))
    size, histogram = FileFacts(tmp_path, samples).sample(samples[0])
    assert size == expected[0] and (histogram == expected[1]).all()


def test_facts_about_files_of_other_samples_stay(tmp_path):
    """Two splits in one folder share a file of facts; a further image costs no other one's decoding."""
    samples = rare(tmp_path)
    first, second = FileFacts(tmp_path, samples[:2]), FileFacts(tmp_path, samples)
    assert first.path == second.path
    for facts, some in ((first, samples[:2]), (second, samples[1:])):
        for sample in some:
            facts.sample(sample)
        facts.save()
    again = FileFacts(tmp_path, samples)
    assert all(again.known.values())
    before = again.path.stat().st_ino
    again.sample(samples[0])
    again.save()  # nothing new: it is not written again
    assert again.path.stat().st_ino == before

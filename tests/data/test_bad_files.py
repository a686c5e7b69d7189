"""Damaged files are found at the start, photographs with a film behind them are none, and no pipe is waited for."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from segtrain.data import images
from segtrain.data.images import read_header, read_image
from segtrain.data.label_files import read_label
from segtrain.data.sample import Sample
from segtrain.data.verify import file_facts
from segtrain.data.verify.file_facts import FileFacts, examine_file
from segtrain.errors import DataError
from tests.helpers.runs import refused


def noise(size=(64, 96, 3)):
    return np.random.default_rng(0).integers(0, 255, size, dtype=np.uint8)


def encoded(pixels, kind):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def with_other_data(png, change):
    """The PNG with its compressed pixels changed, and every checksum right."""
    place, parts = 8, [png[:8]]
    while place < len(png):
        length = int.from_bytes(png[place : place + 4], "big")
        name, data = png[place + 4 : place + 8], png[place + 8 : place + 8 + length]
        if name == b"IDAT":
            data = change(data)
        parts.append(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)))
        place += 12 + length
    return b"".join(parts)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:5] + bytes(byte ^ 0x55 for byte in data[5:15]) + data[15:],
        lambda data: zlib.compress(zlib.decompress(data)[:500]),
        lambda data: data[: len(data) // 2],
        lambda data: data[:-4] + bytes(4),
        lambda data: b"",
    ],
    ids=["flipped", "too few pixels", "cut", "checksum of the stream", "none"],
)
def test_a_png_with_good_checksums_and_bad_data_stops_the_start(folder_data, segtrain, change):
    root, overrides = folder_data
    for kind in ("images", "labels"):
        path = root / "train" / kind / "p2.png"
        good = path.read_bytes()
        path.write_bytes(with_other_data(encoded(noise(), "PNG") if kind == "images" else good, change))
        refused(segtrain("train", *overrides), f"{kind}/p2.png cannot be read", status=1)
        refused(segtrain("check", *overrides[:5]), f"{kind}/p2.png cannot be read", status=1)
        path.write_bytes(good)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_photograph_with_a_film_behind_it_is_read(tmp_path, progressive):
    buffer, thumbnail = io.BytesIO(), encoded(noise((16, 16, 3)), "JPEG")  # which has an end mark of its own
    Image.fromarray(noise()).save(buffer, "JPEG", progressive=progressive, exif=b"Exif\0\0" + thumbnail)
    photo = buffer.getvalue()
    (tmp_path / "plain.jpg").write_bytes(photo)
    (tmp_path / "motion.jpg").write_bytes(photo + b"\x00\x00\x00\x18ftypmp42" + bytes(5000))
    assert examine_file(tmp_path / "motion.jpg") == (64, 96, 1)
    np.testing.assert_array_equal(read_image(tmp_path / "motion.jpg"), read_image(tmp_path / "plain.jpg"))
    for name, half in (("half.jpg", photo[: len(photo) // 2]), ("film.jpg", photo[: len(photo) // 2] + bytes(5000))):
        (tmp_path / name).write_bytes(half)
        for read in (examine_file, read_image):
            with pytest.raises(DataError, match=f"{name} cannot be read as an image"):
                read(tmp_path / name)


def test_a_pipe_is_not_waited_for(folder_data, segtrain, tmp_path):
    root, overrides = folder_data
    os.mkfifo(tmp_path / "pipe.png")
    for read in (examine_file, read_image, read_label, read_header):
        with pytest.raises(DataError, match="pipe.png cannot be read as an image .it is no regular file"):
            read(tmp_path / "pipe.png")
    for kind in ("images", "labels"):
        os.mkfifo(root / "train" / kind / "pipe.png")
    assert segtrain("check", *overrides[:5]).status in (0, 1)  # a pattern lists regular files only
    assert segtrain("check", "dataset=folder", f"dataset.root={root}", "write_config=a.yaml").status in (0, 1)


def test_what_a_file_claims_to_be_is_not_believed(tmp_path):
    png = encoded(np.zeros((4, 4), np.uint8), "PNG")
    size = struct.pack(">II", 100_000, 100_000)
    head = b"IHDR" + size + png[24:29]
    (tmp_path / "large.png").write_bytes(png[:12] + head + struct.pack(">I", zlib.crc32(head)) + png[33:])
    for read in (examine_file, read_label, read_image):
        with pytest.raises(DataError, match="large.png cannot be read as an image"):
            read(tmp_path / "large.png")


def test_a_file_with_known_content_is_not_decoded_again(tmp_path, monkeypatch):
    """The content is known of what `segtrain check` has hashed; without that a touched file is decoded again."""
    path, other = tmp_path / "a.png", tmp_path / "b.png"
    path.write_bytes(encoded(noise(), "PNG"))
    samples, calls = [Sample("a", path, None)], []
    examine, hashed = file_facts.examine_bytes, file_facts.hashed
    monkeypatch.setattr(file_facts, "examine_bytes", lambda data, path: calls.append(path.name) or examine(data, path))
    monkeypatch.setattr(file_facts, "hashed", lambda path: calls.append("hash") or hashed(path))

    def checked(samples, hashing=False):
        calls.clear()
        facts = FileFacts(tmp_path / "cache", samples)
        assert [facts.size(sample.image) for sample in samples] == [(64, 96)] * len(samples)
        if hashing:
            assert len({facts.content(sample.image) for sample in samples}) == 1
        facts.save()
        return list(calls)

    assert checked(samples) == ["a.png"]
    assert checked(samples) == []
    os.utime(path, (1, 1))
    assert checked(samples) == ["a.png"]
    assert checked(samples, hashing=True) == ["hash"]
    assert checked(samples, hashing=True) == []
    os.utime(path, (2, 2))
    assert checked(samples) == ["hash"]
    path.write_bytes(encoded(noise() // 2, "PNG"))
    assert checked(samples, hashing=True) == ["hash", "a.png", "hash"]
    other.write_bytes(path.read_bytes())
    assert checked([*samples, Sample("b", other, None)]) == ["hash"]
    path.unlink()
    other.rename(path)  # another inode, whatever its time and size
    assert checked(samples) == ["hash"]


def test_what_pillow_raises_is_known(tmp_path, monkeypatch):
    """Decoders raise what they stumble over."""
    path = tmp_path / "a.png"
    path.write_bytes(encoded(noise(), "PNG"))
    for error in (struct.error("x"), IndexError("x"), KeyError("x"), EOFError("x"), OverflowError("x"), TypeError("x")):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(images.Image, "open", fail)
        with pytest.raises(DataError, match=r"a\.png cannot be read"):
            read_label(path)
        monkeypatch.undo()

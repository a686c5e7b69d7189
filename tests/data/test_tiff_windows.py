"""Windows of TIFF files: the pixels of the whole image to the last bit, and tiled files that are written in parts."""

import json
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from segtrain.data import tiff_windows, tiff_writer
from segtrain.data.bands import read_channels
from segtrain.data.images import read_image
from segtrain.data.orientation import turned
from segtrain.data.tiff_windows import Entry, TiffWindows, stored_form
from segtrain.data.tiff_writer import TiledWriter
from segtrain.errors import DataError

VALUES = np.random.default_rng(0).integers(0, 65536, (77, 90, 4), np.uint16)
BYTES = (VALUES >> 8).astype(np.uint8)
OF_TYPE = {"uint8": BYTES, "uint16": VALUES, "float32": BYTES / np.float32(255)}
FORMS = [
    {}, {"tile": (16, 32)}, {"compression": "zlib", "rowsperstrip": 7}, {"byteorder": ">", "rowsperstrip": 5},
    {"planarconfig": "separate", "tile": (16, 16), "compression": "zlib"}, {"planarconfig": "separate"},
    {"bigtiff": True, "tile": (32, 16)}, {"bigtiff": True, "byteorder": ">", "tile": (32, 16), "compression": "zlib"},
]  # fmt: skip


def same_as_whole(path, channels=None, value_range=None):
    whole = read_channels(path, channels, value_range, exif="apply")
    with TiffWindows(path, channels, value_range) as image:
        assert image.size == whole.shape[:2]
        for top, bottom in ((0, 7), (5, 40), (33, image.size[0]), (0, image.size[0])):
            assert np.array_equal(image.band(top, bottom), whole[top:bottom])
    return whole


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("kind", OF_TYPE)
def test_bands_of_every_form(tmp_path, form, kind):
    values, separate = OF_TYPE[kind], form.get("planarconfig") == "separate"
    options = {"planarconfig": "contig", **form, "photometric": "minisblack"}
    tifffile.imwrite(tmp_path / "x.tif", values.transpose(2, 0, 1) if separate else values, **options)
    if form.get("bigtiff") and form.get("byteorder"):  # Pillow reads the tags of no such file, so that nothing else can
        with TiffWindows(tmp_path / "x.tif", (3, 0)) as image:
            assert np.array_equal(image.band(3, 50), BYTES[3:50, :, [3, 0]])
        return
    assert np.array_equal(same_as_whole(tmp_path / "x.tif", (3, 0)), BYTES[..., [3, 0]])
    with TiffWindows(tmp_path / "x.tif", (4,)) as image, pytest.raises(DataError, match=r"4 bands, .* asks for 4"):
        image.band(0, 5)


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("kind", ["uint8", "uint16"])
def test_images_that_are_turned(tmp_path, tag, kind):
    """Also decoded whole, where OpenCV mirrors each tile of 8 bits instead of the image."""
    values, more = OF_TYPE[kind][..., :3], {"extratags": [(274, 3, 1, tag, True)], "photometric": "rgb"}
    for form in ({"compression": "zlib"}, {}):
        tifffile.imwrite(tmp_path / "x.tif", values, tile=(16, 32), **form, **more)
        assert np.array_equal(read_image(tmp_path / "x.tif", exif="apply"), turned(BYTES[..., :3], tag))
        same_as_whole(tmp_path / "x.tif")
    tifffile.imwrite(tmp_path / "x.tif", values, rowsperstrip=8, **more)
    if tag < 5:
        same_as_whole(tmp_path / "x.tif")
        return
    with pytest.raises(DataError, match=rf"orientation {tag}, on its side, and is stored in strips.*gdal_translate"):
        TiffWindows(tmp_path / "x.tif")


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "1", "RGBA", "LA", "CMYK", "I;16", "F"])
def test_colours_and_compressions_of_every_kind(tmp_path, mode):
    special = {"I;16": VALUES[..., 0], "F": (VALUES[..., 0] / 65535).astype(np.float32)}
    image = Image.fromarray(special[mode].copy()) if mode in special else Image.fromarray(BYTES[..., :3]).convert(mode)
    for compression in ("raw", "tiff_lzw", "packbits", *(["jpeg"] if mode in ("L", "RGB", "CMYK") else [])):
        image.save(tmp_path / "x.tif", compression=compression, strip_size=1000)
        same_as_whole(tmp_path / "x.tif")


def test_what_is_dark_in_a_window_is_judged_by_the_whole_image(tmp_path):
    """Values that do not fill the range of their type are refused of the image, not of a window, and not by what fills
    the tiles at its edge."""
    values = np.full((60, 50), 100, np.uint16)
    values[50, 40] = 40000
    tifffile.imwrite(tmp_path / "x.tif", values, tile=(16, 16))
    assert np.unique(same_as_whole(tmp_path / "x.tif")).tolist() == [0, 156]
    values[50, 40] = 300
    tifffile.imwrite(tmp_path / "x.tif", values, tile=(16, 16))
    with TiffWindows(tmp_path / "x.tif") as image, pytest.raises(DataError, match="uint16 values from 100 to 300"):
        image.band(0, 5)
    same_as_whole(tmp_path / "x.tif", value_range=(0, 500))
    tifffile.imwrite(tmp_path / "x.tif", np.full((60, 50), np.nan, np.float32), tile=(16, 16))
    with TiffWindows(tmp_path / "x.tif") as image, pytest.raises(DataError, match="NaN"):
        image.band(0, 5)


def test_what_fills_the_tiles_at_the_edge_does_not_count(tmp_path):
    values = np.full((64, 64), np.nan, np.float32)
    values[:60, :50] = np.random.default_rng(0).random((60, 50))
    tifffile.imwrite(tmp_path / "x.tif", values, tile=(16, 16))
    with tifffile.TiffFile(tmp_path / "x.tif", mode="r+") as file:
        file.pages[0].tags["ImageLength"].overwrite(60)
        file.pages[0].tags["ImageWidth"].overwrite(50)
    for channels, value_range in ((None, None), (None, (0, 2)), ((0,), (0, 2))):
        assert same_as_whole(tmp_path / "x.tif", channels, value_range).shape[:2] == (60, 50)


def test_long_strips_are_read_in_part_or_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tiff_windows, "CUT_BLOCK", 1000)
    monkeypatch.setattr(tiff_windows, "LARGEST_BLOCK", 10000)
    tifffile.imwrite(tmp_path / "x.tif", BYTES[..., :3], rowsperstrip=77)
    same_as_whole(tmp_path / "x.tif")
    tifffile.imwrite(tmp_path / "x.tif", BYTES[..., :3].transpose(2, 0, 1), planarconfig="separate", rowsperstrip=40,
                     photometric="rgb")  # fmt: skip
    same_as_whole(tmp_path / "x.tif")
    tifffile.imwrite(tmp_path / "x.tif", BYTES[..., :3], rowsperstrip=77, compression="zlib")
    with pytest.raises(DataError, match=r"is stored in compressed strips of 90 x 77 .*`gdal_translate .* x.tif"):
        TiffWindows(tmp_path / "x.tif")
    tifffile.imwrite(tmp_path / "x.tif", BYTES[..., :3], tile=(80, 96))
    with pytest.raises(DataError, match=r"x.tif is stored in tiles of 96 x 80"):
        TiffWindows(tmp_path / "x.tif")


def test_files_that_are_damaged(tmp_path):
    path = tmp_path / "x.tif"
    tifffile.imwrite(path, BYTES[..., :3], tile=(16, 16))
    data = path.read_bytes()
    for cut in (3, 7, 100, 1000):
        path.write_bytes(data[:cut])
        assert stored_form(path) is None or cut == 1000
        with pytest.raises(DataError, match="x.tif cannot be read as an image"):
            TiffWindows(path).band(0, 77)
    path.write_bytes(data[: len(data) - 200])
    with TiffWindows(path) as image, pytest.raises(DataError, match="truncated"):
        image.band(60, 77)


def test_sizes_by_headers_alone(tmp_path):
    """Also of a PNG of more pixels than are ever decoded, and of one that its bytes are too few for."""
    head = struct.pack(">IIBBBBB", 70000, 60000, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + head
    start += struct.pack(">I", zlib.crc32(b"IHDR" + head)) + b"\0\1\0\0IDAT"
    (tmp_path / "x.png").write_bytes(start)
    assert stored_form(tmp_path / "x.png") is None
    with (tmp_path / "x.png").open("ab") as file:
        file.truncate(1 << 20)
    assert stored_form(tmp_path / "x.png") == (60000, 70000, 3 * 70000 * 60000, False)
    Image.fromarray(BYTES[..., :3]).save(tmp_path / "y.jpg")
    assert stored_form(tmp_path / "y.jpg") == (77, 90, 77 * 90 * 3, False)
    tifffile.imwrite(tmp_path / "z.tif", VALUES, photometric="minisblack", planarconfig="contig")
    assert stored_form(tmp_path / "z.tif") == (77, 90, 77 * 90 * 8, True)


# ------------------------------------------------------------------------------------------------- writing

PALETTE = np.array([[9 * i, i, 255 - i] for i in range(20)], np.uint8)
SMALL = BYTES[..., :3] % 20
GEO = {33550: Entry(12, 3, struct.pack("<3d", 0.5, 0.25, 0))}


@pytest.fixture
def tile(monkeypatch):
    monkeypatch.setattr(tiff_writer, "TILE", 32)


def writer(path, samples=1, made=None, palette=None):
    return TiledWriter(path, (77, 90), samples, made or {"by": "a"}, palette, GEO)


@pytest.mark.parametrize(("samples", "palette"), [(1, None), (3, None), (1, PALETTE)])
def test_what_is_written_in_parts_is_read_by_others(tmp_path, tile, samples, palette):
    path, pixels = tmp_path / "x.tif", SMALL if samples == 3 else SMALL[..., 0]
    for done in (0, 32, 64):
        with writer(path, samples, palette=palette) as file:
            assert file.rows == done and not path.exists()
            file.write(pixels[done : done + 32])
            if done == 64:
                file.finish()
    assert [one.name for one in tmp_path.iterdir()] == ["x.tif"]
    with tifffile.TiffFile(path) as found:
        page = found.pages[0]
        assert found.is_bigtiff and page.is_tiled and np.array_equal(page.asarray(), pixels)
        assert page.tags[33550].value == (0.5, 0.25, 0)
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), pixels)
        assert palette is None or np.array_equal(np.asarray(image.convert("RGB")), palette[pixels])


def test_a_kill_at_any_byte_costs_the_rows_that_were_not_finished(tmp_path, tile):
    path = tmp_path / "x.tif"
    with writer(path) as file:
        part, log = file.part, file.log
        for top in (0, 32):
            file.write(SMALL[top : top + 32, :, 0])
    whole, lines = part.read_bytes(), log.read_bytes()
    first, second, _ = (len(line) for line in lines.splitlines(keepends=True))
    ends = [json.loads(line)["end"] for line in lines.splitlines()[1:]]
    for size, listed, rows in (
        (len(whole), len(lines), 64), (len(whole), len(lines) - 1, 32), (ends[0], first + second, 32),
        (ends[1] - 1, len(lines), 32), (ends[0] - 1, len(lines), 0), (0, len(lines), 0), (len(whole), 0, 0),
        (len(whole), first - 2, 0),
    ):  # fmt: skip
        part.write_bytes(whole[:size])
        log.write_bytes(lines[:listed])
        with writer(path) as file:
            assert file.rows == rows
            for top in range(rows, 77, 32):
                file.write(SMALL[top : top + 32, :, 0])
            file.finish()
        assert np.array_equal(tifffile.imread(path), SMALL[..., 0])


HOLD = "import fcntl, sys; file = open(sys.argv[1], 'r+'); fcntl.lockf(file, fcntl.LOCK_EX); print(); sys.stdin.read()"


def test_two_processes_do_not_write_the_same_file(tmp_path, tile):
    path = tmp_path / "x.tif"
    with writer(path) as file:
        file.write(SMALL[:32, :, 0])
    other = [sys.executable, "-c", HOLD, str(file.part)]
    with subprocess.Popen(other, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdin is not None
        process.stdout.readline()
        with pytest.raises(DataError, match=r"another process writes .*x.tif: wait for it, or give another output="):
            writer(path)
        process.stdin.close()
    with writer(path) as file:
        assert file.rows == 32


def test_rows_of_something_else_are_not_kept(tmp_path, tile):
    path = tmp_path / "x.tif"
    with writer(path) as file:
        file.write(SMALL[:32, :, 0])
    with writer(path, made={"by": "b"}) as file:
        assert file.rows == 0
        file.write(SMALL[:32, :, 0])
        file.write(SMALL[32:64, :, 0])
        file.back_to(32)
        assert file.rows == 32
    with writer(path, made={"by": "b"}) as file:
        assert file.rows == 32

"""Images, labels and folders as other programs leave them: read as they are meant, or refused by what they are."""

import re
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from segtrain.data.folders import files_below, matching
from segtrain.data.images import read_image
from segtrain.data.label_files import read_instances, read_label
from segtrain.data.sets.folder import match_patterns
from segtrain.data.verify.file_facts import examine_file, examine_image
from segtrain.data.verify.guess import guess_splits
from segtrain.errors import DataError, UsageError


def tiff(path, values, photometric=1, bits=None, extra=None):
    """An uncompressed TIFF with one strip, by the specification's tags alone (TIFF 6.0)."""
    values = np.asarray(values)
    samples = 1 if values.ndim == 2 else values.shape[2]
    data = packed(values, bits) if bits else values.astype(values.dtype.newbyteorder("<")).tobytes()
    form = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    tags = [(256, 4, [values.shape[1]]), (257, 4, [values.shape[0]]),
            (258, 3, [bits or 8 * values.itemsize] * samples), (259, 3, [1]), (262, 3, [photometric]),
            (273, 4, [8]), (277, 3, [samples]), (278, 4, [values.shape[0]]), (279, 4, [len(data)]),
            *([(338, 3, extra)] if extra is not None else []), (339, 3, [form] * samples)]  # fmt: skip
    start = 8 + len(data) + len(data) % 2
    table, more = struct.pack("<H", len(tags)), b""
    for tag, kind, numbers in tags:
        content = struct.pack("<" + {3: "H", 4: "I"}[kind] * len(numbers), *numbers)
        if len(content) > 4:
            place = start + 2 + 12 * len(tags) + 4 + len(more)
            more, content = more + content, struct.pack("<I", place)
        table += struct.pack("<HHI", tag, kind, len(numbers)) + content.ljust(4, b"\0")
    path.write_bytes(b"II*\0" + struct.pack("<I", start) + data + b"\0" * (len(data) % 2) + table + b"\0" * 4 + more)
    return path


def packed(values, bits):
    """Rows of values of less than 8 bits, each row ending at a byte."""
    rows = ((values[..., None] >> np.arange(bits)[::-1]) & 1).reshape(len(values), -1).astype(np.uint8)
    return np.packbits(rows, axis=1).tobytes()


def grey_png(path, values, bits):
    """A greyscale PNG of 1, 2, 4 or 16 bits (PNG specification, 11.2.2)."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = [b"\0" + (packed(row[None], bits) if bits < 8 else row.astype(">u2").tobytes()) for row in values]
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"".join(rows)))
                     + chunk(b"IEND", b""))  # fmt: skip
    return path


RAMP = np.arange(24).reshape(4, 6)


# ------------------------------------------------------------------------------------------------ labels


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_labels_of_few_bits_are_read_as_stored(tmp_path, bits):
    """Pillow spreads them over 0 to 255."""
    values = RAMP.astype(np.uint8) % 2**bits
    assert (read_label(grey_png(tmp_path / "a.png", values, bits)) == values).all()
    for photometric in (0, 1):  # 0 is white, or black: what is stored is the id
        assert (read_label(tiff(tmp_path / "a.tif", values, photometric, bits)) == values).all()


def test_a_tiff_whose_zero_is_white_is_read_as_stored(tmp_path):
    values = RAMP.astype(np.uint8)
    assert (read_label(tiff(tmp_path / "a.tif", values, 0)) == values).all()


@pytest.mark.parametrize("kind", [np.int8, np.int16, np.int32])
@pytest.mark.parametrize("value", [-1, -100, -256, -32768])
def test_a_negative_label_is_refused_by_its_own_number(tmp_path, kind, value):
    if value < np.iinfo(kind).min:
        value = -3
    values = RAMP.astype(kind)
    values[1, 2] = value
    with pytest.raises(DataError, match=rf"a\.tif holds values from {value} to 23: give images with one class id"):
        read_label(tiff(tmp_path / "a.tif", values))


def test_signed_labels_within_range_are_read(tmp_path):
    for kind in (np.int8, np.int16, np.int32, np.uint16):
        assert (read_label(tiff(tmp_path / "a.tif", RAMP.astype(kind))) == RAMP).all()


def test_wide_labels_are_refused(tmp_path):
    with pytest.raises(DataError, match="16-bit image with values up to 300: this looks like an instance map"):
        read_label(grey_png(tmp_path / "a.png", RAMP.astype(np.uint16) + 277, 16))
    with pytest.raises(DataError, match="holds values from 0 to 70023"):
        read_instances(tiff(tmp_path / "a.tif", np.where(RAMP, RAMP + 70000, 0).astype(np.int32)))


@pytest.mark.parametrize(("mode", "words"), [("F", "holds floating-point numbers"), ("LA", "has transparency")])
def test_other_labels_are_named_by_what_they_are(tmp_path, mode, words):
    path = tmp_path / ("a.tif" if mode == "F" else "a.png")
    Image.new(mode, (4, 4)).save(path)
    with pytest.raises(DataError, match=rf"{words}.* but a label image holds one class id per pixel"):
        read_label(path)


def test_a_jpeg_is_no_label_image(tmp_path):
    Image.fromarray(RAMP.astype(np.uint8)).save(tmp_path / "a.jpg")
    with pytest.raises(DataError, match="is a JPEG, whose compression changes the class of many pixels"):
        read_label(tmp_path / "a.jpg")


# ------------------------------------------------------------------------------------------------ images


def full(kind):
    return np.linspace(0, np.iinfo(kind).max, 24).reshape(4, 6).astype(kind)


def test_sixteen_bits_keep_their_upper_eight(tmp_path):
    values = full(np.uint16)
    wanted = np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2)
    assert (read_image(grey_png(tmp_path / "a.png", values, 16)) == wanted).all()
    assert (read_image(tiff(tmp_path / "a.tif", values)) == wanted).all()
    colour = np.stack([values, values[::-1], values // 2], axis=-1)
    assert (read_image(tiff(tmp_path / "b.tif", colour, 2)) == colour >> 8).all()
    cv2.imwrite(str(tmp_path / "b.png"), colour[..., ::-1])
    assert (read_image(tmp_path / "b.png") == colour >> 8).all()


def test_floats_from_0_to_1_fill_8_bits(tmp_path):
    values = np.linspace(0, 1, 24).reshape(4, 6).astype(np.float32)
    wanted = np.rint(255 * values.astype(np.float64)).astype(np.uint8)
    for kind in (np.float32, np.float64):
        assert (read_image(tiff(tmp_path / "a.tif", values.astype(kind)))[..., 1] == wanted).all()


@pytest.mark.parametrize(
    ("values", "remedy"),
    [
        (full(np.uint16) >> 4, "dataset.value_range=[0,4095]"),
        (np.linspace(0, 3.5, 24).reshape(4, 6).astype(np.float32), "dataset.value_range=[0,3.5]"),
        (np.linspace(-1, 1, 24).reshape(4, 6).astype(np.float32), "dataset.value_range=[-1,1]"),
        (RAMP.astype(np.int16), "dataset.value_range=[0,23]"),
    ],
    ids=["12 bits", "beyond 1", "below 0", "signed"],
)
def test_values_that_do_not_fill_their_type_are_refused_with_the_remedy(tmp_path, values, remedy):
    """In silence they would become nearly black, or be cut off."""
    path = tiff(tmp_path / "a.tif", values)
    with pytest.raises(DataError) as caught:
        read_image(path)
    with pytest.raises(DataError, match=re.escape(str(caught.value))):
        examine_image(path, None)
    assert str(path) in str(caught.value) and str(caught.value).endswith(remedy)
    low, high = map(float, remedy.partition("[")[2].rstrip("]").split(","))
    assert examine_image(path, (low, high)) == [4, 6, 1]
    found = read_image(path, (low, high))[..., 0].astype(int)
    assert found.min() == 0 and found.max() == 255
    exact = 255 * (values.astype(np.float64) - low) / (high - low)
    assert np.abs(found - exact).max() <= 1  # integers are floored, so that 16 bits keep their upper eight


def test_values_beyond_a_given_range_are_cut_off(tmp_path):
    values = full(np.uint16) >> 4
    found = read_image(tiff(tmp_path / "a.tif", values), (100, 1123))[..., 0]
    assert (found == np.clip((values.astype(int) - 100) // 4, 0, 255)).all()


def test_no_number_is_refused(tmp_path):
    values = np.full((4, 6), 0.5, np.float32)
    values[0, 0] = np.nan
    with pytest.raises(DataError, match="NaN or infinite"):
        read_image(tiff(tmp_path / "a.tif", values))


@pytest.mark.parametrize(
    ("bands", "photometric", "extra"),
    [(2, 1, [0]), (4, 2, [0]), (4, 2, None), (5, 2, [0, 0]), (7, 1, [0] * 6)],
    ids=["grey and another", "infrared", "unmarked", "five", "seven"],
)
def test_bands_that_would_be_lost_are_refused(tmp_path, bands, photometric, extra):
    path = tiff(tmp_path / "a.tif", np.zeros((4, 6, bands), np.uint8), photometric, extra=extra)
    for read in (read_image, examine_file):
        with pytest.raises(DataError, match=rf"a\.tif has {bands} bands"):
            read(path)


def test_transparency_is_left_out(tmp_path):
    pixels = np.arange(96, dtype=np.uint8).reshape(4, 6, 4)
    assert (read_image(tiff(tmp_path / "a.tif", pixels, 2, extra=[2])) == pixels[..., :3]).all()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png") == pixels[..., :3]).all()
    Image.fromarray(pixels).save(tmp_path / "b.tif")
    assert (read_image(tmp_path / "b.tif") == pixels[..., :3]).all()


def test_more_pixels_than_pillow_allows(tmp_path, monkeypatch, recwarn):
    """Its limit is a warning from 89 megapixels and an error from 179; here the limit is lowered instead."""
    assert Image.MAX_IMAGE_PIXELS is None
    monkeypatch.setattr("segtrain.data.images.MOST_PIXELS", 20)
    with pytest.raises(DataError, match="it says that it has 6 x 4 pixels, at most 20 work"):
        read_label(grey_png(tmp_path / "a.png", RAMP.astype(np.uint8) % 2, 1))
    assert not recwarn.list


def test_a_png_with_fewer_bytes_than_its_size_needs(tmp_path):
    path = grey_png(tmp_path / "a.png", RAMP.astype(np.uint8) % 2, 1)
    data = path.read_bytes()
    head = b"IHDR" + struct.pack(">II", 20_000, 20_000) + data[24:29]
    path.write_bytes(data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:])
    with pytest.raises(DataError, match="20000 x 20000 pixels, for which its .* bytes are too few"):
        read_label(path)


def test_what_is_no_image_is_not_to_be_downloaded_again(tmp_path):
    for name, content in (("a.npy", b"\x93NUMPY"), ("a.json", b"{}")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=r"is no image that can be read: give PNG, JPEG or TIFF files$"):
            read_image(tmp_path / name)
    (tmp_path / "a.png").write_bytes(b"<html>")
    with pytest.raises(DataError, match="copy or download it again") as caught:
        read_image(tmp_path / "a.png")
    assert "BytesIO" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ folders


@pytest.fixture
def tree(tmp_path):
    """A folder of images, one that is linked into it, and links that lead back."""
    for place in ("root/a", "elsewhere/deep"):
        (tmp_path / place).mkdir(parents=True)
    for name in ("root/0.png", "root/a/1.png", "root/a/._1.png", "elsewhere/2.png", "elsewhere/deep/3.png"):
        (tmp_path / name).write_bytes(b"")
    root = tmp_path / "root"
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "a" / "up").symlink_to(root)
    (tmp_path / "elsewhere" / "deep" / "self").symlink_to(tmp_path / "elsewhere")
    (root / "broken.png").symlink_to(tmp_path / "nowhere")
    return root


def test_linked_folders_are_entered_once(tree):
    names = ["0.png", "a/1.png", "linked/2.png", "linked/deep/3.png"]
    assert [path.relative_to(tree).as_posix() for path in files_below(tree)] == names
    assert [path.relative_to(tree).as_posix() for _, path in matching(tree, "**/*.png")] == names
    assert dict(matching(tree, "linked/*.png")) == {"2": tree / "linked" / "2.png"}
    assert dict(matching(tree, "*/deep/?.png")) == {"linked/3": tree / "linked" / "deep" / "3.png"}
    assert dict(matching(tree, "0.png")) == {"0": tree / "0.png"}


def test_the_text_that_wildcards_stand_for(tmp_path):
    (tmp_path / "x" / "y[1]").mkdir(parents=True)
    (tmp_path / "x" / "y[1]" / "left_7_L.png").write_bytes(b"")
    for pattern, name in (
        ("**/left_*_L.png", "x/y[1]/7"), ("x/y[1]/*_L.png", "left_7"), ("*/*/left_?_*.png", "x/y[1]/7/L"),
        ("**/x/**/*.png", "y[1]/left_7_L"),
    ):  # fmt: skip
        assert [found for found, _ in matching(tmp_path, pattern)] == [name], pattern


@pytest.mark.parametrize("pattern", ["", "/etc/*", "../*", "a/../*", "a**/b", "**", "a\x00"])
def test_patterns_that_are_refused(tmp_path, pattern):
    with pytest.raises(UsageError, match="is not a pattern below"):
        match_patterns(tmp_path, pattern, None, "dataset.splits.train")


def test_images_and_labels_with_other_endings_are_paired(tmp_path):
    for name in ("images/0.jpg", "images/1.JPG", "images/2.png", "masks/0.png", "masks/1.png", "masks/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    for last in ("2.png", "2.jpeg"):  # the first has the whole name of its label, unlike the others
        (tmp_path / "images" / "2.png").rename(tmp_path / "images" / last)
        found = match_patterns(tmp_path, "images/*", "masks/*", "dataset.splits.train").samples()
        pairs = [(one.name, one.image.name, one.label.name) for one in found]
        assert pairs == [("0", "0.jpg", "0.png"), ("1", "1.JPG", "1.png"), ("2", last, "2.png")]
    (tmp_path / "images" / "2.jpg").write_bytes(b"")  # then 2 would be two images: the names are whole
    with pytest.raises(DataError, match="4 of 4 images have no label"):
        match_patterns(tmp_path, "images/*", "masks/*", "dataset.splits.train").samples()


def test_two_files_of_one_name_are_refused(tmp_path):
    for name in ("a_b/c.png", "a/b_c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UsageError, match="need the same number of"):
        match_patterns(tmp_path, "*/*.png", "*.png", "dataset.splits.train")
    (tmp_path / "a_b" / "d.png").write_bytes(b"")
    (tmp_path / "a_b" / "d").mkdir()
    (tmp_path / "a_b" / "d" / ".png").write_bytes(b"")
    with pytest.raises(DataError, match="by the same name 'a_b/d'"):
        match_patterns(tmp_path, "**/*.png", None, "dataset.splits.train")


def test_an_image_that_pillow_alone_reads_keeps_its_depth(tmp_path, monkeypatch):
    monkeypatch.setattr(cv2, "imdecode", lambda *_: None)
    values = full(np.uint16)
    assert (read_image(tiff(tmp_path / "a.tif", values))[..., 0] == values >> 8).all()


@pytest.mark.parametrize(
    ("labels", "why"),
    [("photo", "6 photographs and 0 images with one of few values per pixel, of which both are needed"),
     ("colours", "3 photographs and 0 .*, but 3 with few colours, which have to become class ids first"),
     ("named otherwise", "3 photographs and 3 .*, but they do not have the same names")],
)  # fmt: skip
def test_why_a_folder_cannot_be_guessed_is_true(tmp_path, labels, why):
    rng, mask = np.random.default_rng(0), np.tile(np.arange(3, dtype=np.uint8), (30, 10))
    for i in range(3):
        for folder in ("images", "labels"):
            (tmp_path / folder).mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (30, 30, 3), np.uint8)).save(tmp_path / "images" / f"{i}.jpg")
        name = f"other{i + 5}.png" if labels == "named otherwise" else f"{i}.jpg" if labels == "photo" else f"{i}.png"
        pixels = 80 * np.repeat(mask[..., None], 3, 2) if labels == "colours" else mask
        Image.fromarray(pixels).save(tmp_path / "labels" / name)
    with pytest.raises(DataError, match=why):
        guess_splits(tmp_path)


def test_the_remedy_for_levels_is_a_range_of_whole_bits(tmp_path):
    """The largest value of one image would cut off those of the next."""
    with pytest.raises(DataError, match=r"from 3 to 3999, .*dataset\.value_range=\[0,4095\]$"):
        read_image(tiff(tmp_path / "a.tif", np.array([[3, 3999], [80, 2000]], np.uint16)))

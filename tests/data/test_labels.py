import numpy as np
import pytest
from PIL import Image

from segtrain.config import IGNORE_INDEX
from segtrain.data.images import read_image
from segtrain.data.label_files import read_label
from segtrain.data.labels import LabelTable, published_table, read_user_table
from segtrain.errors import DataError


def test_cityscapes_table():
    table = published_table("cityscapes")
    assert table.num_classes == 19
    assert table.names[:3] == ["road", "sidewalk", "building"]
    assert table.names[18] == "bicycle"
    assert table.ids.tolist() == [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    assert table.colors[0].tolist() == [128, 64, 128]
    assert table.known.sum() == 34  # -1, the licence plate, cannot occur in an 8-bit image


def test_encode_and_decode(tmp_path):
    table = published_table("cityscapes")
    ids = np.array([[7, 8, 0, 33], [23, 1, 29, 11]], np.uint8)
    train_ids = table.encode(ids, tmp_path / "x.png")
    assert train_ids.tolist() == [[0, 1, IGNORE_INDEX, 18], [10, IGNORE_INDEX, IGNORE_INDEX, 2]]
    assert train_ids.dtype == np.uint8
    kept = train_ids != IGNORE_INDEX
    assert (table.decode(np.where(kept, train_ids, 0))[kept] == ids[kept]).all()
    assert table.colorize(train_ids)[0, 2].tolist() == [0, 0, 0]


def test_an_unknown_id_is_named_with_its_file(tmp_path):
    ids = np.array([[7, 99], [99, 200]], np.uint8)
    words = r"broken\.png: label ids 99 \(2 pixels\), 200 \(1 pixel\) are not in .*0 to 33"
    with pytest.raises(DataError, match=words):
        published_table("cityscapes").encode(ids, tmp_path / "broken.png")


def test_table_survives_a_checkpoint():
    table = published_table("cityscapes")
    again = LabelTable.from_dict(table.as_dict())
    assert again.names == table.names
    assert (again.known == table.known).all()
    assert (again.colors == table.colors).all()


CSV = "id,name,color,ignore\n0,sky,#0080ff,\n3, tree ,10 200 30,false\n9,void,,true\n"
YAML = """
- {id: 0, name: sky, color: '#0080ff'}
- {id: 3, name: tree, color: [10, 200, 30]}
- {id: 9, name: void, ignore: true}
"""


@pytest.mark.parametrize(("name", "text"), [("c.csv", CSV), ("c.yaml", YAML), ("c.yml", "classes:\n" + YAML)])
def test_user_table(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    table = read_user_table(tmp_path / name)
    assert table.names == ["sky", "tree"]
    assert table.ids.tolist() == [0, 3]
    assert table.colors.tolist() == [[0, 128, 255], [10, 200, 30]]
    assert table.ignored_ids == [9]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("id,name\n0,sky\n0,tree\n", "id 0 occurs twice"),
        ("id,name\n0,sky\n1,sky\n", "name sky occurs twice"),
        ("id,name\n0,sky\n300,tree\n", "class 2: id must be a whole number from 0 to 255, found '300'"),
        ("id,name\n0,sky\nx,tree\n", "found 'x'"),
        ("id,nme\n0,sky\n", "expected the columns id, name, color, ignore"),
        ("id,name\n0,sky\n", "found 1 classes"),
        ("id,name,color\n0,sky,blue\n1,tree,\n", "color must be #rrggbb"),
        ("id,name,ignore\n0,sky,maybe\n1,tree,\n", "ignore must be true or false"),
        ("id,name\n0,\n1,tree\n", "the name is empty"),
    ],
)
def test_wrong_user_tables_are_explained(tmp_path, text, words):
    (tmp_path / "c.csv").write_text(text)
    with pytest.raises(DataError, match=words):
        read_user_table(tmp_path / "c.csv")


def test_missing_table(tmp_path):
    with pytest.raises(DataError, match="cannot read the class table"):
        read_user_table(tmp_path / "no.csv")


def test_default_colours_are_distinct(tmp_path):
    (tmp_path / "c.csv").write_text("id,name\n" + "".join(f"{i},class {i}\n" for i in range(60)))
    colors = read_user_table(tmp_path / "c.csv").colors
    assert len({tuple(color) for color in colors.tolist()}) == 60


def test_palette_pictures_are_read_as_indices(tmp_path):
    ids = np.array([[17, 44], [45, 17]], np.uint8)
    Image.fromarray(ids).save(tmp_path / "l.png")
    palette = Image.new("P", (2, 2))
    palette.putpalette([(i * 7) % 256 for i in range(768)])
    palette.putdata(ids.ravel().tolist())
    palette.save(tmp_path / "p.png")
    assert (read_label(tmp_path / "p.png") == ids).all()
    assert (read_label(tmp_path / "l.png") == ids).all()


def test_pictures_that_are_no_label_maps(tmp_path):
    Image.new("RGB", (4, 4), (128, 64, 128)).save(tmp_path / "color.png")
    with pytest.raises(DataError, match=r"color\.png is a RGB colour image.*labelIds"):
        read_label(tmp_path / "color.png")
    Image.fromarray(np.array([[26001, 7]], np.uint16)).save(tmp_path / "instances.png")
    with pytest.raises(DataError, match="16-bit image with values up to 26001"):
        read_label(tmp_path / "instances.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(DataError, match=r"text\.png cannot be read"):
        read_label(tmp_path / "text.png")


def test_grey_and_rotated_photographs_become_rgb_as_stored(tmp_path):
    Image.fromarray(np.full((3, 5), 77, np.uint8)).save(tmp_path / "grey.png")
    assert read_image(tmp_path / "grey.png").shape == (3, 5, 3)
    exif = Image.Exif()
    exif[274] = 6  # "rotate me": the labels are not rotated either
    Image.new("RGB", (10, 4)).save(tmp_path / "rotated.jpg", exif=exif)
    assert read_image(tmp_path / "rotated.jpg").shape == (4, 10, 3)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpegs_are_pillows_to_the_bit(tmp_path, mode, subsampling, progressive):
    """Published scores, above all ImageNet's, were measured on what Pillow decodes; segtrain reads with OpenCV."""
    coarse = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
    picture = Image.fromarray(coarse).resize((91, 67), Image.Resampling.BICUBIC).convert(mode)
    for quality in (60, 92, 100):
        path = tmp_path / f"{quality}.jpg"
        picture.save(path, quality=quality, subsampling=subsampling, progressive=progressive)
        with Image.open(path) as theirs:
            assert (read_image(path) == np.asarray(theirs.convert("RGB"))).all()

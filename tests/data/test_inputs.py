"""What input= of `segtrain predict` means."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from segtrain.data.inputs import count_frames, find_inputs, read_frames
from segtrain.errors import DataError, UsageError


@pytest.fixture
def photos(tmp_path):
    for name in ("b.png", "a.jpg", "a.png", "trip/c.PNG", "trip/deep/d.png", "trip/notes.md", "._b.png"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path, "PNG")
    return tmp_path / "photos"


def names(text):
    return [one.name for one in find_inputs(str(text))]


def test_a_folder_keeps_its_tree_and_equal_stems_apart(photos):
    assert names(photos) == ["a_jpg", "a_png", "b", "trip/c", "trip/deep/d"]
    assert names(photos / "b.png") == ["b"]


def test_a_pattern(photos):
    assert names(photos / "*.png") == ["a", "b"]
    assert names(photos / "**" / "*.png") == ["a", "b", "trip/deep/d"]
    assert names("photos/trip/?.PNG") == ["c"]
    for pattern, text in (("photos/*.md", "fits no images"), ("photos/**", "end it with"), ("none/*.png", "fits no")):
        with pytest.raises(UsageError, match=text):
            find_inputs(pattern)


def test_a_list(photos, tmp_path):
    (tmp_path / "list.txt").write_text(
        "# mine\n\nphotos/trip/deep/d.png\nphotos/b.png\nphotos/b.png\nphotos/none.png\n"
    )
    found = find_inputs("list.txt")
    assert [one.name for one in found] == ["trip/deep/d", "b", "none"]  # in its order, once each
    assert found[1].path.samefile(photos / "b.png")
    (photos / "inside.txt").write_text("trip/c.PNG\n")
    assert names(photos / "inside.txt") == ["c"]
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(UsageError, match="holds no paths"):
        find_inputs("empty.txt")


def test_what_does_not_exist():
    with pytest.raises(UsageError, match="no such file or folder"):
        find_inputs("missing.png")


def test_a_video_is_its_frames():
    writer = cv2.VideoWriter("film.avi", cv2.VideoWriter.fourcc(*"MJPG"), 10, (32, 24))
    for level in (0, 60, 120, 180, 240):
        writer.write(np.full((24, 32, 3), (level, 10, 20), np.uint8))  # blue first
    writer.release()
    path = Path("film.avi")
    assert count_frames(path) == 5
    assert [(one.name, one.frame) for one in find_inputs("film.avi")][3:] == [("film/000004", 4), ("film/000005", 5)]
    found = list(read_frames(path, [2, 5]))
    assert [number for number, _ in found] == [2, 5]
    for (_, frame), level in zip(found, (60, 240), strict=True):
        assert frame.shape == (24, 32, 3) and abs(frame.mean((0, 1)) - (20, 10, level)).max() < 8
    Path("film.mp4").write_bytes(b"no film")
    with pytest.raises(DataError, match=r"film\.mp4 cannot be read as a video"):
        find_inputs("film.mp4")
    with pytest.raises(DataError, match="ends at frame 5"):
        list(read_frames(path, [7]))

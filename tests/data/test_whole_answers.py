"""The answer of a check of all files, which a second start takes as it is while no file has changed."""

import json
import os

import pytest
from PIL import Image

from segtrain.data.labels import LabelTable, published_table
from segtrain.data.sample import Sample
from segtrain.data.verify import files
from segtrain.data.verify.whole_answers import FILE, saved_answer, state_of_files
from segtrain.errors import DataError
from tests.helpers.samples import picture

CITYSCAPES = published_table("cityscapes")
ROWS = [{"id": number, "name": str(number), "color": [number, 0, 0], "train_id": number} for number in range(2)]


@pytest.fixture
def samples(tmp_path):
    """Three, of which the first image lies on its side."""
    made = []
    for number in range(3):
        image, label = (tmp_path / f"{kind}{number}.png" for kind in ("image", "label"))
        picture(image, 50)
        picture(label, 7)
        made.append(Sample(str(number), image, label, exif="auto"))
    picture(made[0].label, 7, size=(4, 6))
    exif = Image.Exif()
    exif[274] = 6
    Image.new("L", (4, 6)).save(made[0].image, exif=exif)
    return made


def check(samples, tmp_path, table=CITYSCAPES):
    lines = []
    return files.check_samples(samples, table, tmp_path / "cache", lines.append), lines


def test_the_second_check_gives_the_same_answer_without_a_look_at_each_file(samples, tmp_path, monkeypatch):
    first = check(samples, tmp_path)
    assert first[0] == (6, 6) and "1 of 3 images have an orientation" in first[1][0]
    monkeypatch.setattr(files, "FileFacts", None)
    assert check(samples, tmp_path) == first
    with pytest.raises(TypeError):
        check(samples[1:], tmp_path)  # the answer is about other files


def rewritten(samples):
    picture(samples[1].label, 8)


def rewritten_in_the_same_second(samples):
    """Of the same size, and with its old time: only the file itself is another one."""
    before, path = samples[1].label.stat(), samples[1].label
    picture(path.with_name("new.png"), 8)
    assert path.with_name("new.png").stat().st_size == before.st_size
    os.utime(path.with_name("new.png"), ns=(before.st_atime_ns, before.st_mtime_ns))
    path.with_name("new.png").replace(path)


def touched(samples):
    os.utime(samples[2].image, ns=(1, 1))


def removed(samples):
    samples[2].image.unlink()


CHANGES = {
    "order": lambda samples: samples.reverse(),
    "another image for a label": lambda samples: samples.__setitem__(1, samples[1]._replace(image=samples[2].image)),
    "no label": lambda samples: samples.__setitem__(1, samples[1]._replace(label=None)),
    "exif": lambda samples: samples.__setitem__(2, samples[2]._replace(exif="ignore")),
    "value_range": lambda samples: samples.__setitem__(2, samples[2]._replace(value_range=(0.0, 9.0))),
    "replaced": lambda samples: samples.__setitem__(0, samples[0]._replace(replaced={-1: 0})),
    "channels": lambda samples: samples.__setitem__(0, samples[0]._replace(channels=(1, 1, 1))),
}


@pytest.mark.parametrize("change", [rewritten, rewritten_in_the_same_second, touched, removed, *CHANGES.values()])
def test_no_answer_is_taken_where_anything_differs(samples, tmp_path, change):
    check(samples, tmp_path)
    assert saved_answer(tmp_path / "cache", samples, 1) is not None
    change(samples)
    assert saved_answer(tmp_path / "cache", samples, 1) is None
    assert saved_answer(tmp_path / "cache", samples, 2) is None


def test_fewer_labels_read_are_another_answer(samples, tmp_path):
    check(samples, tmp_path)
    assert saved_answer(tmp_path / "cache", samples, 2) is None


def test_a_file_that_changes_after_it_was_read_is_read_again(samples, tmp_path, monkeypatch):
    describe = files.describe_turns

    def while_checking(*arguments):  # after the last file was read, before the answer is saved
        picture(samples[1].label, 99)
        return describe(*arguments)

    monkeypatch.setattr(files, "describe_turns", while_checking)
    check(samples, tmp_path)
    with pytest.raises(DataError, match="99"):
        check(samples, tmp_path)


def test_faults_are_no_answer(samples, tmp_path):
    samples[1].image.write_bytes(b"nothing")
    for _ in range(2):
        with pytest.raises(DataError, match=r"image1\.png cannot be read"):
            check(samples, tmp_path)
    assert not (tmp_path / "cache" / FILE).exists()


def test_another_class_table_refuses_the_files_of_a_saved_answer_by_name(samples, tmp_path):
    check(samples, tmp_path)
    for _ in range(2):
        with pytest.raises(DataError, match=r"3 of 3 samples cannot be used:\n.*label0\.png"):
            check(samples, tmp_path, LabelTable(ROWS, "here"))
    assert saved_answer(tmp_path / "cache", samples, 1) is not None


@pytest.mark.parametrize(
    "damage", [[], 5, {}, {"largest": [6, 6]}, {"largest": [6, "6"]}, {"histogram": [[300, 1]]}, {"turns": 1}]
)
def test_a_damaged_answer_is_found_again(samples, tmp_path, damage):
    first = check(samples, tmp_path)
    place = tmp_path / "cache" / FILE
    saved = json.loads(place.read_text())
    state = state_of_files(samples, 1)
    whole = saved[state] | damage if damage and isinstance(damage, dict) else damage
    if damage == {"largest": [6, 6]}:
        del whole["turns"]
    place.write_text(json.dumps({state: whole}))
    assert saved_answer(tmp_path / "cache", samples, 1) is None
    assert check(samples, tmp_path) == first
    place.write_text("no JSON")
    assert check(samples, tmp_path) == first and json.loads(place.read_text()) == saved


def test_a_cache_that_cannot_be_written_costs_the_time_only(samples, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("segtrain.files.warned", {})
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert check(samples, tmp_path)[0] == (6, 6)
    assert "WARNING    cannot write" in capsys.readouterr().out

"""`segtrain report`: what the page says, that it loads nothing, and that Chromium shows, sorts and names."""

import json
import re
import shutil
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image

from segtrain.commands.report import pictures
from segtrain.commands.report.charts import line_chart, thinned, ticks
from segtrain.commands.report.page import made_of
from segtrain.commands.report.pictures import Shown, as_uris, region_window
from segtrain.commands.report.tables import image_table
from segtrain.data.labels import LabelTable
from segtrain.scoring.image_counts import read_image_counts
from tests.helpers import zygote
from tests.helpers.browser import CHROMIUM, Browser
from tests.helpers.checkout import TINY
from tests.helpers.evaluations import evaluation_folder
from tests.helpers.runs import refused

CLASSES = ["<script>alert(1)</script>", "sky & \"sea\" 'x'", "land | </script>"]
IMAGES = ["a<b>&amp;", 'it\'s "b"', "c%20d&", "é <i>e"]


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory):
    """A finished run of a few steps, whose classes and images have names that are markup. Read only."""
    root = tmp_path_factory.mktemp("report")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (root / "data" / split / kind).mkdir(parents=True)
        for number, name in enumerate(IMAGES):
            label = np.full((64, 96), 2, np.uint8)
            label[: 20 + 5 * number], label[:3] = 1, 9
            label[50:, 10 * number : 10 * number + 12] = 0
            image = np.choose(label[..., None] % 9, [(200, 60, 40), (90, 140, 220), (40, 120, 50)])
            image = (image + rng.integers(0, 30, (64, 96, 3))).astype(np.uint8)
            Image.fromarray(image).save(root / "data" / split / "images" / f"{name}.png")
            Image.fromarray(label).save(root / "data" / split / "labels" / f"{name}.png")
    rows = "".join('{},"{}",{}\n'.format(i, name.replace('"', '""'), "") for i, name in enumerate(CLASSES))
    (root / "data" / "classes.csv").write_text(f"id,name,ignore\n{rows}9,void,true\n")
    words = [
        "dataset=folder", f"dataset.root={root / 'data'}", "dataset.classes=classes.csv", "run=run", "device=cpu",
        "dataset.splits.train={images:train/images/*.png,labels:train/labels/*.png}",
        "dataset.splits.val={images:val/images/*.png,labels:val/labels/*.png}", f"plugins=[{TINY}]",
        "model.backbone=tiny", "model.output_stride=16", "model.head_channels=8", "augmentation.crop_size=[32,48]",
        "augmentation.scale=[0.9,1.1]", "trainer.batch_size=4", "trainer.epochs=null", "trainer.max_steps=30",
        "trainer.validate_every=15", "loader.workers=0", "logging.every=1", "loss=cross_entropy", "optimizer.lr=0.05",
    ]  # fmt: skip
    answer = zygote.call(["train", *words], root)
    assert answer.returncode == 0, answer.stderr
    return root / "run"


@pytest.fixture(scope="session")
def page_file(trained_run):
    """The run's report."""
    answer = zygote.call(["report", str(trained_run), f"plugins=[{TINY}]", "device=cpu", "pictures=2"], trained_run)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.splitlines()[-1] == str(trained_run / "report.html")
    assert "note " not in answer.stdout
    return trained_run / "report.html"


class Parsed(HTMLParser):
    """Elements with their attributes, the text of the page, and the content of scripts."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self.scripts, self.open = [], "", [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "rect", "path", "circle", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag, tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open and self.open[-1] != "style":
            self.text += data


@pytest.fixture(scope="session")
def parsed(page_file):
    return Parsed(page_file.read_text())


def test_the_page_has_every_section(parsed, trained_run):
    titles = [text for text in ("Scores", "Curves", "Classes", "Confusions", "Best and worst images", "All images",
              "Memory and throughput", "What the run was made of") if text in parsed.text]  # fmt: skip
    assert len(titles) == 8 and not parsed.open
    result = json.loads((trained_run / "evaluation.json").read_text())
    assert f"{100 * result['miou']:.1f}" in parsed.text and result["protocol"]["rules"] in parsed.text
    matrix = json.loads(next(script for script in parsed.scripts if script.startswith('{"names"')))
    assert matrix == {"names": [*CLASSES, "(other)"], "matrix": result["confusion_matrix"]}
    assert "predicted otherwise" not in parsed.text  # the predictions are those of the evaluation, to the pixel
    images = [attributes for tag, attributes in parsed.elements if tag == "img"]
    assert len(images) >= 4 * 4 and all(one["alt"] and int(one["width"]) <= 480 for one in images)
    assert "max_steps: 30" in parsed.text and "Sessions" in parsed.text


def test_names_are_escaped(parsed):
    for name in CLASSES + IMAGES:
        assert name in parsed.text, name
    tags = [tag for tag, _ in parsed.elements]
    assert tags.count("script") == 2 and not {"b", "i"} & set(tags)


def test_it_is_one_small_file_that_names_no_other(page_file, parsed):
    text = page_file.read_text()
    assert page_file.stat().st_size < 1_000_000
    for tag, attributes in parsed.elements:
        for key in ("src", "href"):
            value = attributes.get(key, "#")
            assert value.startswith(("data:", "#")), (tag, value[:60])
        assert not [key for key in attributes if key.startswith("on")]
    assert "@import" not in text and "url(" not in text
    policy = next(one["content"] for tag, one in parsed.elements if one.get("http-equiv"))
    assert policy.startswith("default-src 'none'; img-src data:;") and "script-src 'sha256-" in policy


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    made = Browser(tmp_path_factory.mktemp("browser"))
    yield made
    made.close()


def column(browser, table, number):
    cells = f"document.querySelectorAll('table.sortable')[{table}].tBodies[0].rows"
    return browser.run(f"[...{cells}].map(row => row.cells[{number}].textContent)")


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, True)])
def test_chromium_shows_it(browser, page_file, tmp_path, width, dark):
    """In both colours, without sideways scrolling, errors or requests."""
    browser.requests.clear()
    browser.errors.clear()
    browser.open(page_file, width, dark)
    assert browser.run("document.documentElement.scrollWidth") <= width
    colors = browser.run("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
    light = [sum(map(int, re.findall(r"\d+", color)[:3])) for color in colors]
    assert (light[0] < light[1]) == dark and abs(light[0] - light[1]) > 450
    assert browser.run("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    small = browser.run(
        "[...document.querySelectorAll('th button, nav a, summary')].filter(e => e.getBoundingClientRect().height < 30)"
        ".length"
    )
    assert small == 0  # targets of a finger
    browser.screenshot(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as image:
        assert image.width == width and len(image.convert("RGB").getcolors(1 << 24)) > 100
    assert not browser.errors
    assert {url.partition(":")[0] for url in browser.requests} <= {"file", "data"}
    assert [url for url in browser.requests if url.startswith("file:")] == [page_file.resolve().as_uri()]


def test_chromium_sorts_and_names_cells(browser, page_file, trained_run):
    browser.errors.clear()
    browser.open(page_file)
    images = 2  # after classes and pairs
    before = [float(text) for text in column(browser, images, 1)]
    assert before == sorted(before) and len(before) == 4
    header = ".tall th:nth-of-type({}) button"
    browser.click(header.format(2))
    assert [float(text) for text in column(browser, images, 1)] == before
    browser.click(header.format(2))
    assert [float(text) for text in column(browser, images, 1)] == before[::-1]
    assert browser.run("document.querySelector('.tall th:nth-of-type(2)').getAttribute('aria-sort')") == "descending"
    browser.run("document.querySelector('.tall th button').focus()")
    browser.press("Enter")  # by the keyboard
    names = column(browser, images, 0)
    assert sorted(names) == sorted(IMAGES) and names == browser.run(
        f"{json.dumps(IMAGES)}.sort((a, b) => a.localeCompare(b, undefined, {{numeric: true}}))"
    )
    assert browser.run("document.querySelector('.tall th:nth-of-type(2)').getAttribute('aria-sort')") == "none"
    browser.press("Tab")
    assert browser.run("document.activeElement.textContent") == "mIoU %"
    matrix = json.loads((trained_run / "evaluation.json").read_text())["confusion_matrix"]
    browser.point("#heat")
    x, y = browser.run(
        "(m => [m.a * 1.5 + m.e, m.d * 2.5 + m.f])(document.getElementById('heat').getScreenCTM())"
    )  # column 1, row 2
    browser.move(x, y)
    told = browser.run("document.getElementById('cell').textContent")
    share = 100 * matrix[2][1] / sum(matrix[2])
    assert told.startswith(f"{CLASSES[2]} predicted as {CLASSES[1]}: {share:.2f} % of its pixels")
    browser.run("document.getElementById('heat').focus()")
    browser.press("ArrowRight")
    assert browser.run("document.getElementById('cell').textContent").startswith(
        f"{CLASSES[2]} predicted as {CLASSES[2]}"
    )
    assert not browser.errors


def test_what_is_missing_is_said(segtrain, trained_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained_run, run, ignore=shutil.ignore_patterns("report.html", "tensorboard", "blackbox"))
    words = ("report", run, f"plugins=[{TINY}]", "device=cpu")
    answer = segtrain(*words, f"root={tmp_path}", "pictures=1")
    assert answer.status == 0 and "No images: they could not be predicted again" in answer.out, answer
    text = (run / "report.html").read_text()
    assert "could not be predicted again" in text and "All images" in text and "<img" not in text
    answer = segtrain(*words, "pictures=0", f"output={tmp_path / 'own.html'}")
    assert answer.status == 0 and "<img" not in (tmp_path / "own.html").read_text()
    (run / "images.npz").unlink()
    answer = segtrain(*words)
    assert answer.status == 0 and "images.npz is missing" in answer.out
    assert "Confusions" not in (run / "report.html").read_text()
    (run / "evaluation.json").unlink()
    (run / "last.pt").unlink()
    for path in run.glob("step_*.pt"):
        path.unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "train/lo')
    answer = segtrain(*words)
    assert answer.status == 0 and "The run is not finished" in answer.out and "There is no checkpoint" in answer.out
    assert "Curves" in (run / "report.html").read_text()


def test_the_configuration_is_shown_as_it_is():
    facts = SimpleNamespace(saved={}, sessions=[], config={"dataset": {"root": "C:\\new <data>", "name": "a"}})
    assert '<pre tabindex="0">dataset:\n  root: C:\\new &lt;data&gt;\n  name: a</pre>' in made_of(facts)


def test_a_run_of_image_classification(segtrain, trained_run, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    config = yaml.safe_load((trained_run / "config.yaml").read_text())
    config["model"]["head"] = "classifier"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "evaluation.json").write_text(json.dumps({"top1": 0.5, "top5": 0.75, "images": 8, "dataset": "x"}))
    answer = segtrain("report", run)
    assert answer.status == 0, answer
    text = Parsed((run / "report.html").read_text()).text
    assert "top-1 %50.0" in text and "top-5 %75.0" in text


def test_what_is_no_run(segtrain, tmp_path):
    refused(segtrain("report", tmp_path), "is no run: it has no config.yaml", status=1)
    refused(segtrain("report", tmp_path / "none"), "is no run", status=1)
    (tmp_path / "config.yaml").write_text("trainer: {}\n")
    refused(segtrain("report", tmp_path), "holds no options of a training", status=1)
    refused(segtrain("report", f"run={tmp_path}", f"output={tmp_path}"), "is a folder: give the HTML file to write")
    refused(segtrain("report"), "run=null")


def test_images_are_made_smaller_until_they_fit(monkeypatch):
    table = LabelTable([{"id": i, "name": str(i), "color": [i, 80, 90], "train_id": i} for i in range(2)], "a test")
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 2, (120, 240)).astype(np.uint8)
    shown = Shown("a", "", rng.integers(0, 255, (120, 240, 3)).astype(np.uint8), noise, 1 - noise, 0)
    whole = as_uris([[shown]], table)[0][0]
    assert (whole.width, whole.height) == (240, 120)
    size = sum(map(len, whole[:4]))
    monkeypatch.setattr(pictures, "BUDGET", 3 * size // 2)
    groups = as_uris([[shown, shown], [shown]], table)
    assert sum(len(text) for group in groups for one in group for text in one[:4]) <= 3 * size // 2
    assert groups[1][0].width < 240


def test_many_images_are_shortened(tmp_path):
    evaluation_folder(tmp_path, images=2100, size=(4, 5))
    text = image_table(read_image_counts(tmp_path / "images.npz"))
    assert "2100 images with labels, of which the 100 in the middle are left out" in text
    assert text.count("<tr>") == 2001 and len(text) < 1_000_000


def test_charts_and_windows():
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0]) and ticks(0.9, 4.2) == [1, 2, 3, 4]
    points = [(float(i), float(i % 2)) for i in range(10_001)]
    assert len(thinned(points)) == 400 and thinned(points)[-1] == points[-1]
    assert line_chart("x", []) == ""
    assert "x: 3 at step 1, 3 at step 1" in line_chart("x", [(1.0, 3.0)])
    mask = np.zeros((200, 300), bool)
    mask[100:140, 200:220], mask[0, 0] = True, True
    assert region_window(mask) == (slice(68, 172), slice(168, 252))
    assert region_window(mask[50:60]) == (slice(None), slice(None))

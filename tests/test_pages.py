"""Options, choices, files, links, functions and variables on the README pages exist; and how the pages are written."""

import importlib
import re
from fnmatch import fnmatch

import pytest

from segtrain.cli.commands import COMMANDS
from segtrain.config import DATASET_CONFIGS, TrainConfig
from segtrain.config.keys import is_safe, known_options
from segtrain.models import BACKBONES, HEADS
from segtrain.models.blocks import NORMS
from tests.helpers import pages
from tests.helpers.checkout import ROOT
from tests.helpers.pages import NAMES, PAGES

CONFIGS = ROOT / "configs"
GROUPS = {path.name: {file.stem for file in path.glob("*.yaml")} for path in CONFIGS.iterdir() if path.is_dir()}
OWN = {  # names in the plugins on the pages
    "model": {"plain", "smp"}, "loss": {"easy_less"},
    "dataset": {"ponds"}, "optimizer": {"lion"}, "schedule": {"cool_down"},
}  # fmt: skip
OPTIONS = {
    key
    for command in COMMANDS.values()
    for dataset in DATASET_CONFIGS
    for key in known_options(command.schema, [f"dataset={dataset}"])
}
MAPPINGS = ("dataset.splits", "dataset.parts", "model.backbone_options", "loss.options")


# ------------------------------------------------------------------------------------------------ names


def code(name):
    """Spans and shell commands of a page."""
    return [*pages.spans(name), *(command.text for command in pages.commands(name))]


def known_option(key):
    if key in OPTIONS or key in GROUPS or key == "key" or key.startswith(tuple(f"{mapping}." for mapping in MAPPINGS)):
        return True
    return key.endswith(".*") and any(option.startswith(key[:-1]) for option in OPTIONS)


@pytest.mark.parametrize("name", NAMES)
def test_every_option_exists(name):
    found = 0
    for text in code(name):
        keys = set(re.findall(r"(?<![\w.{(,/$-])([a-z_]+(?:\.[a-z_]+)*)=", text))
        keys |= {key for key in re.findall(r"(?<![\w./-])([a-z_]+\.(?:[a-z_]+|\*))(?![\w/(.])", text) if group_of(key)}
        for key in keys if "(" not in text else ():
            assert known_option(key), (key, text)
            found += 1
    assert found or name == "segtrain/README.md"


def group_of(key):
    return key.partition(".")[0] in {option.partition(".")[0] for option in OPTIONS if "." in option}


@pytest.mark.parametrize("name", NAMES)
def test_every_choice_of_a_group_exists(name):
    for text in code(name):
        for group, value in re.findall(r"(?<![\w./-])([a-z_]+)=([\w*]+)(?![\w.]*/)", text):
            if group in GROUPS and not text.startswith(f"{group}={value}.y") and f"{value}.yaml" not in text:
                pattern = re.compile(value.replace("*", ".*"))
                known = GROUPS[group] | OWN.get(group, set()) | {"NAME", "FILE", "FOLDER"}
                assert any(pattern.fullmatch(choice) for choice in known), (group, value, text)


def test_the_page_of_options_names_all_choices():
    text = PAGES["configs/README.md"]
    for group in ("loss", "optimizer", "schedule", "augmentation", "inference"):
        for choice in GROUPS[group] - {"from_checkpoint"}:
            assert f"`{choice}`" in text, (group, choice)
    for choice in (*BACKBONES, *HEADS, *NORMS, *FORMS_OF_RECOMPUTATION):
        assert f"`{choice}`" in text, choice
    for verb in COMMANDS:
        assert f"`segtrain {verb} " in text, verb
    spans = pages.spans("configs/README.md")
    for recipe in GROUPS["experiment"]:  # by name, as imagenet_*, or as a row of a recipe: NAME_16x512
        assert any(fnmatch(recipe, span) or recipe.startswith(f"{span}_") for span in spans), recipe


def test_the_page_of_options_lists_what_may_change_when_a_run_is_resumed():
    section = PAGES["configs/README.md"].partition("\n## Resume\n")[2].partition("\n## ")[0]
    listed = set(re.findall(r"`([\w.*]+)`", section))
    for key in known_options(TrainConfig):
        assert is_safe(key) == (key in listed or f"{key.partition('.')[0]}.*" in listed), key


FORMS_OF_RECOMPUTATION = ("none", "norm", "norm_proposed", "blocks")


def test_the_page_of_datasets_names_all():
    for name in DATASET_CONFIGS.keys() - {"ponds"}:
        assert f"| `{name}` |" in PAGES["datasets/README.md"], name


NEW = {"segtrain/commands/count.py", "configs/count.yaml"}  # of the example of a command


@pytest.mark.parametrize("name", NAMES)
def test_every_file_that_is_named_exists(name):
    found = [path for text in code(name) for path in pages.paths(text)]
    assert found
    for path in set(found) - NEW:
        assert pages.exists(path), path


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_somewhere(name):
    assert pages.links(name)
    for link in pages.links(name):
        path, _, anchor = link.partition("#")
        if path.startswith("http"):
            continue
        target = (pages.folder_of(name) / path).resolve() if path else ROOT / name
        assert target.exists(), link
        if anchor:
            assert anchor in pages.anchors(target.relative_to(ROOT).as_posix()), link


@pytest.mark.parametrize("name", NAMES)
def test_every_module_and_function_that_is_named_exists(name):
    for text in [*pages.spans(name), *pages.blocks(name, "python")]:
        for dotted in re.findall(r"(?<![\w./])segtrain(?:\.[A-Za-z_]\w*)+", text):
            parts = dotted.split(".")
            if f"{'/'.join(parts)}.py" in NEW:
                continue
            for count in range(len(parts), 0, -1):
                try:
                    found = importlib.import_module(".".join(parts[:count]))
                except ModuleNotFoundError:
                    continue
                for attribute in parts[count:]:
                    found = getattr(found, attribute)  # AttributeError: no such name
                break


@pytest.mark.parametrize("name", NAMES)
def test_every_test_and_python_program_that_is_named_exists(name):
    for text in code(name):
        for path, options in re.findall(r"pytest (tests/[\w/.]+)([^`]*)", text):
            chosen = re.search(r"-k (\w+)", options)
            assert chosen is None or re.search(rf"def test_\w*{chosen[1]}", (ROOT / path).read_text()), text
        for module, options in re.findall(r"python -m ([\w.]+)([^`]*)", text):
            path = ROOT / f"{module.replace('.', '/')}.py"
            assert path.exists(), text
            for word in re.findall(r"\b[a-z]{4,}\b", options):
                assert f'"{word}"' in path.read_text(), (word, text)
        for script, options in re.findall(r"(scripts/bench_\w+\.py)([^`]*)", text):
            for option, value in re.findall(r"(--[\w-]+)(?: ([a-z]*))?", options):
                assert option in (ROOT / script).read_text(), text
                assert value in (ROOT / script).read_text(), text


@pytest.mark.parametrize("name", NAMES)
def test_every_variable_of_the_environment_is_read(name):
    sources = [*(ROOT / "segtrain").rglob("*.py"), *(p for p in (ROOT / "scripts").rglob("*") if p.suffix != ".png")]
    text = "".join(path.read_text() for path in sources if path.is_file())
    for span in code(name):
        for variable in re.findall(r"(?<![\w/<-])([A-Z][A-Z_]{3,})=|\b(SEGTRAIN_\w+)", span):
            assert re.search(rf"\b{''.join(variable)}\b", text), span


def test_every_extra_exists():
    text = (ROOT / "pyproject.toml").read_text()
    named_extras = {extra for name in NAMES for extra in re.findall(r"pip install '\.\[(\w+)\]'", PAGES[name])}
    assert named_extras == {"cuda12", "cuda13", "export"}
    for extra in named_extras:
        assert re.search(rf"^{extra} = \[", text, re.M)


def the_map():
    """Paths of the map's tree: folders end in a slash, files have no .py."""
    (tree,) = (block for block in pages.blocks("segtrain/README.md", "text") if block.startswith("segtrain/\n"))
    for line in tree.splitlines()[1:]:
        indent, names = re.match(r"( +)((?:[\w.]+/?(?:, )?)+)", line).groups()
        if len(indent) == 2 and names.endswith("/"):
            room = names
        for name in names.split(", "):
            yield "segtrain/" + ("" if len(indent) == 2 else room) + name.rstrip()


def test_the_map_names_every_room_and_only_what_exists():
    mapped = [path for path in the_map() if not path.endswith("...")]
    for path in mapped:
        assert pages.exists(path if path.endswith("/") else f"{path}.py"), path
    for folder in (ROOT / "segtrain").rglob("__init__.py"):
        path = f"{folder.parent.relative_to(ROOT).as_posix()}/"
        assert path in ("segtrain/", *mapped), path
    for file in (ROOT / "segtrain").glob("*.py"):
        path = file.relative_to(ROOT).with_suffix("").as_posix()
        assert path in mapped or file.name in ("__init__.py", "__main__.py", "metrics.py"), path


# ------------------------------------------------------------------------------------------------ the pages themselves


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 160


@pytest.mark.parametrize("name", NAMES)
def test_lines_and_blocks(name):
    """On GitHub a long row makes a table scroll sideways, and a block without a language has no colours."""
    assert all(pages.languages(name))
    for line in PAGES[name].splitlines():
        assert len(line) <= (250 if line.startswith("|") else 125), line


@pytest.mark.parametrize("name", NAMES)
def test_commands_survive_the_shell(name):
    """Without quotes, bash splits {a:1,b:2} into several words."""
    for line in shell(name).splitlines():
        assert not re.search(r"\{[^}]*,", re.sub(r"'[^']*'|\"[^\"]*\"", "", line.partition(" #")[0])), line


def shell(name):
    return "\n".join(pages.blocks(name, "sh"))


def test_the_readme_says_what_was_not_measured():
    text = PAGES["README.md"]
    assert "not measured" in text.lower()
    assert "linted" in PAGES["configs/README.md"]
    for line in (line for name in NAMES for line in re.findall(r"^\s*segtrain (\w[\w-]*)", shell(name), re.M)):
        assert line in COMMANDS, line


def test_nothing_tells_people_to_install_somebody_elses_package():
    for path in [
        *(ROOT / name for name in NAMES),
        ROOT / "Dockerfile",
        *(ROOT / "configs").rglob("*.yaml"),
        *(ROOT / "segtrain").rglob("*.py"),
        *(path for path in (ROOT / "scripts").rglob("*") if path.is_file() and path.suffix != ".png"),
    ]:
        assert not re.search(r"pip install [^\n]*\bsegtrain\b(?!-)", path.read_text(), re.I), path


@pytest.mark.parametrize("name", NAMES)
def test_the_pages_use_the_fields_words(name):
    """image, GPU, dataset, image classification. Code spans hold names of options and files, and do not count."""
    text = re.sub(r"`[^`]*`", "", pages.prose(name))
    for word in (r"pictures?", r"cards?", r"data sets?", r"told", r"whole pictures?"):
        assert not re.search(rf"\b{word}\b", text, re.I), word

"""plugins=[./my_parts.py]: the user's own files and modules, which add parts to the dictionaries in PARTS.

They are imported before the options are composed, and only when they are named there: never because a checkpoint was
made with them.
"""

import importlib
import importlib.util
import re
import sys
import traceback
from pathlib import Path
from typing import Any

from segtrain.config.locations import CONFIGS
from segtrain.errors import UsageError

# Options whose choices plugins may add to -> module and dictionary that hold them.
PARTS = {
    "dataset.name": ("segtrain.data.registry", "DATASETS"),
    "model.backbone": ("segtrain.models.registry", "BACKBONES"),
    "model.head": ("segtrain.models.registry", "HEADS"),
    "loss.name": ("segtrain.losses", "LOSSES"),
    "optimizer.name": ("segtrain.engine.optim", "OPTIMIZERS"),
    "schedule.name": ("segtrain.engine.optim", "SCHEDULES"),
}
GROUP_CHOICES = tuple(key for key in PARTS if key != "model.head")  # GROUP=NAME sets them


def load_plugin(plugin: str) -> None:
    """Import a file or a module, once. UsageError in one sentence if it is not there or fails."""
    path = Path(plugin).expanduser()
    is_file = path.suffix == ".py" or path.is_file()
    try:
        if is_file:
            load_file(plugin, path)
        else:
            importlib.import_module(plugin)
    except Exception as error:
        if isinstance(error, UsageError):
            raise
        if isinstance(error, ModuleNotFoundError) and not is_file and error.name == plugin.split(".")[0]:
            raise UsageError(
                f"plugins=[{plugin}]: there is no module {error.name}; a file is given as ./NAME.py"
            ) from error
        what = f"{type(error).__name__}: {error.msg if isinstance(error, SyntaxError) else error}"
        raise UsageError(f"plugins=[{plugin}] cannot be imported: {place_of(error, path)}: {what}") from error


def load_file(plugin: str, path: Path) -> None:
    """As a module of the file's name; what lies beside the file can be imported by it, and by loader processes."""
    if not path.is_file():
        raise UsageError(f"plugins=[{plugin}]: no such file")
    path = path.resolve()
    name = re.sub(r"\W", "_", path.stem)
    loaded = sys.modules.get(name)
    if loaded is not None and getattr(loaded, "__file__", None) == str(path):
        return
    other = importlib.util.find_spec(name) if loaded is None else getattr(loaded, "__spec__", None)
    if loaded is not None or (other is not None and other.origin != str(path)):
        where = f" ({other.origin})" if other is not None else ""
        raise UsageError(f"plugins=[{plugin}]: another module is called {name}{where}: give the file another name")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def place_of(error: Exception, path: Path) -> str:
    """'FILE, line N' of the user's code that is to blame."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    library = str(Path(__file__).parents[1])
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    frames = [frame for frame in frames if not frame.filename.startswith(library)] or frames
    beside = [frame for frame in frames if Path(frame.filename).is_relative_to(path.resolve().parent)]
    frame = beside[-1] if beside else frames[0]
    return f"{frame.filename}, line {frame.lineno}"


def loaded_parts(key: str) -> dict[str, Any]:
    """All parts that the option `key` may name; empty unless their module is imported, which takes seconds."""
    module, dictionary = PARTS.get(key, ("", ""))
    found: dict[str, Any] = getattr(sys.modules.get(module), dictionary, {})
    return found


def own_parts() -> list[tuple[str, str]]:
    """(option, name) of all loaded parts that no file in configs/ describes."""
    found = []
    for key in GROUP_CHOICES:
        known = {path.stem for path in (CONFIGS / key.partition(".")[0]).glob("*.yaml")}
        found += [(key, name) for name in loaded_parts(key) if name not in known]
    return found

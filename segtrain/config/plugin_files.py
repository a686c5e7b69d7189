"""plugins=[./my_parts.py]: the user's own files and modules, which add parts to BACKBONES, HEADS, LOSSES and DATASETS.

They are imported before the options are composed, and only when they are named there: never because a checkpoint was
made with them.
"""

import importlib
import importlib.util
import re
import sys
import traceback
from pathlib import Path

from segtrain.cli.help import CONFIGS
from segtrain.errors import UsageError

# group -> where its parts are, and the option that names one of them
PARTS = {
    "dataset": ("segtrain.data.dataset", "DATASETS", "name"),
    "loss": ("segtrain.losses", "LOSSES", "name"),
    "model": ("segtrain.models.registry", "BACKBONES", "backbone"),
}


def load(plugin: str) -> None:
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
        raise UsageError(f"plugins=[{plugin}] cannot be imported: {place(error, path)}: {what}") from error


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


def place(error: Exception, path: Path) -> str:
    """'FILE, line N' of the user's code that is to blame."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    library = str(Path(__file__).parents[1])
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    frames = [frame for frame in frames if not frame.filename.startswith(library)] or frames
    beside = [frame for frame in frames if Path(frame.filename).is_relative_to(path.resolve().parent)]
    frame = beside[-1] if beside else frames[0]
    return f"{frame.filename}, line {frame.lineno}"


def own_parts() -> list[tuple[str, str, str]]:
    """(group, option, name) of all parts that no file in configs/ describes."""
    found = []
    for group, (module, dictionary, option) in PARTS.items():
        if module not in sys.modules:  # nothing was added to it then, and importing torch takes seconds
            continue
        known = {path.stem for path in (CONFIGS / group).glob("*.yaml")}
        names = getattr(sys.modules[module], dictionary, {})
        found += [(group, option, name) for name in names if name not in known]
    return found

"""`segtrain COMMAND key=value ...`. Nothing heavy is imported before a command runs."""

import contextlib
import difflib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from segtrain import __version__, config
from segtrain.cli import completion, slurm
from segtrain.cli.commands import ALIASES, COMMANDS, Command
from segtrain.cli.help import overview, usage
from segtrain.cli.words import Arguments, parse
from segtrain.config.compose import Request, as_yaml, compose, load_plugins, sweep, to_options
from segtrain.errors import SegtrainError, UsageError
from segtrain.files import reason_and_remedy


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP: it ends a command as Ctrl-C does, with everything that the command has started."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_status = 128 + number


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise Terminated. A training saves itself first: it has handlers of its own."""

    def terminate(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # launchers repeat it, and what comes now is the end already
        raise Terminated(number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    # nohup ignores SIGHUP, and a program around this one may have handlers of its own.
    numbers = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    try:
        for number in numbers:
            signal.signal(number, terminate)
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def main(argv: list[str] | None = None) -> None:
    """Entry point of the program `segtrain`; ends the process with the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        with terminable():
            run(arguments)
    except SegtrainError as error:
        stop(message_of(error), error.exit_status)
    except Terminated as error:
        stop(f"ended by {error}; nothing was saved since the last checkpoint", error.exit_status)
    except KeyboardInterrupt:
        stop("interrupted; nothing was saved since the last checkpoint", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        stop(f"cannot write or read{where}: {reason_and_remedy(error)}. What was saved before is untouched.", 1)


def message_of(error: SegtrainError) -> str:
    """The error's message; empty where another process of this run prints it."""
    rank = os.environ.get("RANK") if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
    if rank is None:
        return str(error)
    shared = error.everywhere or isinstance(error, UsageError)  # options are the same for all
    first = (rank if error.everywhere else os.environ.get("LOCAL_RANK", rank)) == "0"  # options: once a machine
    silent = getattr(error, "quiet", False) or (shared and not first)
    return "" if silent else f"{error}" if shared else f"rank {rank}: {error}"


def stop(text: str, status: int) -> None:
    sys.stdout.flush()
    if text:
        print(f"segtrain: {text}", file=sys.stderr, flush=True)
    sys.exit(status)


def run(arguments: list[str]) -> None:
    """Do what the words after `segtrain` ask for."""
    verb = arguments[0] if arguments else "--help"
    if verb in ("-h", "--help", "help"):
        print(overview(COMMANDS))
    elif verb == "--version":
        print(f"segtrain {__version__}")
    elif verb == "--completion":
        print(completion.shell_script("".join(arguments[1:2])), end="")
    elif verb == "--complete":
        print("\n".join(completion.complete(arguments[1:], COMMANDS)))
    elif verb not in COMMANDS:
        near = ALIASES.get(verb) or next(iter(difflib.get_close_matches(verb, COMMANDS, 1, 0.5)), None)
        hint = f"did you mean `segtrain {near}`?" if near else "the commands are " + ", ".join(COMMANDS)
        raise UsageError(f"there is no command {verb!r}: {hint} (segtrain --help lists all)")
    elif any(word in ("-h", "--help") for word in arguments[1:]):
        print(usage(verb, COMMANDS[verb]))
    else:
        run_command(verb, COMMANDS[verb], arguments[1:])


def run_command(verb: str, command: Command, words: list[str]) -> None:
    """Compose the command's options and run it, or print what a flag asks for."""
    load_plugins(command.schema, words)
    arguments = parse(verb, command, words)
    request = request_of(verb, command, arguments)
    if arguments.sweep:
        sweep(request, lambda options: start(command, options))
        return
    composed = compose(request)
    if arguments.show:
        print(as_yaml(composed), end="")
        return
    options = to_options(request, composed)
    if arguments.only == "--print-run":
        assert isinstance(options, config.TrainConfig)
        print(config.run_folder(options))
        return
    if arguments.only == "--print-slurm":
        print(slurm.job_script(words), end="")
        return
    if isinstance(options, config.VerifyConfig):
        folder = [] if arguments.config_dir is None else ["--config-dir", arguments.config_dir]
        options.overrides = [*folder, *(word for word in arguments.overrides if not word.startswith("output="))]
    start(command, options)


def request_of(verb: str, command: Command, arguments: Arguments) -> Request:
    return Request(verb, command.schema, arguments.overrides, arguments.config_dir, stored_options)


def stored_options(checkpoint: Path) -> dict[str, Any]:
    """The options inside a checkpoint, which the command then reads without opening the file again."""
    from segtrain.weights.network_file import run_content

    stored: dict[str, Any] = run_content(checkpoint, keep=True)["config"]
    return stored


def start(command: Command, options: config.CommandConfig) -> None:
    module, function = command.function.split(":")
    getattr(importlib.import_module(module), function)(options)


if __name__ == "__main__":
    main()

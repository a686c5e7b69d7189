"""`segtrain COMMAND key=value ...`. Nothing heavy is imported before a command runs."""

import contextlib
import difflib
import importlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from segtrain import __version__, config
from segtrain.cli import completion, slurm
from segtrain.cli.commands import ALIASES, COMMANDS, Command
from segtrain.cli.help import overview, usage
from segtrain.cli.python import stored_options
from segtrain.cli.words import Arguments, parse
from segtrain.config.compose import Request, as_yaml, combinations, compose, launch_by_hydra, load_plugins, to_options
from segtrain.console import launcher_note, printable, process_count, say
from segtrain.errors import INTERRUPTED, REQUEUE, SegtrainError, UsageError
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


def sleep_while_waiting() -> None:
    """Let OpenMP's threads sleep where they wait for each other, unless the user chose; before torch is imported.

    By default they spin, and on a machine with other work take the cores from those that they wait for.
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def main(argv: list[str] | None = None) -> None:
    """Entry point of the program `segtrain`; ends the process with the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    sleep_while_waiting()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # a file name that is no UTF-8 is printed as it is
    try:
        with terminable():
            run(arguments)
    except Terminated as error:
        stop(f"ended by {error}; nothing was saved since the last checkpoint", error.exit_status)
    except KeyboardInterrupt:
        stop("interrupted; nothing was saved since the last checkpoint", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except KNOWN as error:
        stop(*as_sentence(error))


KNOWN = (SegtrainError, OSError, MemoryError)  # that reach the user as one sentence


def as_sentence(error: BaseException) -> tuple[str, int]:
    """One of the KNOWN errors in a sentence, and its exit status."""
    if isinstance(error, SegtrainError):
        return message_of(error), error.exit_status
    if isinstance(error, OSError):
        where = f" {error.filename}" if error.filename else ""
        text = f"cannot write or read{where}: {reason_and_remedy(error)}"
        text += ". output=FOLDER writes elsewhere" if str(error.filename or "").startswith("segtrain-out") else ""
        return f"{text}. What was saved before is untouched.", 1
    return f"there is too little memory ({error or 'no more is given'}): make batch, crop, tile or image smaller", 1


def message_of(error: SegtrainError) -> str:
    """The error's message; empty where another process of this run prints it."""
    try:
        rank = os.environ["RANK"] if process_count() > 1 else None
    except UsageError:  # half a launcher: no other process is known to print it
        rank = None
    if rank is None:
        return str(error)
    shared = error.everywhere or isinstance(error, UsageError)  # options are the same for all
    first = (rank if error.everywhere else os.environ.get("LOCAL_RANK", rank)) == "0"  # options: once a machine
    silent = getattr(error, "quiet", False) or (shared and not first)
    return "" if silent else f"{error}" if shared else f"rank {rank}: {error}"


def stop(text: str, status: int) -> None:
    complain(f"{text}{launcher_note()}" if text else "")
    sys.exit(status)


def complain(text: str) -> None:
    sys.stdout.flush()
    if text:
        print(f"segtrain: {printable(text)}", file=sys.stderr, flush=True)


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
    process_count()  # the launcher's variables are wrong, or right for all that follows
    load_plugins(command.schema, words)
    arguments = parse(verb, command, words)
    request = request_of(verb, command, arguments)
    if arguments.sweep and any(word.startswith(("hydra/", "hydra.")) for word in request.words):
        launch_by_hydra(request, lambda options: start(command, options))
        return
    requests = combinations(request) if arguments.sweep else [request]
    composed = [compose(one) for one in requests]
    if arguments.show:
        print("---\n".join(map(as_yaml, composed)), end="")
        return
    jobs = [to_options(one, result) for one, result in zip(requests, composed, strict=True)]
    if arguments.only == "--print-run":
        for options in jobs:
            assert isinstance(options, config.TrainConfig)
            print(config.run_folder(options))
        return
    if arguments.only == "--print-slurm":
        print(slurm.job_script(words), end="")
        return
    for one, options in zip(requests, jobs, strict=True):
        if isinstance(options, config.VerifyConfig):
            folder = [] if one.config_dir is None else ["--config-dir", one.config_dir]
            options.overrides = [*folder, *(word for word in one.words if not word.startswith("output="))]
    if arguments.sweep:
        sweep(command, [" ".join(one.words) for one in requests], jobs)
    else:
        start(command, jobs[0])


class SweepFailed(SegtrainError):
    """Jobs of a sweep have failed; the exit status is the first one's."""

    def __init__(self, text: str, exit_status: int) -> None:
        super().__init__(text)
        self.exit_status = exit_status


def sweep(command: Command, names: list[str], jobs: list[config.CommandConfig]) -> None:
    """Run one job after the other. A failed one is reported and the others run; a stop request ends the sweep."""
    failed: dict[str, int] = {}
    for number, (name, options) in enumerate(zip(names, jobs, strict=True), 1):
        say(f"sweep      {number} of {len(jobs)}: {name}")
        try:
            start(command, options)
        except KNOWN as error:
            text, status = as_sentence(error)
            # After a failure several processes no longer find each other.
            if status in (REQUEUE, INTERRUPTED) or process_count() > 1:
                if left := len(jobs) - number:
                    say(f"sweep      {left} of {len(jobs)} jobs have not begun: start the same command again")
                raise
            complain(text)
            failed[name] = status
    if failed:
        listed = "".join(f"\n  {name}" for name in failed)
        raise SweepFailed(
            f"{len(failed)} of {len(jobs)} jobs of the sweep failed:{listed}", next(iter(failed.values()))
        )


def request_of(verb: str, command: Command, arguments: Arguments) -> Request:
    return Request(verb, command.schema, arguments.overrides, arguments.config_dir, stored_options)


def start(command: Command, options: config.CommandConfig) -> None:
    module, function = command.function.split(":")
    getattr(importlib.import_module(module), function)(options)


if __name__ == "__main__":
    main()

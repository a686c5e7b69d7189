"""A process that has imported segtrain and forks itself for every command, which saves the seconds to import torch.

A test still gets a process of its own, with signals, pipes and an exit status.

    process = zygote.start(["train", "experiment=toy"], {})  # used as a subprocess.Popen with text pipes
"""

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from pathlib import Path

from tests.helpers.checkout import ROOT, environment


class Started:
    """The interface of subprocess.Popen that the tests use."""

    def __init__(self, out, err, status):
        self.stdout, self.stderr, self.status = (os.fdopen(fd) for fd in (out, err, status))
        self.pid = int(self.status.readline())
        self.returncode = None
        self.over = threading.Event()
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self):
        self.returncode = os.waitstatus_to_exitcode(int(self.status.readline()))
        self.over.set()

    def poll(self):
        return self.returncode if self.over.is_set() else None

    def wait(self, timeout=None):
        if not self.over.wait(timeout):
            raise subprocess.TimeoutExpired("segtrain", timeout)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout=None):
        texts = {}
        pipes = {"out": self.stdout, "err": self.stderr}
        readers = [threading.Thread(target=lambda k=k, p=p: texts.update({k: p.read()})) for k, p in pipes.items()]
        for reader in readers:
            reader.daemon = True
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join(timeout)
        return texts["out"], texts["err"]


server = None


def call(arguments, folder=None):
    """Like subprocess.run of segtrain with captured text."""
    process = start(arguments, {}, folder)
    out, err = process.communicate()
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def start(arguments, more, folder=None):
    """Start `segtrain *arguments`, or the program in `-c PROGRAM *arguments`, with `more` in the environment."""
    global server
    if server is None:
        server, theirs = socket.socketpair()
        quiet = {**environment(), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.helpers.zygote", str(theirs.fileno())]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=quiet, cwd=ROOT)
        theirs.close()
        atexit.register(process.kill)
    pipes = [os.pipe() for _ in range(3)]
    order = {
        "arguments": list(map(str, arguments)),
        "environment": {**os.environ, **more},
        "folder": str(folder or Path.cwd()),
    }
    text = json.dumps(order).encode()
    socket.send_fds(server, [len(text).to_bytes(4, "big")], [write for _, write in pipes])
    server.sendall(text)
    for _, write in pipes:
        os.close(write)
    return Started(*(read for read, _ in pipes))


# ------------------------------------------------------------------------------------------------ in the zygote


def serve(connection):
    import albumentations  # noqa: F401  # what takes the time
    import hydra  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401

    import segtrain.engine.train  # noqa: F401

    while True:
        head, fds, _, _ = socket.recv_fds(connection, 4, 3)
        if not head:
            return
        size, text = int.from_bytes(head, "big"), b""
        while len(text) < size:
            text += connection.recv(size - len(text))
        if os.fork() == 0:
            keep(json.loads(text), connection, *fds)
        for fd in fds:
            os.close(fd)


def keep(order, connection, out, err, status):
    """The process between the two: forks the command, and reports its process id and exit status."""
    connection.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        os.close(status)
        work(order, out, err)
    for fd in (out, err):
        os.close(fd)
    os.write(status, f"{pid}\n".encode())
    ended = os.waitpid(pid, 0)[1]
    os.write(status, f"{ended}\n".encode())
    os._exit(0)


def work(order, out, err):
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests run under nohup
    os.dup2(out, 1)
    os.dup2(err, 2)
    for fd in {out, err} - {1, 2}:
        os.close(fd)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", 1)
    os.chdir(order["folder"])
    os.environ.clear()
    os.environ.update(order["environment"])
    arguments = order["arguments"]
    code = 1
    try:
        if arguments[0] == "-c":
            sys.argv = ["-c", *arguments[2:]]
            exec(arguments[1], {"__name__": "__main__"})
        else:
            from segtrain.cli import entry as cli

            cli.main(arguments)
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the keepers between need no one
    signal.signal(signal.SIGINT, signal.default_int_handler)
    serve(socket.socket(fileno=int(sys.argv[1])))

"""Processes that start in milliseconds: each is forked from a server that has imported and run everything once.

Unlike `processes`, whose server imports only other libraries, they start inside this library's warm caches.
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import processes

HUNG = "hung"
"""What `Forks.finish` returns for a process that had to be killed because it did not end."""


class Forks:
    """Starts processes that call functions.

    Args:
        prepare: A function of a module in tests/support or tests/fuzz, which the server calls once.
        *arguments: The arguments of `prepare`.
    """

    def __init__(self, prepare: Callable[..., object], *arguments: Any) -> None:
        self._connection, theirs = processes.context.Pipe()
        server = processes.context.Process(target=_serve, args=(theirs, prepare, arguments), daemon=True)
        server.start()
        theirs.close()  # so that the end of a server that fails is noticed here
        self._connection.recv()

    def start(self, work: Callable[..., object], *arguments: Any, output: Path) -> int:
        """Start a process, and return its id. What it prints goes to the file `output`."""
        self._connection.send((work, arguments, output))
        process: int = self._connection.recv()
        return process

    def finish(self, process: int, seconds: float = 120) -> int | str:
        """Wait for the end of a process, and return its exit code, or minus the number of the signal that killed it."""
        self._connection.send(process)
        if self._connection.poll(seconds):
            code: int = self._connection.recv()
            return code
        os.kill(process, signal.SIGKILL)
        self._connection.recv()
        return HUNG


@cache
def forks(prepare: Callable[..., object], *arguments: Any) -> Forks:
    """The server that has called `prepare`."""
    return Forks(prepare, *arguments)


def _serve(connection: Connection, prepare: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server outlives Ctrl-C in the terminal until the parent ends
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(silence, stream.fileno())
    prepare(*arguments)
    connection.send(None)
    while True:
        try:
            message = connection.recv()
        except EOFError:
            return
        if isinstance(message, int):
            connection.send(os.waitstatus_to_exitcode(os.waitpid(message, 0)[1]))
            continue
        child = os.fork()
        if child == 0:
            connection.close()
            os._exit(_run(*message))
        connection.send(child)


def _run(work: Callable[..., object], arguments: tuple[Any, ...], output: Path) -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with output.open("w") as file:
            for stream in (sys.stdout, sys.stderr):
                os.dup2(file.fileno(), stream.fileno())
        work(*arguments)
    except SystemExit as error:
        return int(error.code or 0)
    except KeyboardInterrupt:
        return 130
    except BaseException:
        traceback.print_exc()
        return 70
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0

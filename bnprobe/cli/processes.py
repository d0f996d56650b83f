"""The command line in several processes of a torchrun launch: one output and one exit code."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from bnprobe.cli.streams import say
from bnprobe.errors import EXIT_ERROR, EXIT_NOTHING, BnprobeError, UsageError

if TYPE_CHECKING:
    from bnprobe.distributed import World

Ends = Callable[[int], int | None]
"""Announces the exit code of the command; returns None, or the code that another process announced before."""

TOGETHER = ("scan", "convert")
"""Commands that can run in several processes."""


def several_processes() -> bool:
    """Whether this is one of several processes, as in ``distributed.launched`` but without importing torch.

    Raises:
        UsageError: A variable of the launcher is no number, or out of its range.
    """
    if "MASTER_ADDR" not in os.environ:
        return False
    size = _whole("WORLD_SIZE", 1, MOST_PROCESSES, 1)
    if size > 1:
        _whole("RANK", 0, size - 1, 0)
        _whole("LOCAL_RANK", 0, size - 1, 0)
        _whole("LOCAL_WORLD_SIZE", 1, size, 1)
        _whole("MASTER_PORT", 1, 2**16 - 1, 1)
    return size > 1


MOST_PROCESSES = 2**20
"""Nobody's launch has more."""


def _whole(name: str, least: int, most: int, default: int) -> int:
    """A whole number in an environment variable.

    Raises:
        UsageError: It is something else.
    """
    text = os.environ.get(name, str(default))
    number = int(text) if text.isascii() and text.isdigit() and len(text) <= len(str(most)) else None
    if number is None or not least <= number <= most:
        raise UsageError(
            f"{name} is {text[:40]!r}, but must be a whole number from {least} to {most}. torchrun sets it; without"
            " torchrun, unset MASTER_ADDR to run bnprobe in one process."
        )
    return number


def is_main() -> bool:
    """Whether this process writes the output."""
    return not several_processes() or os.environ.get("RANK", "0") == "0"


def leave_when_interrupted() -> None:
    """Let Ctrl-C end the process at once: while modules are imported, nothing has begun.

    An exception would not do. A module of torch or NumPy whose import was interrupted is broken for good, and what uses
    it next fails, or recurses, in ways of its own.
    """
    if _is_usual(signal.default_int_handler):
        signal.signal(signal.SIGINT, _end_interrupted)


def _raise_when_interrupted() -> None:
    """Let Ctrl-C raise KeyboardInterrupt, as Python does: what is needed is imported, and the work begins."""
    if _is_usual(_end_interrupted):
        _interrupts.clear()
        signal.signal(signal.SIGINT, _raise_interrupt)


@contextmanager
def importing() -> Iterator[None]:
    """Import in this block what imports torch, which takes a second: check the options before. After it, work begins.

    In a launch of several processes torch is imported before, to connect them.
    """
    with _importing_torch():
        yield
    _raise_when_interrupted()


@contextmanager
def _importing_torch() -> Iterator[None]:
    _share_processors()
    collect_no_garbage()
    try:
        yield
    finally:
        collect_garbage()


def collect_no_garbage() -> None:
    """Until the work begins: what is imported makes hundreds of thousands of objects, which stay.

    A command that imports no torch never begins to: it reads, prints and ends.
    """
    if gc.isenabled() and "torch" not in sys.modules:
        gc.disable()
        _paused.append(True)


def collect_garbage() -> None:
    """Collect garbage again, and never look through what there is by now.

    To look through torch took a sixth of the time of a first scan, and a quarter of a second at its end; at the end of
    a command that only prints something it took longer than all else that ends.
    """
    if _paused:
        _paused.clear()
        gc.freeze()
        gc.enable()


_paused: list[bool] = []


def _share_processors() -> None:
    """Let idle OpenMP threads sleep early, unless the user has set this; only before torch is imported.

    By default they spin for milliseconds after every kernel. If another process (a loader's worker, another CI job)
    used the same cores, this made a scan of a small network 10 to 25 times slower; alone it is equally fast.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def put_back_interrupts() -> None:
    """Leave Ctrl-C to Python."""
    if _is_usual(_end_interrupted) or _is_usual(_raise_interrupt):
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_usual(handler: Any) -> bool:
    """Whether this thread may set handlers, and Ctrl-C has this one: neither ignored nor handled by an embedder."""
    return threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is handler


def _end_interrupted(number: int, frame: Any) -> NoReturn:
    if os.isatty(2):
        os.write(2, b"\r\x1b[K\x1b[?25h")  # a progress bar has hidden the cursor
    os.write(2, b"bnprobe: error: Interrupted.\n")
    os._exit(EXIT_NOTHING)


_interrupts: list[int] = []


def was_interrupted() -> bool:
    """Whether Ctrl-C has come since the work began: what fails then is no bug, but may be half an import."""
    return bool(_interrupts)


def _raise_interrupt(number: int, frame: Any) -> NoReturn:
    _interrupts.append(number)
    raise KeyboardInterrupt


def refuse_together(command: str | None) -> None:
    """Reject a command that cannot run in several processes.

    Raises:
        UsageError: The command was started in several processes.
    """
    if several_processes() and command is not None and command not in TOGETHER:
        raise UsageError(f"bnprobe {command} runs in one process only: start it without torchrun.")


def run_together(run: Callable[[Ends], None]) -> NoReturn:
    """Run the command line in every process of the launch, and end all with the same exit code.

    The first process to fail prints the reason; the others exit silently as soon as they notice. Only process 0 writes
    to stdout. SIGTERM acts like Ctrl-C: what was measured so far is reported.

    Args:
        run: Runs the command and raises SystemExit.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # hides warnings meant for authors of training loops
    with _importing_torch():
        from bnprobe.distributed import connected

    if not is_main():
        _silence_stdout()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a launcher in the background ignores it
    signal.signal(signal.SIGTERM, _as_interrupt)
    try:
        with connected() as world:
            code = _run_as_one(run, world)
    except BnprobeError as error:
        say(f"bnprobe: error: {error}")
        code = EXIT_ERROR
    except KeyboardInterrupt:
        say("bnprobe: error: Interrupted.")
        code = EXIT_NOTHING
    sys.exit(code)


def _run_as_one(run: Callable[[Ends], None], world: World) -> int:
    """Run the command and return the exit code of all processes."""
    board = world.board
    if board is None:
        return _code_of(run, _alone)
    failed: list[int] = []

    def ends(code: int) -> int | None:
        # A launcher ends all processes as soon as one has ended: the message must be out before.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        earlier = board.claim()
        failed.append(code if earlier is None else earlier)
        return earlier

    board.watch(_leave, _say_hanging)
    code = _code_of(run, ends)
    # Process 0 answers Ctrl-C if it still runs; a launcher ends all processes as soon as one ends with an error.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if failed:
        sys.stderr.flush()
        board.end(failed[0])
        board.farewell()
        return failed[0]
    code = world.share(code)
    board.close()
    world.wait()
    return code


def _code_of(run: Callable[[Ends], None], ends: Ends) -> int:
    try:
        run(ends)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _alone(code: int) -> None:
    return None


def _say_hanging(sentences: str) -> int:
    """From a thread, since the main one waits."""
    print(f"bnprobe: error: {sentences}", file=sys.stderr, flush=True)
    return EXIT_ERROR


def _leave(code: int) -> NoReturn:
    """End this process at once, from a thread: another process has failed, and nothing is left to do."""
    sys.stderr.flush()
    os._exit(code)


def _as_interrupt(number: int, frame: Any) -> None:
    signal.raise_signal(signal.SIGINT)


def _silence_stdout() -> None:
    """Discard all output to stdout, including that of the user's code and of libraries outside Python."""
    if sys.stdout is not None:
        sys.stdout.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

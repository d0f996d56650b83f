"""The command line in several processes of a torchrun launch: one voice, and one exit code."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from bnprobe.errors import EXIT_ERROR, EXIT_NOTHING, ProcessError, UsageError

if TYPE_CHECKING:
    from bnprobe.distributed import World

Ends = Callable[[int], int | None]
"""Says that the command ends with an exit code; None, or the code of a process that said so before."""

TOGETHER = ("scan", "convert")
"""Commands that several processes run together."""


def several_processes() -> bool:
    """Whether this is one process of several, as ``distributed.launched`` says; without torch, which takes seconds."""
    return "MASTER_ADDR" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def is_main() -> bool:
    """Whether this process writes the output."""
    return not several_processes() or os.environ.get("RANK", "0") == "0"


def refuse_together(command: str | None) -> None:
    """Refuse a command that has nothing to share out.

    Raises:
        UsageError: It was started in several processes.
    """
    if several_processes() and command is not None and command not in TOGETHER:
        raise UsageError(f"bnprobe {command} works in one process: start it without torchrun.")


def run_together(run: Callable[[Ends], None]) -> NoReturn:
    """Run the command line in every process of the launch, and end all with the same exit code.

    The process that is first to fail says why; the others leave without a word as soon as they see it. Only process 0
    writes to stdout. SIGTERM is taken for Ctrl-C: what was measured is reported.

    Args:
        run: Raises SystemExit.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # warnings for authors of training loops, from every process
    from bnprobe.distributed import connected

    if not is_main():
        _silence_stdout()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a launcher in the background has it ignored
    signal.signal(signal.SIGTERM, _as_interrupt)
    try:
        with connected() as world:
            code = _run_as_one(run, world)
    except ProcessError as error:
        print(f"bnprobe: error: {error}", file=sys.stderr)
        code = EXIT_ERROR
    except KeyboardInterrupt:
        print("bnprobe: error: Interrupted.", file=sys.stderr)
        code = EXIT_NOTHING
    sys.exit(code)


def _run_as_one(run: Callable[[Ends], None], world: World) -> int:
    """The exit code of all processes."""
    board = world.board
    if board is None:
        return _code_of(run, _alone)
    failed: list[int] = []

    def ends(code: int) -> int | None:
        earlier = board.end(code)
        failed.append(code if earlier is None else earlier)
        return earlier

    board.watch(_leave)
    code = _code_of(run, ends)
    # A Ctrl-C is process 0's to answer, if it still works; and a launcher ends all as soon as one has ended in error.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if failed:
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


def _leave(code: int) -> NoReturn:
    """End this process at once, from a thread: another one has failed, and there is nothing left to do here."""
    sys.stderr.flush()
    os._exit(code)


def _as_interrupt(number: int, frame: Any) -> None:
    signal.raise_signal(signal.SIGINT)


def _silence_stdout() -> None:
    """Also for what the user's code prints, and what is not written by Python."""
    sys.stdout.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

"""``bnprobe watch``: the log of a run, while it grows."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import random
import select
import signal
import struct
import termios
import time
from collections.abc import Iterator
from typing import Any

import pytest

from functional.command import CLEAN, ERROR, TIMEOUT, Workspace
from functional.processes import Forked
from functional.test_hostile_text import NASTY, TYPED, clean

START = {"event": "start", "step": 0, "version": "0.1.0", "model": "Net", "every": 100, "skipped": {}}
FINDING = {
    "event": "finding",
    "step": 216,
    "alarm": 200,
    "rule": "BN201",
    "cause": "small_batch",
    "severity": "error",
    "layers": ["bn1"],
    "message": "Batches are small.",
    "remedy": "Enlarge them.",
}


def sample(number: int, **changes: Any) -> dict[str, Any]:
    layers = {name: {"mismatch": 0.2, "equivalent_batch_size": 7.8, "r": 0.9, "d": 0.1} for name in ("bn1", "bn2")}
    loss = {"train": 0.25, "eval": 0.75}
    return {"event": "sample", "step": number, "samples": 8, "output": 0.4, "loss": loss, "layers": layers, **changes}


def lines(*events: dict[str, Any]) -> str:
    return "".join(f"{json.dumps(event)}\n" for event in events)


def test_a_pipe_gets_the_state_once(workspace: Workspace) -> None:
    workspace.write("run/monitor.jsonl", lines(START, sample(100), sample(200), FINDING))
    found = workspace.run("watch", "run")
    assert (found.code, found.stderr) == (CLEAN, "")
    assert "\x1b" not in found.stdout
    assert "the last at step 200" in found.stdout
    assert "✗ step 216: BN201 in bn1" in found.stdout
    assert workspace.run("watch", "run/monitor.jsonl").stdout == found.stdout


def test_a_resumed_run_replaces_what_it_does_again(workspace: Workspace) -> None:
    events = [START, sample(100), sample(200), FINDING, {**START, "step": 150}, sample(200, output=0.1), sample(300)]
    workspace.write("a.jsonl", lines(*events))
    text = workspace.run("watch", "a.jsonl").stdout
    assert "the last at step 300, of 8 samples, resumed at step 150" in " ".join(text.split())
    assert "Nothing was found" in text
    assert "▁▁▁\n" in text  # a curve of three samples


def test_layers_that_are_changed_at_the_moment(workspace: Workspace) -> None:
    def change(action: str, *layers: str) -> dict[str, Any]:
        return {"event": "change", "step": 216, "action": action, "layers": layers}

    events = [START, sample(100), change("renorm", "bn1", "bn2"), change("undo", "bn1"), change("recalibrate", "bn3")]
    workspace.write("a.jsonl", lines(*events))
    found = workspace.run("watch", "a.jsonl").stdout.splitlines()
    assert "renorm   bn2" in found
    assert not any("bn3" in line for line in found)
    workspace.write("a.jsonl", lines(*events, START))
    assert "bn2" not in workspace.run("watch", "a.jsonl").stdout


def test_lines_that_are_cut_off_damaged_or_of_a_newer_version(workspace: Workspace) -> None:
    whole = lines(START, sample(100))
    odd = [
        *(sample(200, step=step) for step in ("x", 10**30, True)),
        *(sample(200, **change) for change in ({"layers": 3}, {"loss": {"train": 1}}, {"output": "x"})),
        *({**FINDING, **change} for change in ({"layers": "bn"}, {"message": None}, {"step": -1})),
    ]
    for event in odd:
        workspace.write("a.jsonl", whole + lines(event))
        assert "damaged  1 line\n" in workspace.run("watch", "a.jsonl").stdout, event
    workspace.write("a.jsonl", whole + '{"event": "sam\n[]\n\xff\n' + lines({"event": "more"}, sample(200)))
    text = workspace.run("watch", "a.jsonl").stdout
    assert "damaged  3 lines\n" in text
    assert "the last at step 200" in text
    workspace.write("a.jsonl", whole + lines(sample(200))[:-20])
    text = workspace.run("watch", "a.jsonl").stdout
    assert "the last at step 100" in text
    assert "damaged" not in text


VALUES = (0, -1, 1e300, -1e300, None, "", "x\x1b", [], {}, True, 10**400)


def test_a_log_with_any_other_value_is_shown_or_refused(workspace: Workspace) -> None:
    """No value of a file that others have written may look like a bug of bnprobe's."""
    events = [START, sample(100), {"event": "change", "step": 1, "action": "renorm", "layers": ["bn2"]}, FINDING]
    places = list(_places(events))
    chance = random.Random(0)
    for _ in range(120):
        *path, last = chance.choice(places)
        changed = json.loads(json.dumps(events))
        node: Any = changed
        for key in path:
            node = node[key]
        node[last] = chance.choice(VALUES)
        workspace.write("a.jsonl", "".join(f"{json.dumps(event)}\n" for event in changed))
        found = clean(workspace.run("watch", "a.jsonl", "--all"))
        assert found.code == CLEAN if path[:1] != [0] and path else found.code in (CLEAN, ERROR)


def _places(value: Any, *path: Any) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from _places(item, *path, key)


def test_what_is_no_log(workspace: Workspace) -> None:
    def said(*arguments: str) -> str:
        return workspace.run("watch", *arguments).error()

    workspace.write("one/two/monitor.jsonl", lines(START))
    (workspace.folder / "empty").mkdir()
    assert said("none") == (
        "none is neither the log of a monitor, a file of JSON lines, nor a folder with monitor.jsonl."
    )
    assert said("one") == "The folder one has no monitor.jsonl. Did you mean one/two?"
    assert said("empty") == "The folder empty has no monitor.jsonl. bnprobe.Monitor(model, log=...) writes one."
    for text in (
        "no JSON\n",
        "[]\n",
        "{}\n",
        lines(sample(100)),
        lines({**START, "model": None}),
        "\x00\n",
        "9" * 5000 + "\n",
    ):
        workspace.write("other", text)
        assert said("other") == 'other is no log of a monitor: its first line is none with "event": "start".'
    workspace.write("new.jsonl", "")
    assert workspace.run("watch", "new.jsonl").stdout == "– new.jsonl is empty: the run has not begun.\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_names_that_a_terminal_would_obey(workspace: Workspace, terminal: bool) -> None:
    layers = {NASTY: sample(0)["layers"]["bn1"]}
    finding = {**FINDING, **dict.fromkeys(("rule", "cause", "severity", "message", "remedy"), NASTY), "layers": [NASTY]}
    start = {**START, "model": NASTY, "version": NASTY, "skipped": {NASTY: NASTY}}
    workspace.write(f"{TYPED}.jsonl", lines(start, sample(100, layers=layers), finding))
    if not terminal:
        assert clean(workspace.run("watch", f"{TYPED}.jsonl")).code == CLEAN
        return
    with View(workspace, f"{TYPED}.jsonl") as view:
        seen = view.until("Remedy: ")
    assert not {"\x9b", "\x07", "\x08", "\u202e", "\x00", "\u2028"} & set(seen)
    assert "\x1b[2J" not in seen
    assert "\x1b[2J" in NASTY


class View:
    """The command in a terminal."""

    def __init__(self, workspace: Workspace, *arguments: str) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 60, 100, 0, 0))
        self.command = Forked(workspace, ("watch", *arguments), {}, terminals={"stdout": slave})
        os.close(slave)

    def __enter__(self) -> View:
        return self

    def __exit__(self, *error: object) -> None:
        self.command.kill()
        os.close(self._master)

    def until(self, text: str) -> str:
        """What the terminal is sent until a text comes."""
        seen, end = b"", time.monotonic() + TIMEOUT
        while text not in seen.decode(errors="replace"):
            assert time.monotonic() < end, seen
            if select.select([self._master], [], [], 0.1)[0]:
                seen += os.read(self._master, 65536)
        return seen.decode()


def test_a_terminal_follows_the_log_until_ctrl_c(workspace: Workspace) -> None:
    path = workspace.write("run/monitor.jsonl", lines(START))
    with View(workspace, "run") as view:
        view.until("none yet")
        half = lines(sample(100))
        with path.open("a") as file:
            file.write(half[:40])
            file.flush()
            time.sleep(0.8)
            file.write(half[40:])
        view.until("the last at step 100")
        with path.open("a") as file:
            file.write(lines(FINDING))
        view.until("BN201")
        path.unlink()
        workspace.write("run/monitor.jsonl", lines({**START, "model": "Another"}))
        assert "BN201" not in view.until("Nothing was found").partition("Another")[2]
        view.command.send_signal(signal.SIGINT)
        _, stderr = view.command.communicate(timeout=TIMEOUT)
    assert (view.command.returncode, stderr) == (CLEAN, "")

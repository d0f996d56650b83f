"""The command that a scan prints last runs as it is printed."""

from __future__ import annotations

import shlex

import pytest

from functional.command import CLEAN, FINDINGS, MODEL, SHIFTED, Workspace

LOSS = "\n\ndef loss(model, batch):\n    return model(batch[0]).square().mean()\n"
HELD_OUT = """

def load_eval_data(batch_size):
    return DataLoader(TensorDataset(images() + 1), batch_size=batch_size)
"""
SORTED = """

def load_data(batch_size):
    rising = images() + torch.linspace(-2, 2, IMAGES)[:, None, None, None]
    return DataLoader(TensorDataset(rising), batch_size=batch_size)
"""
MIXED = MODEL.replace("self.head(self.bn(x)", "self.head(self.bn(x + 0.1 * x.flip(0))")
"""Every sample gets a part of another one: micro-batches cannot run together."""

CASES = {
    "clean": (MODEL, 2),
    "stale statistics": (SHIFTED, 2),
    "stale statistics, scored": (SHIFTED + LOSS, 2),
    "other data, without a loss": (MODEL + HELD_OUT, 2),
    "other data, with a loss": (MODEL + HELD_OUT + LOSS, 2),
    "small batches": (MODEL.replace("8, 8", "1, 1"), 2),
    "small batches that are mixed": (MIXED.replace("8, 8", "1, 1"), 2),
    "sorted": (MODEL + SORTED, 4),
    "one sample per batch": (MODEL, 1),
    "no statistics": (MODEL.replace("BatchNorm2d(2)", "BatchNorm2d(2, track_running_stats=False)"), 2),
}


@pytest.mark.parametrize("case", CASES)
def test_the_next_command_runs_as_printed(workspace: Workspace, case: str) -> None:
    text, size = CASES[case]
    workspace.write("model.py", text)
    found = workspace.run("scan", "model.py", "--batch-size", str(size))
    assert found.code in (CLEAN, FINDINGS)
    command = printed(found.stdout)
    assert command[0] == "bnprobe"
    assert workspace.run(*command[1:]).code in (CLEAN, FINDINGS)


def printed(text: str) -> list[str]:
    """The words of the command at the end of a report."""
    lines = text.rstrip().splitlines()
    start = max(number for number, line in enumerate(lines) if line.startswith("    bnprobe "))
    return shlex.split("\n".join(lines[start:]))

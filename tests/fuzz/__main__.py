"""The large run: ``PYTHONPATH=tests python -m fuzz 100000 [SEED]``.

Hypothesis looks for small examples, at a price; here are only the changes of ``inputs.py``, drawn by a plain random
generator, and the same tests.
"""

from __future__ import annotations

import random
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz import test_fuzz
from fuzz.inputs import CORPUS, TOKENS

SHARES = {"reports": 60, "states": 15, "checkpoints": 10, "specs": 10, "commands": 5}
"""How many of a hundred inputs are of which kind: those that are read fastest come most."""


def changed(chance: random.Random, kind: str) -> bytes:
    """A file of the corpus with up to six changes, as in ``inputs.changed``."""
    files = [path.read_bytes() for path in sorted((CORPUS / kind).iterdir())]
    data = chance.choice(files)
    for _ in range(chance.randint(0, 6)):
        at = chance.randint(0, len(data))
        until = min(len(data), at + chance.randint(0, 40))
        parts = (
            data[:at] + chance.choice(TOKENS) + data[at:],
            data[:at] + chance.choice(TOKENS) + data[until:],
            data[:at] + data[until:],
            data[:until] + data[at:],
            data[:at],
            data[:at] + chance.randbytes(chance.randint(1, 4)) + data[at + 1 :],
            data[:at] + chance.choice(files)[at:],
        )
        data = chance.choice(parts)
    return data


def one(chance: random.Random, kind: str, folder: Path) -> Callable[[], Any]:
    """A test of this kind with a random input."""
    inner = {
        name: getattr(test_fuzz, name).hypothesis.inner_test for name in dir(test_fuzz) if name.startswith("test_")
    }
    if kind == "reports":
        return lambda: inner["test_reports"](changed(chance, kind))
    if kind == "states":
        return lambda: inner["test_states"](folder, changed(chance, kind))
    if kind == "specs":
        other = None if chance.random() < 0.8 else changed(chance, kind)
        return lambda: inner["test_specs"](folder, changed(chance, kind), other)
    if kind == "commands":
        return lambda: inner["test_argument_lists"](folder, changed(chance, kind))
    name = chance.choice(["w.pt", "w.safetensors", "model.safetensors.index.json", "w"])
    key, prefix = chance.choice([None, None, "model", "", "a.b"]), chance.choice([None, None, "module", "."])
    data = changed(chance, kind)
    return lambda: inner["test_checkpoints"](folder, data, name, key, prefix, chance.random() < 0.5)


def main(count: int, seed: int) -> int:
    """Run so many inputs; the exit code."""
    chance, counts, failures = random.Random(seed), Counter[str](), 0
    with tempfile.TemporaryDirectory() as name:
        for number in range(count):
            (kind,) = chance.choices(list(SHARES), list(SHARES.values()))
            counts[kind] += 1
            try:
                one(chance, kind, Path(name))()
            except Exception:
                failures += 1
                print(f"[input {number} of seed {seed}: {kind}]\n{traceback.format_exc()[-1500:]}", file=sys.stderr)
            if (number + 1) % 5000 == 0:
                print(number + 1, dict(counts), f"{failures} failures", flush=True)
    print(f"{count} inputs: {dict(counts)}, {failures} failures")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))

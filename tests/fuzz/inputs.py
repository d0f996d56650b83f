"""Hostile input for tests: files of the committed corpus, changed a little, and values that nobody should give."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from hypothesis import strategies as st

CORPUS = Path(__file__).parent / "corpus"

TOKENS = (
    b"\x00",
    b"\xff",
    b"\n",
    b"\r",
    b"\t",
    b" ",
    b"[" * 200,
    b"{" * 200,
    b"[" * 3000,
    b"- " * 2000,
    b"]",
    b"}",
    b":",
    b": ",
    b"#",
    b"&a ",
    b"*a",
    b"<<: *a",
    b"!!int ",
    b"!!float ",
    b"!!binary ",
    b"!!timestamp ",
    b"!!set ",
    b"!!omap ",
    b"!!pairs ",
    b"!!null ",
    b"!!python/name:os.system ",
    b"? ",
    b"---\n",
    b"%YAML 9.9\n",
    b"null",
    b"~",
    b"true",
    b".nan",
    b".inf",
    b"1e999",
    b"-1",
    b"0",
    b"9" * 400,
    b"0x",
    b"1_0",
    b"1:2:3",
    b"2020-99-99",
    b"'",
    b'"',
    b"\\",
    b'"\\ud800"',
    b"NaN",
    b"Infinity",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"~nosuchuser/x.py",
    b"a" * 300 + b".py",
    b"../" * 50,
    b"/dev/null",
    b"/proc/self/mem",
    b"\x80\x02}q\x00.",
    b"PK",
)
"""What has a meaning to one of the readers, or is the end of another."""


@st.composite
def changed(draw: st.DrawFn, kind: str) -> bytes:
    """A file of the corpus with up to six changes: bytes put in, taken out, doubled, cut off, or taken from another."""
    files = sorted((CORPUS / kind).iterdir())
    data = draw(st.sampled_from(files)).read_bytes()
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, len(data)))
        until = min(len(data), at + draw(st.integers(0, 40)))
        match draw(st.integers(0, 6)):
            case 0:
                data = data[:at] + draw(st.sampled_from(TOKENS)) + data[at:]
            case 1:
                data = data[:at] + draw(st.sampled_from(TOKENS)) + data[until:]
            case 2:
                data = data[:at] + data[until:]
            case 3:
                data = data[:until] + data[at:]
            case 4:
                data = data[:at]
            case 5:
                data = data[:at] + draw(st.binary(min_size=1, max_size=4)) + data[at + 1 :]
            case _:
                other = draw(st.sampled_from(files)).read_bytes()
                data = data[:at] + other[at:]
    return data


SCALARS: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**25), 10**25),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ["model.py", "a:b", "*", "3,4", "SGD", "~", "x/../y", "a" * 300, "auto", "batch-renorm", "1e-3", "a.b.c"]
    ),
)


def nested(keys: st.SearchStrategy[Any], leaves: st.SearchStrategy[Any] = SCALARS) -> st.SearchStrategy[Any]:
    """Lists and mappings of such keys and leaves."""
    return st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=6
    )


def as_yaml(value: Any) -> bytes:
    """A value as a YAML document."""
    return yaml.safe_dump(value, allow_unicode=True).encode(errors="surrogatepass")


def _tensors() -> dict[str, Callable[[], Any]]:
    """Tensors that a checkpoint may hold."""
    return {
        "vector": lambda: torch.zeros(2),
        "matrix": lambda: torch.zeros(3, 2),
        "scalar": lambda: torch.zeros(()),
        "whole": lambda: torch.zeros((), dtype=torch.long),
        "empty": lambda: torch.zeros(0, 2),
        "complex": lambda: torch.zeros(2, dtype=torch.complex64),
        "half": lambda: torch.zeros(2, dtype=torch.bfloat16),
        "meta": lambda: torch.zeros(2, device="meta"),
        "sparse": lambda: torch.zeros(2).to_sparse(),
        "parameter": lambda: torch.nn.Parameter(torch.zeros(2)),
        "not finite": lambda: torch.full((2,), torch.nan),
        "view": lambda: torch.zeros(4)[::2],
        "module": lambda: torch.nn.BatchNorm1d(2),
        "nested": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(1)], layout=torch.jagged),
    }


NAMES = [
    "bn.weight",
    "bn.bias",
    "bn.running_mean",
    "bn.running_var",
    "bn.num_batches_tracked",
    "head.weight",
    "head.bias",
    "module.bn.weight",
    "state_dict",
    "model",
    "ema",
    "",
    ".",
    "module.",
    "a.b.c",
    "_extra_state",
    "bn._extra_state",
]


@st.composite
def saved(draw: st.DrawFn) -> bytes:
    """What torch.save wrote of nested mappings of tensors, and of much else; some contain themselves."""
    made = _tensors()
    odd = st.one_of(st.integers(-2, 3), st.none(), st.tuples(st.integers(0, 2)), st.text(max_size=3))
    keys = st.sampled_from(NAMES) | odd
    tree = draw(nested(keys, st.sampled_from(sorted(made)).map(lambda name: ("tensor", name)) | SCALARS))
    value = _built(tree, made)
    if draw(st.integers(0, 5)) == 0 and isinstance(value, dict | list):
        value = _around(value)
    file = io.BytesIO()
    try:
        torch.save(value, file, _use_new_zipfile_serialization=draw(st.booleans()))
    except Exception:  # of what cannot be saved at all
        return b""
    data = file.getvalue()
    return data[: draw(st.integers(0, len(data)))] if draw(st.integers(0, 4)) == 0 else data


def _built(tree: Any, made: dict[str, Callable[[], Any]]) -> Any:
    if isinstance(tree, tuple) and len(tree) == 2 and tree[0] == "tensor":
        return made[tree[1]]()
    if isinstance(tree, dict):
        return {key: _built(value, made) for key, value in tree.items()}
    return [_built(item, made) for item in tree] if isinstance(tree, list) else tree


def _around(value: Any) -> Any:
    if isinstance(value, list):
        value.append(value)
    else:
        value["state_dict"] = value
    return value

"""Read a file of weights without running code from it: safetensors, torch.save files, and folders of these."""

from __future__ import annotations

import json
import mmap
import pickle
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from bnprobe.config.spec import why_missing
from bnprobe.config.targets import ARGUMENTS, CONVERTED, ConversionMark
from bnprobe.errors import CheckpointError, first_line_of, reason_of
from bnprobe.loading.model import user_code
from bnprobe.numbers import count, listed
from bnprobe.paths import is_file, is_folder

_MOST_CLASSES = 4
_FILES_OF_A_FOLDER = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "model.pt",
    "model.pth",
)
"""What other libraries name the weights in the folder of a model, in the order of preference."""

_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar")


def weights_file(path: Path) -> Path:
    """The weights file that a path means: itself, or the one in that folder.

    Raises:
        CheckpointError: There is no such file, or a folder holds several.
    """
    if not is_folder(path):
        return path
    usual = next((path / name for name in _FILES_OF_A_FOLDER if is_file(path / name)), None)
    if usual is not None:
        return usual
    if is_file(path / ".metadata"):
        raise CheckpointError(
            f"{path} is a distributed checkpoint of PyTorch. Convert it to one file first: python -m"
            f" torch.distributed.checkpoint.format_utils dcp_to_torch {path} weights.pt"
        )
    try:
        found = sorted(each for each in path.iterdir() if each.suffix in _SUFFIXES and is_file(each))
    except OSError as error:
        raise CheckpointError(f"The folder {path} could not be read: {reason_of(error)}.") from None
    if len(found) == 1:
        return found[0]
    if not found:
        raise CheckpointError(f"{path} is a folder without a weights file ({', '.join(_SUFFIXES)}).")
    raise CheckpointError(
        f"{path} is a folder with {len(found)} weights files: {listed([each.name for each in found])}. Name one."
    )


def read_weights(path: Path, unsafe_load: bool = False) -> tuple[Any, tuple[str, ...]]:
    """Read a file of weights onto the CPU.

    Only tensors, and plain containers of these, are read from a file of torch.save. An object of any other class is
    replaced by a ``Stub``: its class is not imported, and nothing of it runs.

    Args:
        path: Of a file; see ``weights_file``.
        unsafe_load: Unpickle such objects as they are, which runs code from the file.

    Returns:
        What the file holds, and notes: which classes were left out.

    Raises:
        CheckpointError: The file does not exist, is damaged, or is no file of weights.
        UserCodeError: Unpickling ran the user's code, which raised.
    """
    _check_file(path)
    repeats = _examined(path)
    if path.name.endswith(".index.json"):
        return _read_shards(path), ()
    if is_safetensors(path):
        return _read_safetensors(path), ()
    if repeats and not unsafe_load:
        return _read_stubbed(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols: success, or the error, says enough
            return torch.load(path, map_location="cpu", weights_only=True), ()
    except pickle.UnpicklingError:
        return _read_unsafe(path) if unsafe_load else _read_stubbed(path)
    except Exception as error:  # a damaged file can make torch.load raise anything
        raise CheckpointError(_damaged(path, error)) from None


def read_arguments(path: Path) -> dict[str, Any]:
    """The arguments that the model of repaired weights was made of; empty where the file does not say."""
    if not is_safetensors(path):
        return {}
    with safe_open(path, framework="pt") as file:
        said = (file.metadata() or {}).get(ARGUMENTS, "{}")
    try:
        found = json.loads(said)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(_damaged(path, error)) from None
    return found if isinstance(found, dict) else {}


def read_conversion(path: Path) -> ConversionMark | None:
    """What the layers in a file were converted to, and how; None if plain BN may load it.

    Args:
        path: A file that ``read_weights`` has read.
    """
    if not is_safetensors(path):
        return None
    with safe_open(path, framework="pt") as file:
        mark = (file.metadata() or {}).get(CONVERTED)
    if mark is None:
        return None
    try:
        found = json.loads(mark)
        layers = found["layers"] if isinstance(found["layers"], dict) else dict.fromkeys(found["layers"], "")
        return ConversionMark(str(found["to"]), layers, dict(found.get("settings", {})))
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise CheckpointError(_damaged(path, error)) from None


def is_safetensors(path: Path) -> bool:
    """Judge by the name, or by the start of the header: eight bytes of length, then JSON."""
    try:
        with path.open("rb") as file:
            return path.suffix == ".safetensors" or file.read(10)[8:] == b'{"'
    except OSError as error:
        raise CheckpointError(f"The checkpoint {path} could not be opened: {reason_of(error)}.") from None


def _check_file(path: Path) -> None:
    if (missing := why_missing(path)) is not None:
        raise CheckpointError(f"The checkpoint {path} {missing}")
    if not path.is_file():
        raise CheckpointError(f"The checkpoint {path} is a pipe or a device. Save or copy it as a file.")
    if path.stat().st_size == 0:
        raise CheckpointError(f"The checkpoint {path} is empty (0 bytes). Save or copy it again.")
    if _starts_with(path, b"version https://git-lfs"):
        raise CheckpointError(
            f"The checkpoint {path} is a pointer of Git LFS, not the file that it stands for. Run: git lfs pull"
        )


def _starts_with(path: Path, start: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(start)) == start
    except OSError:  # said when the file is read
        return False


_MOST_EXPANDED = 20
"""An archive that is so many times larger when unpacked holds no weights: torch.save compresses nothing."""

_SMALL = 256 * 2**20
"""An archive with fewer bytes when unpacked does no harm."""


_MAKES_ANY_SIZE = b"bytearray"
"""What torch lets a pickle call, and what makes as many bytes of a number as it says."""


def _examined(path: Path) -> bool:
    """Whether a pickle in a file may call what makes many bytes of a few.

    Raises:
        CheckpointError: The file is a zip archive that unpacks to far more bytes than it has itself.
    """
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            _refuse_bomb(path, size, sum(entry.file_size for entry in entries))
            pickles = [entry for entry in entries if entry.filename.endswith("data.pkl")]
            return any(_MAKES_ANY_SIZE in archive.read(entry) for entry in pickles)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError, EOFError, zlib.error):
        pass  # no archive, or one that torch rejects
    if is_safetensors(path):
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(_MAKES_ANY_SIZE) >= 0


def _refuse_bomb(path: Path, size: int, unpacked: int) -> None:
    if unpacked > max(_SMALL, _MOST_EXPANDED * size):
        raise CheckpointError(
            f"The checkpoint {path} ({size:,} bytes) unpacks to {unpacked:,} bytes, so it holds no weights as"
            " torch.save writes them. If you trust it, load it and save it again."
        )


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path, device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(_damaged(path, error)) from None


def _read_shards(index: Path) -> dict[str, Any]:
    """The weights of a model that is saved in several files, which the index names."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(_damaged(index, error)) from None
    whole: dict[str, Any] = {}
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or name.endswith(".index.json"):
            raise CheckpointError(f"{index} names {name!r} as a file of weights, which is not a name in its folder.")
        part, _ = read_weights(index.parent / name)
        if not isinstance(part, Mapping):
            raise CheckpointError(f"{index.parent / name} does not hold a state dict, although {index.name} names it.")
        whole |= part
    return whole


def _read_unsafe(path: Path) -> tuple[Any, tuple[str, ...]]:
    try:
        with user_code(f"unpickling {path}"):
            return torch.load(path, map_location="cpu", weights_only=False), ()
    except (pickle.UnpicklingError, EOFError) as damage:
        raise CheckpointError(_damaged(path, damage)) from None


def _damaged(path: Path, error: Exception) -> str:
    reason = first_line_of(error)
    reason = reason.split(". ")[0]  # what follows is PyTorch's own advice, cut off at its line
    if _is_plain_pickle(path):
        return (
            f"The checkpoint {path} was written by pickle, not by torch.save. If you trust it, read it with pickle.load"
            " and save its state dict with torch.save."
        )
    return (
        f"The checkpoint {path} ({count(path.stat().st_size, 'byte')}) could not be read: it is truncated, damaged, "
        f"or neither safetensors nor a torch.save file ({reason[:200].rstrip('.')}). Save or copy it again."
    )


def _is_plain_pickle(path: Path) -> bool:
    """Whether a file is a whole pickle with names in it, and does not begin with the number of old torch.save files."""
    try:
        data = path.read_bytes()
    except OSError:
        return False
    old = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
    return data[:1] == b"\x80" and data[-1:] == b"." and old not in data[:32]


# ---- objects that are no tensors


class Stub(dict[Any, Any]):
    """Stands for an object of a class that is not imported. What unpickling does to the object, it takes and keeps.

    Attributes:
        class_name: Module and name of the class.
    """

    class_name: ClassVar[str] = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> Stub:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    __hash__ = object.__hash__  # type: ignore[assignment]  # it may be the key of a dict

    def __call__(self, *args: Any, **kwargs: Any) -> Stub:
        return Stub()

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if type(part) is dict:
                self.__dict__.update({str(name): value for name, value in part.items()})

    def append(self, item: Any) -> None:
        """As a list takes an item."""

    def extend(self, items: Any) -> None:
        """As a list takes items."""

    add = append


_MOST_MODULES = 100_000


def state_of(module: Stub) -> dict[str, Any] | None:
    """The state dict of a pickled ``nn.Module``; None if the object was no module, or one without an end."""
    visited = 0

    def state(module: Stub) -> dict[str, Any] | None:
        nonlocal visited
        visited += 1
        held = module.__dict__
        if not isinstance(held.get("_modules"), Mapping) or not isinstance(held.get("_parameters"), Mapping):
            return None
        buffers = held.get("_buffers")
        own = {**held["_parameters"], **(buffers if isinstance(buffers, Mapping) else {})}
        hidden = held.get("_non_persistent_buffers_set", ())
        found = {name: value for name, value in own.items() if isinstance(value, torch.Tensor) and name not in hidden}
        for name, child in held["_modules"].items():
            if visited > _MOST_MODULES:  # modules within modules that are shared: as many as there are paths
                raise RecursionError
            inner = state(child) if isinstance(child, Stub) else None
            found |= {f"{name}.{key}": value for key, value in (inner or {}).items()}
        return found

    try:
        return state(module)
    except RecursionError:
        return None


_TENSORS = {
    "collections": {"OrderedDict"},
    "builtins": {"set", "frozenset", "list", "dict", "tuple", "int", "float", "bool", "complex", "str", "bytes"},
    "torch": {"Size", "Tensor"},
    "torch.nn.parameter": {"Parameter", "Buffer"},
    "torch.serialization": {"_get_layout"},
    "torch.storage": {"UntypedStorage", "TypedStorage"},
    "_codecs": {"encode"},  # the bytes of an array
    "numpy": {"ndarray", "dtype"},
    "numpy.core.multiarray": {"_reconstruct"},
    "numpy._core.multiarray": {"_reconstruct"},
    "torch._utils": {
        "_rebuild_tensor",
        "_rebuild_tensor_v2",
        "_rebuild_tensor_v3",
        "_rebuild_parameter",
        "_rebuild_parameter_with_state",
        "_rebuild_sparse_tensor",
        "_rebuild_qtensor",
        "_rebuild_meta_tensor_no_storage",
    },
}
"""What a pickle may import, by module: what makes tensors, arrays and plain containers. Python 2 wrote
``__builtin__``."""


def _rebuild_from_type(function: Callable[..., Any], kind: Any, args: Any, state: Any) -> Any:
    """A tensor with attributes; one of a subclass that is not imported is a plain tensor."""
    if issubclass(kind, Stub):
        return function(*args)
    return torch._tensor._rebuild_from_type_v2(function, kind, args, state)


class _StubbingUnpickler(pickle.Unpickler):
    """Unpickles tensors and plain containers, and puts a stub in place of everything else."""

    left_out: set[str]

    def find_class(self, module: str, name: str) -> Any:
        module = "builtins" if module == "__builtin__" else module
        if (module, name) == ("torch._tensor", "_rebuild_from_type_v2"):
            return _rebuild_from_type
        if module == "builtins" and name == "bytes":
            return _bytes
        if name in _TENSORS.get(module, ()) or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        if module == "torch" and name.endswith("Storage"):  # files from before the zip format
            return super().find_class(module, name)
        self.left_out.add(f"{module}.{name}")
        return type(name, (Stub,), {"class_name": f"{module}.{name}", "__module__": __name__})


def _bytes(*given: Any) -> bytes:
    """As ``bytes``, but not of a number, of which it would make as many zeros."""
    return bytes(*given) if given and not isinstance(given[0], int) else b""


def _read_stubbed(path: Path) -> tuple[Any, tuple[str, ...]]:
    """Read a torch.save file that holds more than tensors."""
    left_out: set[str] = set()
    unpickler = type("Unpickler", (_StubbingUnpickler,), {"left_out": left_out})

    def load(file: Any, **options: Any) -> Any:
        return unpickler(file, **options).load()

    as_pickle: Any = SimpleNamespace(Unpickler=unpickler, load=load, __name__="pickle")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read = torch.load(path, map_location="cpu", pickle_module=as_pickle, weights_only=False)
    except Exception as error:  # a damaged file can make torch.load raise anything
        raise CheckpointError(_damaged(path, error)) from None
    names = sorted(left_out)
    more = f" and {len(names) - _MOST_CLASSES} more" if len(names) > _MOST_CLASSES else ""
    note = (
        f"{path.name} also holds objects of {', '.join(names[:_MOST_CLASSES])}{more}: they were left out, and none of"
        " their code was run."
    )
    return read, (note,) if names else ()

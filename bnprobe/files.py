"""Write files whole or not at all, and several together or none."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from bnprobe.errors import OutputError


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all: a neighbour is written first, then renamed. Links are followed.

    Raises:
        OutputError: It could not be written; what was there before is still there.
    """
    data = _encoded(content)
    try:
        if is_special(path):
            path.write_bytes(data)
        else:
            _replace(path.resolve(), data)
    except OSError as error:
        raise OutputError(f"{path} could not be written: {error.strerror or error}.") from None


def require_writable(path: Path, option: str = "--output") -> None:
    """Refuse an output file that could not be written, before anything is computed.

    Raises:
        OutputError: The folder is missing or read-only, or the file is a folder.
    """
    if path.is_dir():
        raise OutputError(f"{option} {path} is a folder; give a file name in it.")
    if is_special(path):
        return
    folder = (path.resolve() if path.is_symlink() else path).parent
    if not folder.is_dir():
        raise OutputError(f"The folder {folder} of {option} does not exist; create it first.")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"The folder {folder} of {option} cannot be written to.")


def require_new(paths: Iterable[Path], force: bool, option: str = "-o") -> None:
    """Refuse outputs that could not be written or would overwrite a file, before anything is computed.

    Args:
        paths: All files that a command writes.
        force: Existing files may be replaced.
        option: What names them, for messages.

    Raises:
        OutputError: Names the folder that is missing or read-only, or the files that exist.
    """
    paths = list(paths)
    for path in paths:
        require_writable(path, option)
    existing = [str(path) for path in paths if path.exists() and not is_special(path)]
    if existing and not force:
        exist = "exists" if len(existing) == 1 else "exist"
        raise OutputError(f"{', '.join(existing)} {exist} already; give another {option}, or --force to overwrite.")


def write_all(contents: Mapping[Path, bytes | str], force: bool = False) -> None:
    """Write several files, all or none: a neighbour of each is written first, then all are renamed. Links are followed.

    Where a rename fails, or Ctrl-C comes between two, those done before are undone.

    Args:
        contents: What goes into each file; text becomes UTF-8.
        force: Existing files may be replaced.

    Raises:
        OutputError: A file could not be written, or exists; every file is as it was before.
    """
    require_new(contents, force)
    staged: dict[Path, Path] = {}
    try:
        for path, content in contents.items():
            if not is_special(path):
                target = path.resolve()
                staged[target] = _neighbour(target, "new")
                _write_through(staged[target], _encoded(content))
        for path, content in contents.items():
            if is_special(path):  # what is written to a device cannot be taken back: before anything is renamed
                path.write_bytes(_encoded(content))
        _rename_all(staged)
    except OSError as error:
        names = ", ".join(map(str, contents))
        reason = error.strerror or error
        raise OutputError(f"{names} could not be written: {reason}. No file was changed.") from None
    finally:
        for temporary in staged.values():
            temporary.unlink(missing_ok=True)


def is_special(path: Path) -> bool:
    """A pipe or device, such as /dev/null, which must be written to and never be replaced."""
    return path.exists() and not path.is_file()


def _encoded(content: str | bytes) -> bytes:
    return content.encode() if isinstance(content, str) else content


def _replace(path: Path, data: bytes) -> None:
    temporary = _neighbour(path, "new")
    try:
        _write_through(temporary, data)
        temporary.replace(path)
    finally:  # Ctrl-C too
        temporary.unlink(missing_ok=True)


def _rename_all(staged: Mapping[Path, Path]) -> None:
    """Put every staged file in its place, or none."""
    old = {path: _neighbour(path, "old") for path in staged}
    begun: list[Path] = []
    try:
        for path in staged:
            if path.exists():
                _keep(path, old[path])
        for path, temporary in staged.items():
            begun.append(path)
            temporary.replace(path)
    except BaseException:  # Ctrl-C too
        for path in begun:
            _undo(path, old[path])
        raise
    finally:
        for kept in old.values():
            kept.unlink(missing_ok=True)


def _keep(path: Path, old: Path) -> None:
    """The file under a second name."""
    try:
        old.hardlink_to(path)
    except OSError:  # a file system without links
        shutil.copy2(path, old)


def _undo(path: Path, old: Path) -> None:
    if old.exists():
        old.replace(path)
    else:
        path.unlink(missing_ok=True)


def _neighbour(path: Path, kind: str) -> Path:
    """A name in the same folder that no other process takes."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{kind}")


def _write_through(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())

"""Write files whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from bnprobe.errors import OutputError


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all: a neighbour is written first, then renamed. Links are followed.

    Raises:
        OutputError: It could not be written; what was there before is still there.
    """
    data = content.encode() if isinstance(content, str) else content
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


def is_special(path: Path) -> bool:
    """A pipe or device, such as /dev/null, which must be written to and never be replaced."""
    return path.exists() and not path.is_file()


def _replace(path: Path, data: bytes) -> None:
    with tempfile.NamedTemporaryFile("wb", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
        except BaseException:  # Ctrl-C too
            temporary.unlink(missing_ok=True)
            raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

"""Write files atomically, one or several together, and manage folders without removing other people's files."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from bnprobe.errors import OutputError, UsageError, reason_of

_MARK = "made-by-bnprobe.txt"
_SIGNATURE = "This folder was made by bnprobe"
_MARK_TEXT = f"{_SIGNATURE}, which removes only the files that it wrote here. Files of your own stay.\n"
_NEIGHBOUR = re.compile(r"\.(.+)\.[0-9a-f]{8}\.(?:new|old)")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file atomically: a temporary file beside it is written first, then renamed. Symbolic links are followed.

    Raises:
        OutputError: The file could not be written; a previous file is unchanged.
    """
    data = _encoded(content)
    try:
        if is_special(path):
            path.write_bytes(data)
        else:
            _replace(real(path), data)
    except OSError as error:
        raise OutputError(f"{path} could not be written: {reason_of(error)}.") from None


def require_writable(path: Path, option: str = "--output") -> None:
    """Reject an output file that cannot be written, before anything is computed.

    Raises:
        OutputError: The folder is missing or read-only, or the path is a folder.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        raise OutputError(f"{option} {path} cannot be written: {reason_of(error)}.") from None
    if path.is_dir():
        raise OutputError(f"{option} {path} is a folder; give a file in it.")
    if is_special(path):
        return
    folder = (real(path) if path.is_symlink() else path).parent
    if not folder.is_dir():
        raise OutputError(f"The folder {folder} of {option} does not exist; create it first.")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"The folder {folder} of {option} is not writable.")


def refuse_input(output: Path, inputs: Iterable[str | Path], option: str = "--output") -> None:
    """Reject an output that is one of the files that the command reads, whatever else may be overwritten.

    Raises:
        OutputError: It is; nothing was written.
    """
    for path in map(Path, inputs):
        if exists(output) and exists(path) and output.samefile(path):
            raise OutputError(f"{option} {output} is a file that this command reads; give another name.")


def require_new(paths: Iterable[Path], force: bool) -> None:
    """Reject outputs that cannot be written or would overwrite a file, before anything is computed.

    Args:
        paths: All files that a command writes.
        force: Whether existing files may be replaced.

    Raises:
        OutputError: A folder is missing or read-only, or files exist; the message names them.
    """
    paths = list(paths)
    for path in paths:
        if path != paths[0] and is_folder(path):
            raise OutputError(f"{path}, which is written beside -o, is a folder: move it or give another -o.")
        require_writable(path, "-o")
    existing = [str(path) for path in paths if exists(path) and not is_special(path)]
    if existing and not force:
        exist = "exists" if len(existing) == 1 else "exist"
        raise OutputError(f"{', '.join(existing)} already {exist}; give another -o, or --force to overwrite.")


def write_all(contents: Mapping[Path, bytes | str], force: bool = False) -> None:
    """Write several files, all or none: temporary files are written first, then all are renamed.

    If a rename fails, or Ctrl-C comes between two of them, the earlier ones are undone. Symbolic links are followed.

    Args:
        contents: Content of each file; text is encoded as UTF-8.
        force: Whether existing files may be replaced.

    Raises:
        OutputError: A file exists or could not be written; no file has changed.
    """
    require_new(contents, force)
    staged: dict[Path, Path] = {}
    try:
        for path, content in contents.items():
            if not is_special(path):
                target = real(path)
                staged[target] = _neighbour(target, "new")
                _write_through(staged[target], _encoded(content))
        for path, content in contents.items():
            if is_special(path):  # cannot be undone, so it comes before any rename
                path.write_bytes(_encoded(content))
        _rename_all(staged)
    except OSError as error:
        names = ", ".join(map(str, contents))
        reason = reason_of(error)
        raise OutputError(f"{names} could not be written: {reason}. No file was changed.") from None
    finally:
        for temporary in staged.values():
            temporary.unlink(missing_ok=True)


class OwnFolder:
    """A folder made by bnprobe. Files are removed only if its marker file is there, and only files that bnprobe wrote.

    Args:
        path: Path of the folder, which need not exist yet.
        written: Regular expression for the files that bnprobe writes: paths in the folder, with forward slashes.

    Attributes:
        path: Path of the folder.
    """

    def __init__(self, path: Path, written: str) -> None:
        self.path = path
        self._written = re.compile(written)

    def make(self) -> None:
        """Make the folder with its marker file; a folder that has the marker is left unchanged.

        Raises:
            OutputError: Something else has this name, or the folder cannot be written.
        """
        if os.path.lexists(self.path):
            self._require_mark()
            return
        with _writing(self.path):
            self.path.mkdir()
        try:
            write_whole(self.path / _MARK, _MARK_TEXT)
        except OutputError:
            self.path.rmdir()
            raise

    def clear(self) -> None:
        """Remove the files that bnprobe wrote, and subfolders that are then empty; the marker file stays.

        Raises:
            OutputError: The folder has no marker file, or a file cannot be removed.
        """
        self._require_mark()
        with _writing(self.path):
            files = self._files()
            for file in files:
                file.unlink()
        self._remove_emptied(files)

    def remove(self) -> None:
        """Remove what bnprobe wrote, and the folder itself if nothing else is in it.

        Raises:
            OutputError: The folder has no marker file, or a file cannot be removed.
        """
        self.clear()
        with _writing(self.path):
            (self.path / _MARK).unlink()
        _remove_empty(self.path)

    def move_to(self, other: OwnFolder) -> None:
        """Move the files that bnprobe wrote to another such folder, replacing those that it wrote there.

        Raises:
            OutputError: A folder has no marker file, or cannot be written.
        """
        self._require_mark()
        other.make()
        other.clear()
        with _writing(other.path):
            files = self._files()
            for file in files:
                place = other.path / file.relative_to(self.path)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(file, place)
        self._remove_emptied(files)
        self.remove()

    def _require_mark(self) -> None:
        if not has_mark(self.path):
            raise not_own(self.path)

    def _remove_emptied(self, gone: list[Path]) -> None:
        """Remove the subfolders that held these files and are now empty."""
        folders = {folder for file in gone for folder in file.parents if self.path in folder.parents}
        for folder in sorted(folders, key=lambda folder: len(folder.parts), reverse=True):
            _remove_empty(folder)

    def _files(self) -> list[Path]:
        """The files that bnprobe wrote, including temporary ones that a killed process left."""
        return [path for path in self.path.rglob("*") if not path.is_dir() and self._is_written(path)]

    def _is_written(self, path: Path) -> bool:
        neighbour = _NEIGHBOUR.fullmatch(path.name)
        path = path.with_name(neighbour[1]) if neighbour else path
        return bool(self._written.fullmatch(path.relative_to(self.path).as_posix()))


def has_mark(folder: Path) -> bool:
    """Whether this is a folder with bnprobe's marker file."""
    try:
        return (folder / _MARK).read_text(encoding="utf-8").startswith(_SIGNATURE)
    except (OSError, UnicodeDecodeError):
        return False


def not_own(path: Path) -> OutputError:
    """The error for a file or folder that has a name bnprobe needs, but that bnprobe must not touch."""
    return OutputError(f"{path} was not made by bnprobe: move it, or give another -o.")


def unfinished(path: Path) -> UsageError:
    """The error for the state of an unfinished repair that is neither to be resumed nor to be discarded."""
    return UsageError(
        f"{path} contains the state of an unfinished repair. Continue it with --resume, or discard it and start over"
        " with --force."
    )


# pathlib raises where the operating system refuses to say: without permission, for names that are too long, ...


def exists(path: Path) -> bool:
    """Whether something has this path, as far as the operating system tells."""
    return os.path.exists(path)  # noqa: PTH110


def is_file(path: Path) -> bool:
    """Whether this is a file, as far as the operating system tells."""
    return os.path.isfile(path)  # noqa: PTH113


def is_folder(path: Path) -> bool:
    """Whether this is a folder, as far as the operating system tells."""
    return os.path.isdir(path)  # noqa: PTH112


def is_special(path: Path) -> bool:
    """Whether this is a pipe or device, such as /dev/null, which must be written to but never replaced."""
    return exists(path) and not is_file(path)


def real(path: Path) -> Path:
    """The path with symbolic links followed; of links in a circle as far as they lead."""
    return Path(os.path.realpath(path))


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path} could not be written: {reason_of(error)}.") from None


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # not empty, or a link
        folder.rmdir()


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
    """Rename all staged files to their targets, or none."""
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
    """Keep the file under a second name."""
    try:
        old.hardlink_to(path)
    except OSError:  # a file system without hard links
        shutil.copy2(path, old)


def _undo(path: Path, old: Path) -> None:
    if old.exists():
        old.replace(path)
    else:
        path.unlink(missing_ok=True)


def _neighbour(path: Path, kind: str) -> Path:
    """A unique temporary name in the same folder."""
    name = os.fsencode(path.name)[: _LONGEST_NAME - len(".." + "12345678." + kind)]
    return path.with_name(f".{os.fsdecode(name)}.{secrets.token_hex(4)}.{kind}")


_LONGEST_NAME = 255
"""Bytes in the name of a file, on common file systems."""


def _write_through(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())

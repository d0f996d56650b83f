"""Write files atomically, one or several together, and manage folders without removing other people's files.

Locks are those of ``fcntl.lockf``. The kernel drops them with the process, however it ends, so that none outlives its
holder. Loader workers, which may outlive a run that was killed, do not inherit them, as they would those of ``flock``.
Where there are none (Windows, some network file systems), nothing is locked.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import socket
import stat
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from bnprobe import wording as words
from bnprobe.errors import OutputError, UsageError, reason_of
from bnprobe.paths import exists, followed, is_folder, is_special, real, write_special

if sys.platform == "win32":

    def try_lock(file: BinaryIO | FileIO) -> bool | None:
        """Windows has no such locks: None."""
        return None
else:
    import fcntl

    def try_lock(file: BinaryIO | FileIO) -> bool | None:
        """Lock a file for this process; False where another process has it locked, None where there are no locks."""
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        except OSError:  # a file system without locks
            return None
        return True


_MARK = "made-by-bnprobe.txt"
_SIGNATURE = "This folder was made by bnprobe"
_MARK_TEXT = f"{_SIGNATURE}, which removes only the files that it wrote here. Files of your own stay.\n"
_NEIGHBOUR = re.compile(r"\.(.+)\.[0-9a-f]{8}\.(new|old)", re.DOTALL)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file atomically: a temporary file beside it is written first, then renamed.

    Symbolic links are followed, and a file that is replaced passes on its owner and its rights.

    Raises:
        OutputError: The file could not be written; a previous file is unchanged.
    """
    data = _encoded(content)
    try:
        if is_special(path):
            write_special(path, data)
        else:
            _replace(followed(path), data)
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
    folder = (followed(path) if path.is_symlink() else path).parent
    if not folder.is_dir():
        raise OutputError(f"The folder {folder} of {option} does not exist; create it first.")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"The folder {folder} of {option} is not writable.")


def require_folder(folder: Path, option: str = "--output-dir") -> None:
    """Reject a folder for files that cannot be made or written to, before anything is computed.

    Raises:
        OutputError: Something else has its name, or the nearest folder above it that exists is read-only.
    """
    above = folder
    while not exists(above) and above != above.parent:
        above = above.parent
    if not is_folder(above):
        raise OutputError(f"{option} {folder} cannot be a folder: {above} is a file.")
    if not os.access(above, os.W_OK):
        raise OutputError(f"The folder {above} of {option} is not writable.")


def append(path: Path, text: str) -> None:
    """Write text at the end of a file.

    Raises:
        OutputError: It could not be written; a part of it may be there.
    """
    with _writing(path), path.open("a", encoding="utf-8") as file:
        file.write(text)


def make_folder(folder: Path, option: str = "--output-dir") -> None:
    """Make a folder, and those above it, where there is none.

    Raises:
        OutputError: It could not be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise OutputError(f"{option} {folder} could not be made: {reason_of(error)}.") from None


def refuse_input(output: Path, inputs: Iterable[str | Path], option: str = "--output") -> None:
    """Reject an output that is one of the files that the command reads, whatever else may be overwritten.

    Raises:
        OutputError: It is; nothing was written.
    """
    for path in map(Path, inputs):
        if exists(output) and exists(path) and output.samefile(path):
            raise OutputError(f"{option} {output} is a file that this command reads; give another name.")


def require_new(paths: Iterable[Path], force: bool, option: str = "-o") -> None:
    """Reject outputs that cannot be written or would overwrite a file, before anything is computed.

    Args:
        paths: All files that a command writes.
        force: Whether existing files may be replaced.
        option: What named the files, for messages.

    Raises:
        OutputError: A folder is missing or read-only, or files exist; the message names them.
    """
    paths = list(paths)
    for path in paths:
        if path != paths[0] and is_folder(path):
            raise OutputError(f"{path}, which is written beside {option}, is a folder: move it or give another.")
        require_writable(path, option)
    existing = [str(path) for path in paths if exists(path) and not is_special(path)]
    if existing and not force:
        exist = "exists" if len(existing) == 1 else "exist"
        raise OutputError(
            f"{', '.join(existing)} already {exist}; give another {option}, or"
            f" {words.option('--force', True)} to overwrite."
        )


def write_all(contents: Mapping[Path, bytes | str], force: bool = False, option: str = "-o") -> None:
    """Write several files, all or none: temporary files are written first, then all are renamed.

    If a rename fails, or Ctrl-C comes between two of them, the earlier ones are undone. Symbolic links are followed,
    and a file that is replaced passes on its owner and its rights.

    Args:
        contents: Content of each file; text is encoded as UTF-8.
        force: Whether existing files may be replaced.
        option: What named the files, for messages.

    Raises:
        OutputError: A file exists or could not be written; no file has changed.
    """
    require_new(contents, force, option)
    staged: dict[Path, Path] = {}
    try:
        with contextlib.ExitStack() as opened:
            for path, content in contents.items():
                if not is_special(path):
                    target = followed(path)
                    staged[target] = _neighbour(target, "new")
                    opened.enter_context(_written_through(staged[target], _encoded(content), target))
            for path, content in contents.items():
                if is_special(path):  # cannot be undone, so it comes before any rename
                    write_special(path, _encoded(content))
            _rename_all(staged, force)
    except FileExistsError as error:
        appeared = error.filename2 or error.filename
        raise OutputError(
            f"{appeared} has appeared since this run began, and no file was changed; move it, or give"
            f" {words.option('--force', True)}."
        ) from None
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
        begun = _neighbour(self.path, "new")
        with _writing(self.path):
            begun.mkdir()
            try:
                (begun / _MARK).write_text(_MARK_TEXT, encoding="utf-8")
                begun.rename(self.path)  # so that there is no moment in which it is there without its mark
            except BaseException:
                _discard(begun)
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

    def remove(self, inner: Iterable[OwnFolder] = ()) -> None:
        """Remove what bnprobe wrote, and the folder itself if nothing else is in it.

        A folder of which all is bnprobe's gets another name first, so that it is there whole or not at all.

        Args:
            inner: Such folders within this one, which are removed with it.

        Raises:
            OutputError: The folder has no marker file, or a file cannot be removed.
        """
        self._require_mark()
        inner = [folder for folder in inner if has_mark(folder.path)]
        with _writing(self.path):
            if all(path.is_dir() or any(each._owns(path) for each in (self, *inner)) for path in self.path.rglob("*")):
                _discard(self.path.rename(_neighbour(self.path, "old")))
                return
        for folder in inner:
            folder.remove()
        self.clear()
        with _writing(self.path):
            (self.path / _MARK).unlink()
        _remove_empty(self.path)

    def _owns(self, path: Path) -> bool:
        """Whether a file is the marker of this folder, or one that bnprobe wrote here."""
        return path == self.path / _MARK or (path.is_relative_to(self.path) and self._is_written(path))

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


def is_blank(folder: Path) -> bool:
    """Whether a folder of bnprobe's holds nothing but its marker file: a run was killed before it wrote anything."""
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError:
        return False
    return has_mark(folder) and all(name == _MARK or _NEIGHBOUR.fullmatch(name) for name in names)


def not_own(path: Path) -> OutputError:
    """The error for a file or folder that has a name bnprobe needs, but that bnprobe must not touch."""
    return OutputError(f"{path} was not made by bnprobe: move it, or give another -o.")


def unfinished(path: Path) -> UsageError:
    """The error for the state of an unfinished repair that is neither to be resumed nor to be discarded."""
    return UsageError(
        f"{path} contains the state of an unfinished repair. Continue it with --resume, or discard it and start over"
        " with --force."
    )


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path} could not be written: {reason_of(error)}.") from None


def _discard(folder: Path) -> None:
    """Remove a folder under a temporary name with all that is in it, its marker file last."""
    with suppress(OSError):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != _MARK:
                path.unlink()
        (folder / _MARK).unlink(missing_ok=True)
        folder.rmdir()


@contextmanager
def only_run(output: Path, others: Iterable[Path] = (), option: str = "-o") -> Iterator[None]:
    """Be the only run that writes to an output while the block runs, and remove what a killed one left half-written.

    Args:
        output: The file that the run is about.
        others: What else it writes beside it: files and folders.
        option: What named the output, for messages.

    Raises:
        OutputError: Another process writes there; the message names it. A process that is gone is in nobody's way.
    """
    path = real(output)
    lock = path.with_name(f".{_cut(path.name, '.lock')}.lock")
    with _writing(lock):
        file = _locked(lock, output, option)
    try:
        for each in (path, *map(real, others)):
            _sweep(each, ("new", "old"))
        yield
    finally:
        with suppress(OSError):
            lock.unlink()  # first, while nobody else can have it
        file.close()


def _locked(lock: Path, output: Path, option: str) -> BinaryIO:
    """The lock file, open and locked, with the name of this process in it."""
    while True:
        file = lock.open("a+b")
        if try_lock(file) is False:
            file.seek(0)
            holder = file.read(200).decode(errors="replace").strip()
            file.close()
            by = f": {holder}" if holder else ""
            raise OutputError(f"Another run writes to {output}{by}. Wait for its end, or give another {option}.")
        try:
            same = os.path.samestat(os.fstat(file.fileno()), lock.stat())
        except OSError:  # the run that held it has removed it between opening and locking
            same = False
        if same:
            file.truncate(0)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"process {os.getpid()} on {socket.gethostname()}, since {since}\n".encode())
            file.flush()
            return file
        file.close()


def _sweep(path: Path, kinds: Iterable[str]) -> None:
    """Remove what killed processes left of a file or folder under temporary names; what is being written stays."""
    with suppress(OSError):
        for entry in os.scandir(path.parent):
            found = _NEIGHBOUR.fullmatch(entry.name)
            if found is None or found[1] != path.name or found[2] not in kinds:
                continue
            left = Path(entry.path)
            if entry.is_dir(follow_symlinks=False):
                if has_mark(left) or not any(left.iterdir()):
                    _discard(left)
            elif not _is_open(left):
                left.unlink(missing_ok=True)


def _is_open(path: Path) -> bool:
    """Whether another process holds a file that it is writing."""
    try:
        with path.open("r+b") as file:
            return try_lock(file) is not True
    except OSError:
        return True


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # not empty, or a link
        folder.rmdir()


def _encoded(content: str | bytes) -> bytes:
    # A path may hold bytes that are no text; JSON reads the escape as the same character.
    return content.encode(errors="backslashreplace") if isinstance(content, str) else content


def _replace(path: Path, data: bytes) -> None:
    _sweep(path, ("new",))
    temporary = _neighbour(path, "new")
    try:
        with _written_through(temporary, data, path):
            temporary.replace(path)
    finally:  # Ctrl-C too
        temporary.unlink(missing_ok=True)


def _rename_all(staged: Mapping[Path, Path], force: bool) -> None:
    """Rename all staged files to their targets, or none.

    Raises:
        FileExistsError: A target is there, and may not be replaced; also if it has just appeared.
    """
    old = {path: _neighbour(path, "old") for path in staged}
    begun: list[Path] = []
    try:
        for path in staged:
            if path.exists():
                _keep(path, old[path])
        for path, temporary in staged.items():
            begun.append(path)
            if force:
                temporary.replace(path)
            else:
                _rename_new(temporary, path, begun)
    except BaseException:  # Ctrl-C too
        for path in begun:
            _undo(path, old[path])
        raise
    finally:
        for kept in old.values():
            kept.unlink(missing_ok=True)


def _rename_new(temporary: Path, path: Path, begun: list[Path]) -> None:
    """Give a file its new name where nothing has it; what is there is nothing to undo."""
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        begun.remove(path)
        raise
    except OSError:  # a file system without hard links
        if os.path.lexists(path):
            begun.remove(path)
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        temporary.replace(path)


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
    token = secrets.token_hex(4)
    return path.with_name(f".{_cut(path.name, f'.{token}.{kind}')}.{token}.{kind}")


def _cut(name: str, suffix: str) -> str:
    """As much of a name as leaves room for a dot before it and a suffix."""
    return os.fsdecode(os.fsencode(name)[: _LONGEST_NAME - 1 - len(suffix)])


_LONGEST_NAME = 255
"""Bytes in the name of a file, on common file systems."""


@contextmanager
def _written_through(path: Path, data: bytes, replaced: Path) -> Iterator[None]:
    """Write a new file to the disk, with the owner and the rights of the file that it is to replace, if there is one.

    While the block runs, it is locked: no other process takes it for a left one.
    """
    old = replaced.stat() if replaced.exists() else None
    rights = 0o666 if old is None else stat.S_IMODE(old.st_mode)
    with open(path, "xb", opener=lambda name, flags: os.open(name, flags, rights & 0o777)) as file:
        try_lock(file)
        if old is not None:
            with suppress(OSError):  # only root may give files away
                os.chown(file.fileno(), old.st_uid, old.st_gid)
            path.chmod(rights)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        yield

"""Files and folders that are always whole: whoever is killed leaves the old state or the new one.

A file is written in a staging folder beside it, then renamed. A *set*, files that belong together, is staged likewise,
and a manifest with sizes and digests is written last. Renaming the staging folder to its committed name is the point of
no return: what is left to do then (siblings of the set before go, files move into place, the manifest last) can be done
again, and whoever finds a committed folder does so (:func:`settle`).
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Any

from clipft.errors import line_of, listed, shown
from clipft.locks import STAGING, held_folder

__all__ = [
    "check_file",
    "check_folder",
    "check_output",
    "check_places",
    "check_set",
    "drop_link",
    "empty",
    "expanded",
    "is_own_name",
    "locked",
    "may_be_a_file",
    "note_changes",
    "read_json",
    "replace_set",
    "set_of",
    "settle",
    "unchanged",
    "write_json",
    "write_manifest",
    "write_text",
    "writing",
]

_MOST_JSON = 64 << 20  # bytes; a description of this length is none
_COMMITTED, _PLAN = ".clipft-committed", ".plan.json"
_SMALL = 1 << 20  # bytes of a file that is worth a digest only to tell that it was edited
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_LONGEST = 255, 1024  # bytes of a name, and of one with the folders that it is in
_FILES = "files"  # key of a manifest: {name: [size, digest]}
_logger = logging.getLogger(__name__)

# ---- a file ----


def expanded(path: str | Path) -> Path:
    """With the home that a ~ stands for; where there is no such user it stays, and names no file."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  (Path's own ends in a RuntimeError)


def may_be_a_file(name: str) -> bool:
    """Whether a file in a folder, or in folders within it, can be called so; of others the system's errors are long."""
    try:
        own = name.encode()
    except UnicodeEncodeError:  # half a character
        return False
    return b"\0" not in own and len(own) <= _LONGEST[1] and max(map(len, own.split(b"/"))) <= _LONGEST[0]


def is_own_name(name: str) -> bool:
    """Whether it is that of a file right in a folder: of no other folder, nor of the folder itself ("", "..")."""
    return PurePath(name).name == name not in ("", "..") and "\\" not in name and may_be_a_file(name)


def check_file(path: Path) -> int:
    """The size of a file; that it is one, for who opens a pipe waits for ever.

    Raises:
        FileNotFoundError: there is nothing. ValueError: something else.
    """
    info = path.stat()
    if not stat.S_ISREG(info.st_mode):
        found = "a folder" if stat.S_ISDIR(info.st_mode) else "a pipe or a device"
        raise ValueError(f"{path}: expected a file, found {found}")
    return info.st_size


def read_json(path: Path, kind: type = dict) -> Any:
    """The object in a file, whoever wrote it; with ``kind`` ``list`` the list.

    Raises:
        FileNotFoundError: there is none. ValueError: no file, or no such JSON in it.
    """
    what = "a JSON object" if kind is dict else f"a JSON {kind.__name__}"
    if (size := check_file(path)) > _MOST_JSON:
        raise ValueError(f"{path}: expected JSON of at most {_MOST_JSON >> 20} MB, found {size >> 20} MB")
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError as error:
        raise ValueError(f"{path}: expected {what}, found one nested too deep to read") from error
    except ValueError as error:
        raise ValueError(f"{path}: expected {what}; the file is damaged ({line_of(error)})") from error
    if not isinstance(value, kind):
        raise ValueError(f"{path}: expected {what}, found a {type(value).__name__}")
    return value


def write_json(path: Path, value: Any) -> None:
    """As :func:`write_text`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """A reader sees the old file or the new one. Bytes of a name that are no UTF-8 are written as JSON's escapes."""
    with writing(path) as staged:
        staged.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yields where to write the file, which gets its name when the block ends without an error.

    Raises:
        OSError: it cannot be written; the error has its name.
    """
    if path.exists() and not path.is_file() and not path.is_dir():  # a device or a pipe
        with _disk_errors(path):
            yield path
        return
    with _disk_errors(path), _staged(path.parent, f".{path.name}", wait=True) as staging:
        staged = staging / path.name
        yield staged
        staged.chmod(staging.stat().st_mode & 0o666)  # some libraries write for the owner alone
        staged.replace(path)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """A full disk is an OSError with this name, whatever class the library that wrote gives it (the tokenizers' a bare
    Exception).
    """
    try:
        yield
    except Exception as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        code = int(found[1]) if found else error.errno if isinstance(error, OSError) else None
        if isinstance(error, OSError) and re.search(r"requested and \d+ written", str(error)):  # numpy's words
            code = errno.ENOSPC
        if code not in _NO_ROOM:
            raise
        raise OSError(code, os.strerror(code), str(path)) from error


def check_output(path: Path) -> None:
    """That a file can be written at this place, before the work whose result it is to hold.

    Raises:
        OSError: it cannot; the message names what is in the way.
    """
    check_places(path.parent, [path.name])
    check_folder(path.parent)


def check_folder(folder: Path, size: int = 1) -> None:
    """That so many bytes can be written into a folder, which may be there or not: before the work that comes first.

    Raises:
        NotADirectoryError, PermissionError, OSError: they cannot; the message names what is in the way.
    """
    found = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
    if not found.is_dir():
        raise NotADirectoryError(f"{folder}: expected a folder, {found} is none")
    if not os.access(found, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder}: expected a folder that may be written into")
    free = shutil.disk_usage(found).free
    if free < size:
        raise OSError(errno.ENOSPC, f"expected room for at least {size} bytes, found {free}", str(folder))


# ---- a set of files ----


@contextmanager
def replace_set(
    folder: Path,
    manifest: str,
    *,
    obsolete: Iterable[str] = (),
    replaces: Iterable[str] = (),
    keep: Collection[str] = (),
    tag: str | None = None,
) -> Iterator[Path]:
    """Yields an empty folder to write a whole set into; it takes the place of ``folder``'s when the block ends without
    an error. Files of the set before that are not in the new one go; all else in ``folder`` stays.

    Args:
        folder: for the set; made when needed.
        manifest: name of a JSON file, which is given the other files' sizes and digests; one of the set's own, or new.
        obsolete: patterns of names that go although no manifest knows them: what would pass for a part of the set.
        replaces: manifests of other sets that go too.
        keep: names and patterns that stay.
        tag: of a set that is a part of its folder only, and does not lock the rest: a name.

    Raises:
        BlockingIOError: another process is at it.
    """
    name = f".{tag}" if tag else ""
    with (
        _disk_errors(folder / tag if tag else folder),
        nullcontext() if tag else locked(folder),
        _staged(folder, name, wait=False) as staging,
    ):
        settle(folder, tag)
        yield staging
        files = write_manifest(staging, manifest)
        check_places(folder, (*files, manifest))
        for own in (*files, manifest):
            (staging / own).chmod(staging.stat().st_mode & 0o666)
        former = _former(folder, [manifest, *replaces], obsolete) - {*files, manifest}
        plan = {"move": [*files, manifest], "remove": sorted(own for own in former if not _matches(own, keep))}
        (staging / _PLAN).write_text(json.dumps(plan), encoding="utf-8")
        committed = folder / f"{_COMMITTED}{name}"
        drop_link(committed)
        _finish(folder, staging.rename(committed), tag)


def settle(folder: Path, tag: str | None = None) -> None:
    """Finish what a process that was killed had begun to put into place. To be called before a set is read."""
    committed = folder / f"{_COMMITTED}{f'.{tag}' if tag else ''}"
    if committed.is_symlink() or not committed.is_dir():
        return
    try:
        with suppress(FileNotFoundError), held_folder(committed, wait=True):  # not found: somebody else has done it
            _finish(folder, committed, tag)
    except ValueError as error:
        raise ValueError(f"{error}; remove {committed}, which clipft has not written like this") from error
    except OSError as error:
        raise OSError(
            f"{folder}: a process was killed while it put its files in place here, and that cannot be finished "
            f"({error}): it takes somebody who may write there"
        ) from error


def _finish(folder: Path, committed: Path, tag: str | None) -> None:
    """May be broken off anywhere, and begun again. The plan may be a stranger's: it reaches what is in the folder, and
    of a tagged set only files of that name.
    """
    if (committed / _PLAN).is_file():
        plan = read_json(committed / _PLAN)
        for name in _listed(plan, "remove", folder, tag):
            path = _place(folder, name)
            path.unlink(missing_ok=True)
            if path.parent != folder:
                with suppress(OSError):
                    path.parent.rmdir()
        for name in _listed(plan, "move", folder, tag):
            staged, path = _place(committed, name), _place(folder, name)
            if staged.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                staged.replace(path)
        (committed / _PLAN).unlink()
    shutil.rmtree(committed, ignore_errors=True)


def _listed(plan: dict[str, Any], key: str, folder: Path, tag: str | None) -> list[str]:
    names = plan.get(key)
    if not isinstance(names, list) or not all(isinstance(name, str) and name.startswith(tag or "") for name in names):
        raise ValueError(
            f"{folder / _COMMITTED}: expected a list of {f'names of {tag}' if tag else 'names'} under {key} in its "
            f"{_PLAN}, found {names!r:.80}"
        )
    return names


def _former(folder: Path, manifests: Iterable[str], obsolete: Iterable[str]) -> set[str]:
    """Names of what was written before. What its manifest alone knows counts only while it is as it was written."""
    patterns = list(obsolete)
    found = {path.relative_to(folder).as_posix() for pattern in patterns for path in folder.glob(pattern)}
    for manifest in manifests:
        for name, entry in (set_of(folder, manifest) or {}).items():
            if not _differs(folder, name, entry):
                found.add(name)
    return {name for name in found if _inside(folder, name) and not (folder / name).is_dir()}


def check_places(folder: Path, names: Iterable[str]) -> None:
    """That files of these names can be put into the folder.

    Raises:
        IsADirectoryError, NotADirectoryError: something else has such a name; it is named.
    """
    for name in names:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            raise IsADirectoryError(f"{path}: expected a file or nothing, found a folder: move it away")
        for above in path.parents[: len(Path(name).parents) - 1]:
            if above.is_symlink() or (above.exists() and not above.is_dir()):
                raise NotADirectoryError(f"{above}: expected a folder or nothing, found a file or a link: move it away")


def _place(folder: Path, name: str) -> Path:
    if not _inside(folder, name):
        raise ValueError(f"{folder}: expected names within the folder in its list of files, found {name!r}")
    return folder / name


def _inside(folder: Path, name: str) -> bool:
    """Whether a name is of a file in the folder, also with links taken into account."""
    above = Path(name).parent
    inside = not Path(name).is_absolute() and ".." not in Path(name).parts
    return inside and (folder / name).parent.resolve() == folder.resolve() / above


def _matches(name: str, patterns: Collection[str]) -> bool:
    return name in patterns or any(fnmatchcase(name, pattern) for pattern in patterns)


# ---- what a manifest says ----


def write_manifest(folder: Path, manifest: str, pattern: str = "*") -> list[str]:
    """Add sizes and digests of a folder's files to a JSON file in it, made when needed; returns their names."""
    path = folder / manifest
    about = read_json(path) if path.is_file() else {}
    files = [file for file in sorted(folder.rglob(pattern)) if file.is_file() and file != path]
    about[_FILES] = {file.relative_to(folder).as_posix(): [file.stat().st_size, _digest(file)] for file in files}
    path.write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return list(about[_FILES])


def set_of(folder: Path, manifest: str) -> dict[str, list[Any]] | None:
    """Sizes and digests of a set's files by name; None without a manifest, as of 0.1, or with one that is damaged."""
    try:
        files = read_json(folder / manifest)[_FILES]
        if not all(map(may_be_a_file, files)):
            return None
        return {str(name): [int(size), str(digest)] for name, (size, digest) in files.items()}
    except (OSError, ValueError, OverflowError, KeyError, TypeError, AttributeError):
        return None


def check_set(folder: Path, manifest: str, names: Iterable[str] | None = None) -> None:
    """That files are those that the manifest was written with. ``names``: what is read; default: all of the set.

    Raises:
        ValueError: the folder is a mix, or damaged.
    """
    files = set_of(folder, manifest)
    if files is None:
        return
    read = list(files if names is None else names)
    odd = [name for name in read if _differs(folder, name, files.get(name))]
    if odd:
        rest = [name for name in read if name not in odd]
        raise ValueError(
            f"{folder}: expected files that were written together: {shown(listed(odd))} not as {manifest} knows "
            f"{'it' if len(odd) == 1 else 'them'}{f', with which {shown(listed(rest))} belong' if rest else ''}. "
            "One or the other was changed or is of an earlier model: write all anew"
        )


def unchanged(folder: Path, manifest: str, name: str) -> bool:
    """Whether a file is the one that the manifest was written with."""
    files = set_of(folder, manifest) or {}
    return name in files and not _differs(folder, name, files[name])


def note_changes(folder: Path, manifest: str) -> None:
    """Of a folder that anybody may edit: a line where it is no longer as the manifest has it."""
    files = set_of(folder, manifest) or {}
    odd = [name for name, entry in files.items() if _differs(folder, name, entry, most=_SMALL)]
    if odd:
        _logger.warning("%s: %s changed since %s was written; taken as found", folder, shown(listed(odd)), manifest)


def _differs(folder: Path, name: str, entry: list[Any] | None, most: int | None = None) -> bool:
    path = folder / name
    if entry is None or not _inside(folder, name) or not path.is_file() or path.stat().st_size != entry[0]:
        return True
    return (most is None or entry[0] <= most) and _digest(path) != entry[1]


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb", buffering=0) as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def drop_link(path: Path) -> None:
    """Where a folder of ours is to be: a link is none, and what it leads to is not to be emptied."""
    if path.is_symlink():
        path.unlink()


def empty(folder: Path) -> None:
    """Remove all that is in it."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


# ---- locks ----


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """No other process may replace the folder's set, or lock it, meanwhile; it is made when needed, and goes again if
    nothing has come into it.

    Raises:
        BlockingIOError: another process has it.
        OSError: there cannot be such a folder, or nothing can be written into it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with held_folder(folder, wait=False, make=True):
        try:
            check_folder(folder)
            yield
        finally:
            for path in made:
                with suppress(OSError):
                    path.rmdir()


@contextmanager
def _staged(folder: Path, name: str, *, wait: bool) -> Iterator[Path]:
    """An empty folder, without what a killed process left in it; gone at the end unless it has been renamed."""
    staging = folder / f"{STAGING}{name}"
    drop_link(staging)
    with held_folder(staging, wait=wait, make=True):
        empty(staging)
        identity = staging.stat().st_ino
        try:
            yield staging
        finally:
            if staging.exists() and staging.stat().st_ino == identity:
                shutil.rmtree(staging)

"""Durable files: a name holds either the old content or the new one, whatever dies in between.

Whole files are written aside, fsynced and renamed into place, and the folder is fsynced; lines are appended
with one write. A full disk leaves nothing half under the final name.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from stat import S_ISDIR
from typing import Any

import yaml

from clipcluster.errors import UserError


def fsync_folder(folder: Path) -> None:
    """Make renames, links and deletions inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems sync no folders
            raise
    finally:
        os.close(descriptor)


def _write_aside(path: Path, content: bytes, *, private: bool = False, durable: bool = True) -> Path:
    """Write `content` beside `path`; returns the aside's path. Nothing stays behind on an error."""
    aside = path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part"
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666)
    try:
        try:
            _write_all(descriptor, content)
            if durable:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)  # a quota may be told only here
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    return aside


def _write_all(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def write_bytes(path: Path, content: bytes, *, private: bool = False, durable: bool = True) -> None:
    """Replace or create `path` with `content` in one step. On OSError the old file stays.

    A `private` file can be read and written by its owner alone, whatever the umask. Without `durable` a crash
    of the machine may take the new content back.
    """
    aside = _write_aside(path, content, private=private, durable=durable)
    try:
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    if durable:
        fsync_folder(path.parent)


def require_writable(option: str, path: Path, endings: Sequence[str]) -> None:
    """UserError where the file that an option names cannot be made there, before the work that fills it."""
    if path.suffix.lower() not in endings:
        raise UserError(f"{option} {path}: give a name that ends in {', '.join(endings)}")
    if path.is_dir():
        raise UserError(f"{option} {path}: is a folder; name a file")
    if not path.parent.is_dir():
        raise UserError(f"{option} {path}: {path.parent} is not a folder; make it first, or name another")
    try:
        _write_aside(path, b"", durable=False).unlink()
    except OSError as error:
        why = error.strerror
        raise UserError(f"{option} {path}: cannot be written ({why}); name another file") from error


def write_text(path: Path, text: str) -> None:
    """`write_bytes` in UTF-8."""
    write_bytes(path, text.encode())


def write_yaml(path: Path, mapping: Mapping[str, Any]) -> None:
    """`write_bytes` of a YAML mapping, its keys in their order; see `read_yaml`."""
    write_text(path, yaml.dump(dict(mapping), Dumper=_Dumper, sort_keys=False, allow_unicode=True))


class _Dumper(yaml.SafeDumper):
    """Writes every text so that reading gives it back."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    # PyYAML writes these line breaks as they are, and reads each as a space
    style = '"' if any(mark in text for mark in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def write_json(path: Path, value: Any, *, private: bool = False) -> None:
    """`write_bytes` of one JSON document, indented, with a newline at its end; see `finite`."""
    write_bytes(path, _document(value), private=private)


def _document(value: Any) -> bytes:
    return _encoded(json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _encoded(text: str) -> bytes:
    """JSON in UTF-8. What came from other bytes, as file names may, is escaped: JSON reads it back."""
    return text.encode(errors="backslashreplace")


NON_FINITE = "non_finite"


def finite(value: Any) -> Any:
    """`value` as JSON can express it: null for every NaN and infinity, at any depth.

    A mapping then names them, dotted, under `non_finite`: {"step": 3, "loss": nan} becomes
    {"step": 3, "loss": null, "non_finite": ["loss"]}. A value with finite numbers alone is returned as it is.
    """
    names: list[str] = []
    plain = _without_non_finite(value, "", names)
    if not names:
        return value
    if isinstance(plain, dict):
        plain[NON_FINITE] = sorted({*(plain.get(NON_FINITE) or ()), *names})
    return plain


def _without_non_finite(value: Any, name: str, names: list[str]) -> Any:
    """A copy of `value` with None for every NaN and infinity; their dotted names are added to `names`."""
    if isinstance(value, float) and not math.isfinite(value):
        names.append(name)
        return None
    prefix = f"{name}." if name else ""
    if isinstance(value, Mapping):
        return {key: _without_non_finite(inner, f"{prefix}{key}", names) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_non_finite(inner, f"{prefix}{at}", names) for at, inner in enumerate(value)]
    return value


class BrokenFile(UserError, ValueError):
    """A file holds something else than what belongs there; the message names it."""


def _broken(path: Path, what: str) -> BrokenFile:
    # Complete files are renamed into place, so that no kill leaves one behind.
    return BrokenFile(f"{path} {what}. Restore it, or delete it if no job of the run is running.")


def file_sha256(file: Path | int) -> str:
    """The hash of a file's bytes, in hex; of an open one (a descriptor) from its beginning."""
    digest = hashlib.sha256()
    with open(file, "rb", buffering=0, closefd=not isinstance(file, int)) as stream:
        stream.seek(0)
        while chunk := stream.read(4 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_json(path: Path) -> Any:
    """The JSON document in `path`. Raises FileNotFoundError, and BrokenFile where it is none."""
    content = path.read_bytes()
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"is not valid JSON: {_one_line(error)}") from error


def read_object(path: Path, **types: type) -> dict[str, Any] | None:
    """The JSON object in `path`, or None where there is no such file.

    `types` names the fields it must have, with the type of each. Raises BrokenFile where it has not, and
    UserError where the file may not be read.
    """
    try:
        value = read_json(path)
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise UserError(
            f"{path}: permission denied; files of a run may be readable by the user who started it alone. "
            "Run the command as that user."
        ) from error
    if not isinstance(value, dict):
        raise _broken(path, f"holds {type(value).__name__} where a JSON object is expected")
    for name, kind in types.items():
        if not isinstance(value.get(name), kind):
            raise _broken(path, f"has {value.get(name)!r:.60} as {name!r}, expected {kind.__name__}")
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """The YAML mapping in `path`; an empty file is an empty one. Raises FileNotFoundError and BrokenFile."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _broken(path, f"is not valid YAML: {_one_line(error)}") from error
    if value is not None and not isinstance(value, dict):
        raise _broken(path, f"holds {type(value).__name__} where a mapping is expected")
    return value or {}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def link_once(path: Path, value: Any) -> bool:
    """Make `path` with the JSON of `value` unless it exists; the first caller of all machines wins.

    Returns whether it was this caller. The file appears complete, over NFS too.
    """
    aside = _write_aside(path, _document(value))
    try:
        os.link(aside, path)
    except FileExistsError:
        # NFS may repeat a request whose answer was lost: two names for the aside mean that it was ours.
        return os.stat(aside).st_nlink == 2
    finally:
        aside.unlink(missing_ok=True)
    fsync_folder(path.parent)
    return True


def append_lines(path: Path, lines: Iterable[Mapping[str, Any]], *, durable: bool = False) -> None:
    """Append JSON lines to `path` with a single write, making the file if needed; `durable` fsyncs it.

    A torn line that a killed writer left is closed first, so that it spoils no other. On a full disk the file
    is cut back to what it was and OSError raised. One writer a file. For NaN and infinities see `finite`.
    """
    append_text(path, "".join(_line(line) for line in lines), durable=durable)


def _line(line: Mapping[str, Any]) -> str:
    return json.dumps(finite(line), ensure_ascii=False, separators=(",", ":"), allow_nan=False) + "\n"


def append_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Append `text` with a single write; `durable` fsyncs it. See `append_lines`."""
    # Opened and closed each time: closing makes the lines visible on other machines of a network file system.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        before = os.fstat(descriptor).st_size
        if before and os.pread(descriptor, 1, before - 1) != b"\n":
            text = "\n" + text
        try:
            _write_all(descriptor, _encoded(text))
            if durable:
                os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, before)
            raise
    finally:
        os.close(descriptor)


def read_lines(path: Path, *, last_bytes: int | None = None) -> list[dict[str, Any]]:
    """The JSON lines of `path`, or those that its `last_bytes` hold, torn ones left out.

    An absent file has none.
    """
    if last_bytes is None:
        return [line for lines in line_chunks(path) for line in lines]
    try:
        with path.open("rb") as stream:
            skipped = max(0, os.fstat(stream.fileno()).st_size - last_bytes)
            stream.seek(skipped)
            content = stream.read()
            return _objects(content.partition(b"\n")[2] if skipped else content)
    except FileNotFoundError:
        return []


def line_chunks(path: Path) -> Iterator[list[dict[str, Any]]]:
    """The JSON lines of `path` in their order, a few megabytes at a time, torn ones left out.

    An absent file has none.
    """
    try:
        stream = path.open("rb")
    except FileNotFoundError:
        return
    with stream:
        rest = b""
        while block := stream.read(_CHUNK):
            complete, _, rest = (rest + block).rpartition(b"\n")
            yield _objects(complete)
        yield _objects(rest)


_CHUNK = 4 << 20
_AT_ONCE = 8 << 10  # bytes from which a faster parser is worth its import


def _parsed(content: bytes) -> list[Any]:
    """A JSON list."""
    if len(content) < _AT_ONCE:
        return list(json.loads(content))
    from pydantic_core import from_json

    return list(from_json(content, cache_strings="keys"))


def _objects(content: bytes) -> list[dict[str, Any]]:
    """The JSON objects among lines: not those that are empty, torn by a kill, or cut where reading began."""
    content = content.removesuffix(b"\n")
    if not content:
        return []
    try:
        at_once = _parsed(b"[" + content.replace(b"\n", b",") + b"]")
    except (ValueError, RecursionError):  # some line is none: each for itself, below
        at_once = []
    if len(at_once) == content.count(b"\n") + 1 and set(map(type, at_once)) == {dict}:
        return at_once
    lines = []
    for text in content.split(b"\n"):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder. What vanishes meanwhile counts nothing."""
    total, waiting = 0, [path]
    while waiting:
        here = waiting.pop()
        with suppress(FileNotFoundError, NotADirectoryError):
            state = here.lstat()
            if S_ISDIR(state.st_mode):
                waiting += [here / name for name in os.listdir(here)]
            else:
                total += state.st_size
    return total

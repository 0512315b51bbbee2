"""Bytes of a remote file into a local one: streamed, resumed where the server can, hashed on the way.

`http(s)://` and `hf://` by the standard library (fsspec's needs another package and ends every request after
five minutes), `pipe:COMMAND` by a shell, everything else by fsspec. Imports no torch.
"""

import base64
import contextlib
import errno
import hashlib
import http.client
import logging
import os
import re
import select
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit, urlunsplit

from clipcluster.data.storage.urls import (
    PIPE,
    Forbidden,
    OtherContent,
    Refused,
    RemoteFile,
    RemoteFolder,
    State,
    Unreachable,
    file_system,
    is_web,
    redacted,
)
from clipcluster.errors import UserError
from clipcluster.runs.files import file_sha256

RETRIES = (0.2, 1.0, 3.0, 8.0)  # seconds to wait before another try
QUESTIONS = (0.3, 1.5)  # the same for a question that a person waits for
SILENCE_S = 60.0  # a server or a command that sends nothing for so long has failed
ANSWER_S = 15.0  # the same for a question
PROGRESS = 16 << 20  # bytes gained by a try that reset the count of tries

_CHUNK = 1 << 20
_RANGE = 16 << 20  # bytes asked of fsspec at once
# what is not worth another try, though a server may answer so
_FINAL: dict[int, tuple[type[OSError], int]] = {
    **dict.fromkeys(set(range(400, 500)) - {408, 416, 425, 429}, (Refused, errno.EIO)),
    **dict.fromkeys((404, 410), (FileNotFoundError, errno.ENOENT)),
    **dict.fromkeys((401, 403), (Forbidden, errno.EACCES)),
}
_OURS = frozenset([errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG])  # this machine's, not the network's
_KINDS = "datasets/|spaces/"  # of repositories on the hub, beside models
_HUB = re.compile(rf"hf://({_KINDS}|(?!{_KINDS}))([^/]+)/([^/@]+)(?:@([^/]*))?/(.+)", re.DOTALL)
_STAMPS = ("ETag", "etag", "md5Hash", "blob_id", "LastModified", "last_modified", "updated", "mtime")

logger = logging.getLogger("clipcluster")


class Got(NamedTuple):
    """What a download brought: size in bytes, sha256 in hex, and the server's stamp."""

    size: int
    sha256: str
    stamp: int


class Transfer(NamedTuple):
    """A transfer: its first byte, the whole file's state, the ETag to resume by, and the bytes in pieces."""

    start: int
    state: State
    tag: str | None
    pieces: Iterator[bytes]


def stamp_of(text: str | None) -> int:
    """A negative number of 56 bits that stands for an ETag or a time; 0 for none."""
    return -1 - int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big") if text else 0


def state_of(address: str) -> State:
    """Size and stamp of a file by its server, without its bytes; a command tells neither.

    FileNotFoundError if it is gone, Unreachable or Refused as `download`.
    """
    if address.startswith(PIPE):
        return State(None, 0)
    return _patiently(address, partial(_ask if _web(address) else _told, address), QUESTIONS)


def read_beside(folder: RemoteFolder, name: str) -> bytes | None:
    """A small file in a folder or in the one above; None if it is in neither.

    One that is forbidden is none: a bucket that may not be listed answers so of what does not exist.
    """
    for place in (folder, folder.parent):
        if place is not None and not place.is_pipe:
            with contextlib.suppress(FileNotFoundError, Forbidden):
                return bytes(_patiently((place / name).address, partial(_read, place / name), QUESTIONS))
    return None


def _read(file: RemoteFile) -> bytes:
    with _opened(file.address, 0, None) as transfer:
        return b"".join(transfer.pieces)


def download(
    address: str,
    fd: int,
    *,
    reserve: Callable[[int], None],
    size: int | None = None,
    sha256: str | None = None,
) -> Got:
    """Writes a whole file to `fd`; `reserve(bytes)` is called before they are written.

    A broken transfer is tried again with growing waits, from the byte reached where that is possible. Raises
    Unreachable (an OSError) when the tries are used up, FileNotFoundError and Refused at once, OtherContent
    where the file has another size than `size`, or twice the same other hash than `sha256`.
    """
    transfer = _Download(address, fd, reserve, size, sha256)
    return _patiently(address, transfer.attempt, RETRIES, lambda: transfer.gained)


@dataclass
class _Download:
    """One file on its way; an attempt continues where the last one broke. What is hashed is the file."""

    address: str
    fd: int
    reserve: Callable[[int], None]
    size: int | None
    sha256: str | None
    gained: int = 0  # bytes that the last attempt brought
    _tag: str | None = None
    _wrong: str | None = None
    _done: int = 0  # bytes that are written, from the file's beginning
    _reserved: int = 0
    _whole: int | None = None  # the size by the index, or by the server, now or when the transfer began

    def attempt(self) -> Got:
        self.gained = 0
        # a byte once more: a transfer may break after its last one, and no server continues with nothing
        self._done = max(0, self._done - 1)
        with _opened(self.address, self._done, self._tag) as transfer:
            if transfer.start != self._done:
                self._done, self._whole = 0, None
            self._tag = transfer.tag
            told = transfer.state.size
            if self.size is not None and told not in (None, self.size):
                raise OtherContent(f"it has {told:,} bytes, the index has {self.size:,}")
            self._whole = self.size or told or self._whole
            self._reserve(self._whole or 0)
            for piece in transfer.pieces:
                self._write(piece)
        if self._whole is not None and self._done != self._whole:
            raise OSError(f"the transfer ended after {self._done:,} of {self._whole:,} bytes")
        return self._checked(transfer.state.stamp)

    def _reserve(self, size: int) -> None:
        self._reserved = max(size, self._done)  # what is written stays
        self.reserve(self._reserved)

    def _write(self, piece: bytes) -> None:
        end = self._done + len(piece)
        if self.size is not None and end > self.size:
            raise OtherContent(f"it has more than the {self.size:,} bytes in the index")
        if end > self._reserved:  # the size is not known
            self._reserve(end + max(_RANGE, end // 4))
        view = memoryview(piece)
        while view:
            written = os.pwrite(self.fd, view, self._done)
            self._done += written
            self.gained += written
            view = view[written:]

    def _checked(self, stamp: int) -> Got:
        done = self._done
        os.ftruncate(self.fd, done)
        found = file_sha256(self.fd)
        if self.sha256 is not None and found != self.sha256:
            self.gained = self._done = 0
            if found == self._wrong:
                raise OtherContent(f"its sha256 is {found}, the index has {self.sha256}")
            self._wrong, self._tag = found, None
            raise OSError(f"{done:,} bytes arrived with a hash that is not the index's")
        return Got(done, found, stamp)


def _patiently(
    address: str,
    action: Callable[[], Any],
    waits: Sequence[float],
    gained: Callable[[], int] = lambda: 0,
) -> Any:
    """Tries again with growing waits; what is final is raised at once."""
    failures = 0
    while True:
        try:
            return action()
        except (Refused, FileNotFoundError, UserError, OtherContent):
            raise
        except (OSError, http.client.HTTPException) as error:
            if getattr(error, "errno", None) in _OURS:
                raise
            cause: Any = getattr(error, "reason", None) or error  # what is behind urllib's own error
            reason = redacted(str(getattr(cause, "strerror", None) or cause)) or type(error).__name__
            failures = 1 if gained() >= PROGRESS else failures + 1
            if failures > len(waits):
                number = getattr(cause, "errno", None) or errno.EIO
                words = f"{reason} (tried {failures} times)"
                # whose own words may hold keys: a traceback shows them
                raise Unreachable(number, words, redacted(address)) from None
            logger.debug("%s: %s; trying again", redacted(address), reason)
            time.sleep(waits[failures - 1])


def _opened(address: str, start: int, tag: str | None) -> contextlib.AbstractContextManager[Transfer]:
    """The bytes of a file from `start` on, if it is still the one with that ETag; else from the beginning."""
    opener = _piped if address.startswith(PIPE) else _of_the_web if _web(address) else _by_fsspec
    return opener(address, start, tag)


def _ask(address: str) -> State:
    try:
        with _request(address, "HEAD") as answer:
            return _state(answer)
    except Refused:  # some servers, and signed addresses, answer nothing but GET
        with _request(address, "GET", {"Range": "bytes=0-0"}) as answer:
            return _state(answer)


# http, https and hf


def _web(address: str) -> str | None:
    """The address to ask by HTTP; None if another way leads there."""
    if is_web(address):
        return address
    if not address.startswith("hf://"):
        return None
    # The hub's own addresses: its client would refuse in a job, whose HF_HUB_OFFLINE is for names, not data.
    match = _HUB.fullmatch(address)
    if match is None:
        raise UserError(f"{redacted(address)}: write hf://datasets/OWNER/NAME/FILE (or …/NAME@REVISION/FILE)")
    kind, owner, name, revision, file = match.groups()
    root = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    return f"{root}/{kind}{owner}/{name}/resolve/{revision or 'main'}/{file}"


@contextlib.contextmanager
def _request(address: str, method: str, headers: dict[str, str] | None = None) -> Iterator[Any]:
    parts = urlsplit(_web(address) or address)
    user, at, host = parts.netloc.rpartition("@")
    target = urlunsplit(parts._replace(netloc=host, fragment=""))
    headers = {"User-Agent": "clipcluster", "Accept-Encoding": "identity", **(headers or {})}
    request = urllib.request.Request(target, headers=headers, method=method)
    if at:
        secret = base64.b64encode(unquote(user).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {secret}")
    elif address.startswith("hf://"):
        from huggingface_hub import get_token

        token = get_token()
        if token:  # not for the store that the hub sends us on to
            request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        patience = ANSWER_S if method == "HEAD" else SILENCE_S
        with urllib.request.urlopen(request, timeout=patience) as answer:
            yield answer
    except urllib.error.HTTPError as error:
        error.close()
        kind, number = _FINAL.get(error.code, (OSError, errno.EIO))
        words = f"the server answers {error.code} {error.reason}"
        raise kind(number, words, redacted(address)) from None


def _state(answer: Any) -> State:
    """Size and stamp from the headers of an answer."""
    whole = (answer.headers.get("Content-Range") or "").rpartition("/")[2]
    size = whole if answer.status == 206 else answer.headers.get("Content-Length") or ""
    stamp = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
    return State(int(size) if size.isdigit() else None, stamp_of(stamp))


@contextlib.contextmanager
def _of_the_web(address: str, start: int, tag: str | None) -> Iterator[Transfer]:
    headers = {"Range": f"bytes={start}-", "If-Range": tag} if start and tag else {}
    with _request(address, "GET", headers) as answer:
        begin = 0
        if answer.status == 206:
            first = (answer.headers.get("Content-Range") or "").removeprefix("bytes ").partition("-")[0]
            if first != str(start):
                raise Refused(5, "the server sent a range that was not requested", redacted(address))
            begin = start
        etag = answer.headers.get("ETag", "W/")
        mark = answer.headers.get("Last-Modified") if etag.startswith("W/") else etag
        yield Transfer(begin, _state(answer), mark, _body(answer))


def _body(answer: Any) -> Iterator[bytes]:
    while piece := answer.read1(_CHUNK):
        yield piece
    if answer.length:
        raise OSError(f"the connection ended {answer.length:,} bytes before the answer's end")


# everything that fsspec knows


def _wrapped(address: str, action: Callable[[], Any]) -> Any:
    """The clients of buckets raise errors of their own; each is one of the network's here."""
    try:
        return action()
    except PermissionError as error:
        raise Forbidden(13, redacted(error.strerror or str(error)), redacted(address)) from None
    except (OSError, UserError):
        raise
    except Exception as error:
        raise OSError(5, redacted(f"{type(error).__name__}: {error}")) from None


def _told(address: str) -> State:
    system, path = file_system(address)
    system.invalidate_cache()
    about = _wrapped(address, lambda: system.info(path))
    stamp = next((str(about[name]) for name in _STAMPS if about.get(name)), None)
    return State(about.get("size"), stamp_of(stamp))


@contextlib.contextmanager
def _by_fsspec(address: str, start: int, tag: str | None) -> Iterator[Transfer]:
    system, path = file_system(address)
    state = _told(address)
    now = str(state.stamp)
    begin = start if tag == now and state.stamp else 0
    yield Transfer(begin, state, now, _ranges(address, system, path, begin, state.size))


def _ranges(address: str, system: Any, path: str, begin: int, size: int | None) -> Iterator[bytes]:
    if size is None:
        yield _wrapped(address, lambda: system.cat_file(path))
        return
    while begin < size:
        end = min(begin + _RANGE, size)
        piece = _wrapped(address, partial(system.cat_file, path, start=begin, end=end))
        if not piece:
            return
        yield piece
        begin += len(piece)


# commands


@contextlib.contextmanager
def _piped(address: str, start: int, tag: str | None) -> Iterator[Transfer]:
    """What a command prints, as webdataset runs one; its last output on stderr is kept for when it fails."""
    with (
        tempfile.TemporaryFile() as words,
        subprocess.Popen(
            address[len(PIPE) :],
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=words,
            start_new_session=True,
        ) as process,
    ):
        try:
            yield Transfer(0, State(None, 0), None, _printed(process))
            code = process.wait(SILENCE_S)
        except subprocess.TimeoutExpired:
            raise OSError(5, f"the command did not exit within {SILENCE_S:g} s of its last output") from None
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, 9)
        if code:
            words.seek(max(0, words.seek(0, 2) - 2000))
            last = words.read().decode("utf-8", "replace").strip()
            raise OSError(5, f"the command failed with code {code}: {last or 'no output on stderr'}")


def _printed(process: "subprocess.Popen[bytes]") -> Iterator[bytes]:
    assert process.stdout is not None
    fd = process.stdout.fileno()
    while True:
        if not select.select([fd], [], [], SILENCE_S)[0]:
            raise OSError(5, f"the command printed nothing for {SILENCE_S:g} s")
        piece = os.read(fd, _CHUNK)
        if not piece:
            return
        yield piece

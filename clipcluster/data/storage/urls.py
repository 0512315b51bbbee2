"""Remote shards: what an entry of a recipe names, and what is shown of an address. Imports no torch.

Written like local sources, with `://` or `pipe:` in front: a folder, one tar, braces, a glob of tars
(compared with the names in the index), or braces of commands that print a tar. A `RemoteFolder` and a
`RemoteFile` stand where a local source has a `Path`, as far as a source asks.
"""

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

from clipcluster.errors import UserError
from clipcluster.text import counted

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
PIPE = "pipe:"

_GLOB = re.compile(r"[*?\[]")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)(?:[^/\s'\"]*@)?([^\s'\"<>]*)")
_ASSIGNMENT = re.compile(r"\w+=")
_WORDS = "token|secret|password|passwd|signature|credentials?|sig|authorization"
_SECRET = re.compile(
    rf"(?i)((?:(?:{_WORDS}|key)['\"]?\s*=\s*|(?<![a-z])(?:{_WORDS})['\"]?\s*:\s*)(?:(?:bearer|basic)\s+)?)"
    r"['\"]?[^\s&'\"]+"
)


class Unreachable(OSError):
    """A file could not be fetched after all retries."""


class Refused(OSError):
    """The server's answer is final: another try would get the same."""


class Forbidden(Refused):
    """The server forbids a file; a bucket that may not be listed also says so of files that do not exist."""


class OtherContent(Exception):
    """The file is whole, but not the expected one; the message says in what it differs."""


class State(NamedTuple):
    """A file as its disk or its server describes it: size in bytes (None: not told) and a stamp.

    The stamp of a local file is its mtime (ns); of a remote one a negative number made from the ETag, or from
    the time where there is none; 0: neither.
    """

    size: int | None
    stamp: int


def is_remote(written: object) -> bool:
    """Whether a source is an address or a command, not a path on this machine."""
    return isinstance(written, str) and ("://" in written or written.startswith(PIPE))


def braces(pattern: str) -> list[str]:
    """Expands `{000..012}`, `{a,b}` and braces within braces as a shell does."""
    begin, depth = pattern.find("{"), 0
    if begin < 0:
        return [pattern]
    cuts = [begin]  # where the choices of the first braces begin and end
    for mark in re.finditer("[{,}]", pattern[begin:]):
        depth += {"{": 1, ",": 0, "}": -1}[mark.group()]
        if depth == 0 or (depth == 1 and mark.group() == ","):
            cuts.append(begin + mark.start())
        if depth == 0:
            break
    else:
        return [pattern[: begin + 1] + end for end in braces(pattern[begin + 1 :])]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", pattern[begin + 1 : cuts[-1]])
    if span:
        first, last = span.groups()
        choices = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    else:
        choices = [choice for cut, end in pairwise(cuts) for choice in braces(pattern[cut + 1 : end])]
    rest = braces(pattern[cuts[-1] + 1 :])
    return [pattern[:begin] + choice + end for choice in choices for end in rest]


def is_web(address: str) -> bool:
    """Whether an address is fetched by HTTP; such a server cannot list what it holds."""
    return address.startswith(("http://", "https://"))


def redacted(text: str) -> str:
    """An address, a command or what a server says, without what may be a key: for messages, logs and files.

    An address loses its user, its query and its fragment; of a command its program and the name of the shard
    that it prints are left. Values called token, secret, password and the like are left out anywhere.
    """
    if text.startswith(PIPE):
        words = [word for word in text[len(PIPE) :].split() if not _ASSIGNMENT.match(word)]
        shards = [tar.rpartition("/")[2] for tar in _tars_in(text)[-1:]]
        return PIPE + _SECRET.sub(r"\1…", " ".join([*words[:1], "…", *shards]))
    return _SECRET.sub(r"\1…", _URL.sub(_without_keys, text))


def addresses_redacted(text: str) -> str:
    """A message without the user, the query and the fragment of every address in it."""
    return _URL.sub(_without_keys, text)


def redacted_within(value: Any) -> Any:
    """A value of a recipe with every text in it `redacted`."""
    if isinstance(value, Mapping):
        return {key: redacted_within(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redacted_within(inner) for inner in value]
    return redacted(value) if isinstance(value, str) else value


def _without_keys(url: "re.Match[str]") -> str:
    scheme, rest = url.groups()
    if is_web(scheme) or "=" in rest.partition("?")[2]:  # elsewhere a ? may be a glob's
        rest = re.split("[?#]", rest, maxsplit=1)[0]
    return scheme + rest


def _tars_in(command: str) -> list[str]:
    """The words of a command that end in `.tar`."""
    words = (word.strip("'\";|&()<>") for word in command[len(PIPE) :].split())
    return [word for word in words if word.endswith(".tar")]


@dataclass(frozen=True, repr=False)
class RemoteFile:
    """One remote file; `address` is for fetching, `str` and `repr` are for people."""

    address: str

    def __str__(self) -> str:
        return redacted(self.address)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"


@dataclass(frozen=True, repr=False)
class RemoteFolder(RemoteFile):
    """A folder behind an address, or (`pipe:`) the commands of a pattern, each named by the tar it prints.

    `address` has no slash at its end; `query` (`http://host/x?key`) goes with every file.
    """

    query: str = ""

    @property
    def is_pipe(self) -> bool:
        return self.address.startswith(PIPE)

    @property
    def name(self) -> str:
        return unquote(redacted(self.address).rpartition("/")[2])

    @property
    def parent(self) -> "RemoteFolder | None":
        """The folder above; None above a server, a bucket, a repository of the hub or a command."""
        kind, _, path = self.address.partition("://")
        within = 0 if kind != "hf" else 2 if path.startswith(("datasets/", "spaces/")) else 1  # its name
        above = RemoteFolder(f"{kind}://{path.rpartition('/')[0]}", self.query)
        return None if path.count("/") <= within else above

    def __truediv__(self, name: str) -> RemoteFile:
        if self.is_pipe:
            return RemoteFile(self.commands[name])
        if not is_web(self.address):
            return RemoteFile(f"{self.address}/{name}")
        query = f"?{self.query}" if self.query else ""
        return RemoteFile(f"{self.address}/{quote(name, errors='surrogateescape')}{query}")

    @cached_property
    def commands(self) -> dict[str, str]:
        """The commands of a pipe by the name of their shard. UserError where one cannot be named."""
        found: dict[str, str] = {}
        for command in braces(self.address):
            tars = _tars_in(command)
            if not tars:
                raise UserError(
                    f"{redacted(command)}: no word of this command ends in .tar, so the shard it prints has "
                    "no name; write the shard's name in it (pipe:cat /x/{00..09}.tar)"
                )
            name = tars[-1].rpartition("/")[2]
            if name in found:
                raise UserError(f"{self}: two of its commands print {name}; names must differ")
            found[name] = command
        return found


def folder_at(written: str) -> RemoteFolder:
    """The folder that an address names; with `pipe:`, the commands."""
    if written.startswith(PIPE):
        return RemoteFolder(written)
    text, _, query = written.partition("?") if is_web(written) else (written, "", "")
    return RemoteFolder(text.rstrip("/"), query)


class Selection(NamedTuple):
    """What one entry of a recipe takes of one folder: names and globs of tars; None: all of its index."""

    folder: RemoteFolder
    tars: tuple[str, ...] | None


def chosen(folder: Path | RemoteFolder, tars: Iterable[str], names: Sequence[str]) -> list[str]:
    """Those of the folder's `names` that `tars`, names and globs, take. UserError where one takes none."""
    known = dict.fromkeys(names)
    found = {tar: [tar] if tar in known else fnmatch.filter(known, tar) for tar in tars}
    missing = [tar for tar, taken in found.items() if not taken]
    gone = [tar for tar in missing if isinstance(folder, Path) and not (folder / tar).exists()]
    count = len(gone or missing)
    several = f"{count:,} of {counted(len(found), 'shard')} {'is' if count == 1 else 'are'} not"
    if gone:
        raise UserError(
            f"{folder / gone[0]} does not exist ({several} there); name only shards that are; the index of "
            f"their folder has {counted(len(known), 'shard')}"
        )
    if missing:
        raise UserError(
            f"{folder / missing[0]}: not in the index of its folder ({several}), which names "
            f"{counted(len(known), 'shard')}; index all of them at once: clipcluster shards index "
            f"{folder if isinstance(folder, Path) else 'ADDRESS --index FOLDER'}"
        )
    return list(dict.fromkeys(name for taken in found.values() for name in taken))


def named(written: str) -> list[Selection]:
    """What an entry of a recipe takes of which folders, in the order written, whole ones before those whose
    tars are named; globs of folders are listed.

    UserError: an unknown kind of address, an extra that is missing, a glob at an http server. Unreachable: a
    bucket that does not answer.
    """
    if written.startswith(PIPE):
        folder = RemoteFolder(written)
        return [Selection(folder, tuple(folder.commands))]
    if not is_web(written):
        file_system(written)
    at = folder_at(written)
    taken: dict[str, list[str] | None] = {}
    for entry in braces(at.address):
        folder_address, _, name = entry.rpartition("/")
        if not name.endswith(".tar"):
            taken[entry.rstrip("/")] = None
        elif (names := taken.setdefault(folder_address, [])) is not None:
            names.append(unquote(name) if is_web(written) else name)
    found = [
        Selection(folder, None if names is None else tuple(names))
        for address, names in taken.items()
        for folder in _listed(RemoteFolder(address, at.query))
    ]
    # each once, though several globs list it
    return sorted(dict.fromkeys(found), key=lambda selection: selection.tars is not None)


def _listed(folder: RemoteFolder) -> list[RemoteFolder]:
    """The folders of a pattern; itself where it is none."""
    if not _GLOB.search(folder.address):
        return [folder]
    if is_web(folder.address):
        raise UserError(
            f"{folder}: an http server cannot list its folders; write them out with braces ({{00..09}})"
        )
    found = _listing(folder, lambda system, path: system.glob(path))
    if not found:
        raise UserError(f"{folder}: nothing matches this pattern")
    return [RemoteFolder(address) for address in found]


def tars_of(folder: RemoteFolder) -> list[str]:
    """The names of the tars in a folder, sorted. UserError where there are none; Unreachable as `named`."""
    if folder.is_pipe:
        return list(folder.commands)
    if is_web(folder.address):
        raise UserError(
            f"{folder}: an http server cannot list its shards; name them with braces: "
            f"{folder}/{{00000..00009}}.tar"
        )
    entries = _listing(folder, lambda system, path: system.ls(path, detail=False))
    names = [address.rpartition("/")[2] for address in entries]
    tars = [name for name in names if name.endswith(".tar") and not name.startswith(".")]
    if not tars:
        raise UserError(f"{folder}: no .tar shards in this folder")
    return tars


def _listing(folder: RemoteFolder, question: Callable[[Any, str], Iterable[Any]]) -> list[str]:
    """The addresses a bucket answers with, sorted; its client has retried by itself, and raises anything."""
    system, path = file_system(folder.address)
    try:
        return sorted(str(system.unstrip_protocol(entry)).rstrip("/") for entry in question(system, path))
    except FileNotFoundError:
        raise UserError(f"{folder}: no such folder") from None
    except Exception as error:
        reason = redacted(f"it cannot be listed: {type(error).__name__}: {error}")
        raise Unreachable(5, reason, str(folder)) from None


def file_system(address: str) -> tuple[Any, str]:
    """fsspec's file system for an address, and the path in it. UserError: unknown kind, missing package."""
    import fsspec.core

    protocol = address.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(address)
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        package = f"'clipcluster[{extra}]'" if extra else f"the package it names ({error})"
        raise UserError(f"{redacted(address)}: reading {protocol}:// needs: pip install {package}") from None
    except ValueError as error:
        raise UserError(
            f"{redacted(address)}: {redacted(str(error))}; there are http://, https://, s3://, gs://, hf:// "
            "and what else fsspec knows, and pipe:COMMAND"
        ) from None

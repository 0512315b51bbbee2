"""What every room's tests share: one thread a process, and the summary of time and coverage by room."""

import base64
import hashlib
import http.server
import os
import re
import signal
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.browser import chromium, looked_at, opened  # noqa: F401

# A shell starts what it puts into the background with INT ignored, and every child would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.unsetenv("COLUMNS")  # readline, which pytest loads, sets it for the processes that tests start

# `make test` tries the same examples every time; `make test-all` searches for new ones.
hypothesis.settings.register_profile("settled", derandomize=True, deadline=None)
hypothesis.settings.register_profile("searching", deadline=None)
hypothesis.settings.load_profile("settled")

ROOT = Path(__file__).resolve().parent.parent


def room_of(nodeid: str) -> str:
    """The room a test belongs to: its folder under tests/, or "house" for the files beside the folders."""
    parts = nodeid.split("::")[0].split("/")
    return parts[1] if len(parts) > 2 else "house"


def room_of_source(path: str) -> str:
    parts = Path(path).resolve().relative_to(ROOT).parts
    return "/".join(parts[:2]) if parts[0] == "clipcluster" and len(parts) > 2 else parts[0]


def coverage_by_room(config: pytest.Config) -> list[str]:
    plugin = config.pluginmanager.get_plugin("_cov")
    if plugin is None or plugin.cov_controller is None:
        return []
    coverage = plugin.cov_controller.cov
    statements: dict[str, int] = defaultdict(int)
    missed: dict[str, int] = defaultdict(int)
    for path in coverage.get_data().measured_files():
        if not Path(path).resolve().is_relative_to(ROOT) or not path.endswith(".py"):  # jinja2's templates
            continue
        _, lines, _, missing, _ = coverage.analysis2(path)
        statements[room_of_source(path)] += len(lines)
        missed[room_of_source(path)] += len(missing)
    return [
        f"{room:<24} {100 * (1 - missed[room] / statements[room]):5.1f} %  of {statements[room]} statements"
        for room in sorted(statements)
        if statements[room]
    ]


def pytest_collection_modifyitems(items):
    """The tests of a cluster first: at the end these long files would leave the other process idle."""
    items.sort(key=lambda item: room_of(item.nodeid) != "slurm")


def pytest_terminal_summary(terminalreporter, config):
    seconds: dict[str, float] = defaultdict(float)
    tests: dict[str, int] = defaultdict(int)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[room_of(report.nodeid)] += report.duration
                tests[room_of(report.nodeid)] += report.when == "call"
    terminalreporter.section("time by room")
    for room in sorted(seconds, key=seconds.get, reverse=True):
        terminalreporter.write_line(f"{room:<12} {seconds[room]:7.1f} s  {tests[room]} tests")
    lines = coverage_by_room(config)
    if lines:
        terminalreporter.section("coverage by room")
        for line in lines:
            terminalreporter.write_line(line)


class WebServer(http.server.ThreadingHTTPServer):
    """Serves a folder on 127.0.0.1, with ETag and Range; breaks every `drop_every`-th tar in mid-body.

    `log` holds (method, path, first byte asked for, status) of every request. If they are set, `status` is
    what to answer instead (for names that end in `status_of`) and `password` (USER:PASSWORD) is asked for;
    while `stalled` is cleared, a tar stops in its middle. With `hides_size` a continued transfer tells only
    its own bytes (`bytes N-M/*`); with `hides_length` no answer tells its length; with `chunked` it is
    sent as one chunk, and a broken one lacks the end alone.
    """

    daemon_threads = True

    def __init__(self, folder: Path, drop_every: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.folder, self.drop_every = folder, drop_every
        self.log: list[tuple[str, str, int, int]] = []
        self.bodies = 0
        self.status: int | None = None
        self.status_of = ""
        self.password: str | None = None
        self.counting = threading.Lock()
        self.stalled = threading.Event()
        self.stalled.set()
        self.hides_size = self.hides_length = self.chunked = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that are gone are what these tests are about."""


class _Answers(http.server.BaseHTTPRequestHandler):
    server: WebServer

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        file = self.server.folder / path.lstrip("/")
        if self.server.password and not self._knows(self.server.password):
            self.send_error(401)
            return
        status = self.server.status if path.endswith(self.server.status_of) else None
        if status is not None or not file.is_file():
            status = status or 404
            self.server.log.append((self.command, path, 0, status))
            self.send_error(status)
            return
        data = file.read_bytes()
        tag = f'"{hashlib.md5(data).hexdigest()}"'
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        partial = wanted and self.headers.get("If-Range", tag) == tag
        first = int(wanted[1]) if partial else 0
        if first and first >= len(data):
            self.server.log.append((self.command, path, first, 416))
            self.send_error(416)
            return
        last = int(wanted[2]) if partial and wanted[2] else len(data) - 1
        self.server.log.append((self.command, path, first, 206 if partial else 200))
        self.send_response(206 if partial else 200)
        self.send_header("ETag", tag)
        if self.server.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif not self.server.hides_length:
            self.send_header("Content-Length", str(last + 1 - first))
        if partial:
            whole = "*" if self.server.hides_size else len(data)
            self.send_header("Content-Range", f"bytes {first}-{last}/{whole}")
        self.end_headers()
        if body:
            self._send(data[first : last + 1], path.endswith(".tar"))

    def _knows(self, password: str) -> bool:
        return self.headers.get("Authorization") == f"Basic {base64.b64encode(password.encode()).decode()}"

    def _send(self, data: bytes, may_drop: bool) -> None:
        with self.server.counting:
            self.server.bodies += may_drop
            drop = may_drop and self.server.drop_every and self.server.bodies % self.server.drop_every == 0
        self.close_connection = True
        if self.server.chunked:
            self.wfile.write(b"%x\r\n%b\r\n%b" % (len(data), data, b"" if drop else b"0\r\n\r\n"))
            return
        middle = len(data) // 2
        self.wfile.write(data[:middle])
        if may_drop:
            self.server.stalled.wait(60)
        if not drop:
            self.wfile.write(data[middle:])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """programs(scontrol="echo ..."): programs, each a line of sh, found before SLURM's own; their folder."""
    folder = tmp_path / "programs"
    monkeypatch.delenv("SLURM_CONF", raising=False)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def write(**lines: str) -> Path:
        folder.mkdir(exist_ok=True)
        for name, line in lines.items():
            (folder / name).write_text(f"#!/bin/sh\n{line}\n")
            (folder / name).chmod(0o755)
        return folder

    return write


@pytest.fixture
def web_server() -> Iterator[Callable[..., WebServer]]:
    """web_server(folder, drop_every=0): a `WebServer` of that folder, running."""
    servers: list[WebServer] = []

    def start(folder: Path, drop_every: int = 0) -> WebServer:
        servers.append(WebServer(folder, drop_every))
        threading.Thread(target=servers[-1].serve_forever, args=(0.05,), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()

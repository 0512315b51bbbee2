"""What every room's tests share: one thread a process, and the summary of time and coverage by room."""

import os
import signal
from collections import defaultdict
from pathlib import Path

import hypothesis
import pytest

# A shell starts what it puts into the background with INT ignored, and every child would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

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
        if not Path(path).resolve().is_relative_to(ROOT):
            continue
        _, lines, _, missing, _ = coverage.analysis2(path)
        statements[room_of_source(path)] += len(lines)
        missed[room_of_source(path)] += len(missing)
    return [
        f"{room:<24} {100 * (1 - missed[room] / statements[room]):5.1f} %  of {statements[room]} statements"
        for room in sorted(statements)
        if statements[room]
    ]


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

"""Files of the run folder with other content than clipcluster writes: an error names the file."""

import json
import os
import stat

import pytest

from clipcluster.errors import UserError
from clipcluster.runs import merge
from clipcluster.runs.folder import Run
from tests.consumed import merged_samples

GARBAGE = [
    b"",
    b"\x00\xff\xfe",
    b"{",
    b"[]",
    b'"text"',
    b"NaN",
    b"null",
    b"[" * 100_000,
    b"9" * 5000,
    b'{"job": ["7"], "outcome": 3, "address": 5, "port": "x", "token": null, "code": []}',
]
READS = {
    "claim.json": lambda attempt: attempt.claim(),
    "outcome.json": lambda attempt: attempt.outcome(),
    "rendezvous.json": lambda attempt: attempt.find(0),
    "settings.yaml": lambda attempt: attempt.settings(),
}


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("content", GARBAGE, ids=lambda content: repr(content[:12]))
def test_a_file_of_an_attempt(claim, name, content):
    attempt = claim()
    (attempt.path / name).write_bytes(content)
    if name == "settings.yaml" and content in (b"", b"null", GARBAGE[-1]):
        assert READS[name](attempt) == (json.loads(content or b"null") or {})
        return
    with pytest.raises(UserError, match=rf"attempts/1/{name} ") as raised:
        READS[name](attempt)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["recipe.yaml", "settings.yaml"])
@pytest.mark.parametrize(
    "content", [b"\xff", b"{", b"[]", b"- 1", b"{" * 5000, b"!!python/object:os.system {}"]
)
def test_a_file_of_the_run(run, name, content):
    (run.path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        {"recipe.yaml": run.recipe, "settings.yaml": run.settings}[name]()


def test_a_claim_that_cannot_be_read_is_not_taken_over(run, claim):
    (claim().path / "claim.json").write_bytes(b"{")
    with pytest.raises(UserError, match=r"attempts/1/claim\.json is not valid JSON"):
        claim("2")
    assert [attempt.number for attempt in run.attempts()] == [1]


@pytest.mark.parametrize("content", GARBAGE, ids=lambda content: repr(content[:12]))
def test_lines_that_are_none_are_left_out(run, claim, content):
    attempt = claim()
    attempt.metrics({"step": 1, "loss": 0.5})
    attempt.event("start", writer="rank-0")
    attempt.bad_sample(0, "0.tar", "k", "truncated")
    attempt.samples(0, [{"step": 1, "slot": 0, "shard": "0.tar", "key": "k"}])
    for path in attempt.path.glob("*.jsonl"):
        path.write_bytes(
            content + b"\n" + path.read_bytes() + b'{"step": "1"}\n{"event": 1, "attempt": "x"}\n'
        )
    (run.marks / "cancelled").write_bytes(content)
    for names in (b"", b"2\n\xff\n"):
        (run.marks / "cancelled").write_bytes(names)
    assert [line["step"] for line in merge.merged_metrics(run)] == [1]
    assert [line["event"] for line in merge.events(run)] == ["start"]
    assert [line["key"] for line in merge.bad_samples(run)] == ["k"]
    assert [line["slot"] for line in merged_samples(run)] == [0]
    assert "2" in run.cancelled_jobs()


def test_folders_that_are_no_attempts(run, claim):
    claim()
    for name in ("007", "x", "-3", "٣", ".2.tmp"):
        (run.attempts_dir / name).mkdir()
    assert [attempt.number for attempt in run.attempts()] == [1]


def test_secrets_are_their_owners_alone(run, claim):
    before = os.umask(0)
    try:
        attempt = claim()
        attempt.publish("127.0.0.1", 1, "token")
        attempt.event("start", writer="rank-0")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in attempt.path.iterdir()}
    assert modes == {
        "claim.json": 0o600,
        "rendezvous.json": 0o600,
        "settings.yaml": 0o666,
        "events-rank-0.jsonl": 0o666,
    }


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_claim_of_somebody_else(claim):
    attempt = claim()
    (attempt.path / "claim.json").chmod(0)
    with pytest.raises(UserError, match=r"claim\.json.*permission denied"):
        attempt.claim()


def test_a_folder_without_a_claim_belongs_to_nobody(run):
    (run.attempts_dir / "1").mkdir()
    assert Run(run.path).newest().claim() == {}

"""Tables for people about shards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from clipcluster.text import counted

if TYPE_CHECKING:
    from tools.shards.stats import Stats

_SHOWN = 10  # bad samples and groups of duplicates that are shown one by one
_COLUMNS = ("min", "p5", "median", "p95", "max", "mean")


def _figure(value: float | None, form: str = ",") -> str:
    """A number in this format; empty where there is none."""
    return "" if value is None else format(value, form)


def stats_table(stats: Stats) -> Group:
    """The figures of `clipcluster shards stats`."""
    return Group(_counts(stats), _distributions(stats), *_lines(stats))


def _counts(stats: Stats) -> Table:
    rows = Table(title=escape(stats.folder), title_justify="left", show_header=False, box=box.SIMPLE_HEAD)
    rows.add_column(style="bold")
    rows.add_column()
    decoded = "decoded" if stats.decoded else "not decoded"
    rows.add_row("shards", f"{stats.shards:,}, {decimal(stats.bytes)}")
    rows.add_row("samples", f"{stats.samples:,}: {stats.used:,} used, {len(stats.bad):,} bad ({decoded})")
    rows.add_row(
        "captions",
        f"{stats.captions:,} (choice {stats.captions_choice}), "
        f"{counted(stats.without_caption, 'sample')} without one",
    )
    rows.add_row("kinds", _counted(stats.kinds) or "none")
    rows.add_row("captions a sample", _counted(stats.captions_per_sample, most=8))
    if stats.classes:
        least, most = min(stats.classes.values()), max(stats.classes.values())
        rows.add_row("classes", f"{len(stats.classes):,}, each of {least:,} to {most:,} samples")
    for name, what in (("content", "same image"), ("keys", "same key")):
        found = stats.duplicates[name]
        copies = counted(found["extra"], "copy")
        rows.add_row(what, f"{counted(found['groups'], 'group')}, {copies} beyond the first")
    if stats.without_image or stats.repeated_keys:
        rows.add_row(
            "no samples",
            f"{stats.without_image:,} without image, {stats.repeated_keys:,} with a repeated key",
        )
    return rows


def _distributions(stats: Stats) -> Table:
    rows = Table(box=box.SIMPLE_HEAD)
    rows.add_column("", no_wrap=True)
    for name in _COLUMNS:
        rows.add_column(name, justify="right", no_wrap=True)
    images, characters = stats.images, stats.caption_characters
    sides = {name: images[name] for name in ("width", "height", "pixels")}
    for what, figures in {**sides, "image bytes": images["bytes"], "characters": characters}.items():
        if figures["count"]:
            rows.add_row(what, *(_figure(round(figures[name], 1)) for name in _COLUMNS))
    return rows


def _lines(stats: Stats) -> list[str]:
    """What is bad, broken or double, one line each."""
    lines = [f"[bold]broken[/] {escape(one['shard'])}: {escape(one['reason'])}" for one in stats.broken]
    for one in stats.bad[:_SHOWN]:
        lines.append(f"[bold]bad[/] {escape(one['shard'])} {escape(one['key'])}: {escape(one['reason'])}")
    if len(stats.bad) > _SHOWN:
        lines.append(f"… and {len(stats.bad) - _SHOWN:,} more; --json names all")
    for group in stats.duplicates["content"]["examples"][:_SHOWN]:
        names = ", ".join(f"{one['shard']} {one['key']}" for one in group[:4])
        lines.append(f"[bold]same image[/] {escape(names)}{', …' if len(group) > 4 else ''}")
    return [*lines, *(f"[bold]note[/] {escape(note)}" for note in stats.notes)]


def _counted(counts: Mapping[str, int], most: int = 20) -> str:
    shown = ", ".join(f"{name}: {count:,}" for name, count in list(counts.items())[:most])
    return shown + (f", … ({len(counts)} values)" if len(counts) > most else "")

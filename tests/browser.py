"""Pages that clipcluster writes, in headless Chromium, where it is installed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PHONE, DESKTOP, PAPER = 390, 1280, 794  # pixels; the last is A4
OVERFLOWING = """() => {
    const inside = (element) => element.closest(".scroll, pre, .bar, .reading");
    return [...document.body.querySelectorAll("*")]
        .filter((element) => !inside(element))
        .filter((element) => element.getBoundingClientRect().right > innerWidth + 0.5)
        .map((element) => `${element.tagName} ${element.className} ${element.textContent.slice(0, 40)}`);
}"""


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """The browser; tests without one are skipped, loudly."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("#### CHROMIUM IS MISSING: install the package chromium to test how pages look ####")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium: Any) -> Callable[..., Any]:
    """opened(file, width, scheme, javascript): the page, which may fetch nothing and fail nowhere."""

    @contextmanager
    def open_page(
        file: Path, width: int = DESKTOP, scheme: str = "light", *, javascript: bool = True
    ) -> Iterator[Any]:
        context = chromium.new_context(
            viewport={"width": width, "height": 844}, color_scheme=scheme, java_script_enabled=javascript
        )
        page = context.new_page()
        requests: list[str] = []
        problems: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text))
        page.goto(file.as_uri())
        yield page
        assert [url for url in requests if not url.startswith("data:")] == [file.as_uri()]
        assert problems == []
        context.close()

    return open_page


@pytest.fixture
def looked_at(opened: Callable[..., Any], tmp_path: Path) -> Callable[[Path], None]:
    """looked_at(file): open it on a phone and a desk, dark and light, unfolded; nothing overflows."""

    def look(file: Path) -> None:
        for width in (PHONE, DESKTOP):
            for scheme in ("light", "dark"):
                with opened(file, width, scheme) as page:
                    page.locator("details").evaluate_all(
                        "parts => parts.forEach(part => { part.open = true })"
                    )
                    assert overflowing(page) == []
                    picture = tmp_path / f"{file.stem}-{width}-{scheme}.png"
                    page.screenshot(path=picture, full_page=True)
                with Image.open(picture) as screen:
                    assert screen.width == width
                    corner = sum(screen.convert("RGB").getpixel((3, 3)))
                    assert (corner > 700) if scheme == "light" else (corner < 100)
                    assert len(screen.convert("RGB").getcolors(1 << 24)) > 200

    return look


def overflowing(page: Any) -> list[str]:
    """Elements that reach beyond the right edge, besides those that scroll in a box of their own."""
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    return list(page.evaluate(OVERFLOWING))

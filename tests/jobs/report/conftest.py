"""Pages in headless Chromium, where it is installed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

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
        pytest.skip("#### CHROMIUM IS MISSING: install the package chromium to test how reports look ####")
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


def overflowing(page: Any) -> list[str]:
    """Elements that reach beyond the right edge, besides those that scroll in a box of their own."""
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    return list(page.evaluate(OVERFLOWING))

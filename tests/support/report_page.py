"""A report in a real browser: Debian's chromium without a window, driven by playwright."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from shutil import which
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

from support.tools import skip_without


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Start a browser, or skip the test where chromium is not installed."""
    skip_without("chromium")
    with sync_playwright() as playwright:
        # Root, as in a container, has no sandbox.
        browser = playwright.chromium.launch(executable_path=which("chromium"), args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass
class OpenPage:
    """A page with what the browser has complained about and asked for."""

    page: Page
    messages: list[str] = field(default_factory=list[str])
    requests: list[str] = field(default_factory=list[str])

    def table(self, section: str, number: int = 0) -> list[list[str]]:
        """Return the texts of a table of a section, row by row, without its header."""
        script = "rows => rows.map(row => [...row.cells].map(cell => cell.textContent.trim()))"
        return self.page.locator(f"#{section} table").nth(number).locator("tbody tr").evaluate_all(script)

    def measure(self, script: str) -> Any:
        """Return the value of an expression in the page."""
        return self.page.evaluate(script)


def show(browser: Browser, path: Path, *, width: int, scheme: str = "light", media: str = "screen") -> OpenPage:
    """Open a file, as a reader of its directory would."""
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)  # pyright: ignore[reportArgumentType]
    shown = OpenPage(page)
    page.on("console", lambda message: shown.messages.append(message.text))
    page.on("pageerror", lambda error: shown.messages.append(str(error)))
    page.on("request", lambda request: shown.requests.append(request.url))
    page.emulate_media(media=media, color_scheme=scheme)  # pyright: ignore[reportArgumentType]
    page.goto(path.as_uri())
    return shown

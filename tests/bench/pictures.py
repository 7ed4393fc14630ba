"""Pictures of console and report for the documents, from a real training: docs/pictures/*.

    PYTHONPATH=tests python tests/bench/pictures.py --source data/ag_news --model models/gpt2

It takes chromium. The training is one of the small GPT-2 on some thousand rows of AG News.
"""

import argparse
import io
import os
import pty
import re
import subprocess
import sys
import tempfile
import termios
from pathlib import Path
from shutil import which

import pyte
from playwright.sync_api import sync_playwright
from rich.console import Console
from rich.style import Style
from rich.text import Text

REPOSITORY = Path(__file__).resolve().parents[2]
PICTURES = REPOSITORY / "docs" / "pictures"
COLUMNS, ROWS = 120, 40
SVG = re.compile(r"@font-face \{.*?\}", re.DOTALL)
"""Fonts that rich's picture would fetch from the network."""


def train(command: list[str], directory: Path) -> str:
    """Return what a training writes to a terminal."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (ROWS, COLUMNS))
    environ = {**os.environ, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=directory, env=environ)
    os.close(theirs)
    content = b""
    while True:
        try:
            chunk = os.read(ours, 1 << 16)
        except OSError:  # Linux reports the closed other end this way
            break
        if not chunk:
            break
        content += chunk
    os.close(ours)
    if process.wait() != 0:
        raise SystemExit(content.decode())
    return content.decode()


def choose_moment(written: str) -> str:
    """Return the output up to a picture of the live display in the last third of the training."""
    ends = [found.start() for found in re.finditer(r"\r\x1b\[2K\x1b\[1A", written)]
    drawn = [end for end in ends if re.search(r"train.{0,400}?(7\d|8\d)%", written[max(0, end - 3000) : end], re.DOTALL)]
    return written[: (drawn or ends)[-1]]


def draw(written: str, path: Path) -> None:
    """Draw the screen after this output as SVG."""
    screen = pyte.Screen(COLUMNS, ROWS * 4)
    pyte.Stream(screen).feed(written)
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    last = max(row for row, line in enumerate(screen.display) if line.strip())
    for row in range(last + 1):
        line = Text()
        for column in range(COLUMNS):
            character = screen.buffer[row][column]
            colour = None if character.fg == "default" else character.fg
            colour = f"#{colour}" if colour and re.fullmatch(r"[0-9a-f]{6}", colour) else colour
            colour = {"brown": "yellow"}.get(colour or "", colour)
            line.append(character.data, Style(color=colour, bold=character.bold))
        line.rstrip()
        console.print(line, no_wrap=True, crop=True)
    svg = SVG.sub("", console.export_svg(title="agnews-dist train"))
    path.write_text(svg, encoding="utf-8")


def photograph(report: Path) -> None:
    """Take pictures of the report: a desktop in light, a phone in dark."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=which("chromium"), args=["--no-sandbox"])
        for name, scheme, width, height in (("report", "light", 1280, 1250), ("report-phone", "dark", 390, 1250)):
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            page.goto(report.as_uri())
            page.screenshot(path=PICTURES / f"{name}.png")
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="directory with AG News")
    parser.add_argument("--model", type=Path, required=True, help="directory of a small GPT-2")
    parser.add_argument("--rows", type=int, default=4000)
    options = parser.parse_args()
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        # Short names, as in a project of one's own.
        for name, path in (("ag_news", options.source), ("gpt2-mini", options.model)):
            (directory / name).symlink_to(path.resolve(), target_is_directory=True)
        words = ["--data.source", "ag_news", "--model.name", "gpt2-mini", "--data.limit_train", str(options.rows)]
        words += ["--data.class_names", "World,Sports,Business,Sci/Tech", "--data.max_length", "128", "--run.name", "news"]
        words += ["--data.cache_dir", "cache", "--optim.epochs", "6", "--optim.evaluate_every", "100"]
        written = train([sys.executable, "-m", "agnews_dist.train", *words], directory)
        draw(choose_moment(written), PICTURES / "console.svg")
        photograph(directory / "runs" / "news" / "report.html")
    print(f"{PICTURES} written")


if __name__ == "__main__":
    main()

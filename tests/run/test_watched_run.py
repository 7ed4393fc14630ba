"""Output of a whole training, as a person reads it: in a terminal of 80 and of 200 columns, in a pipe, in a notebook."""

import os
import pty
import re
import select
import termios
from pathlib import Path

import nbformat
import pyte
import pytest
from nbclient import NotebookClient
from support import fork_server
from support.processes import TERMINAL, environment

SIZES = ("--data.limit_train", "960", "--data.limit_validation", "50", "--data.limit_test", "50")
DATA = ("--data.source", "synthetic", *SIZES, "--data.cache_dir", "cache")
# Two epochs of 40 steps; the second evaluation is the better one by far.
TRAIN = (*DATA, "--model.name", "embedded", "--optim.epochs", "2", "--optim.lr", "3e-3", "--batch.global_batch_size", "24")
PLACE = ("--run.dir", "runs", "--run.name", "news")
FIRST = "agnews_dist 0: loading PyTorch and embedded"
FACTS = [
    "run runs/news",
    "model embedded (pretrained), trainable blocks: 0",
    "trainable 0 of 0 parameters (0%)",
    "data synthetic: 0 train, 0 validation, 0 test; 0 classes",
    "features disk: 0 MB, fits",
    "device CPU, 0 thread(s) per rank, fp32",
    "ranks 0 (0 per node), DDP",
    "batch 0 examples per step over all ranks",
    "plan 0 steps, 0% of the ranks' time goes to real tokens",
    "optimizer AdamW, lr 0 (linear), 0 epochs",
]
TITLES = "epoch step split accuracy macro F1 loss time"
BEST, OTHER = " 0 0 validation 0 0 0 0 best", " 0 0 validation 0 0 0 0"
RESULTS = [
    "validation accuracy 0 (0 of 0), macro F1 0",
    "test accuracy 0 (0 of 0), macro F1 0",
    "features 0 MB kept on disk",
    "best weights step 0 of 0, in epoch 0, by validation accuracy",
    "time 0, 0 tokens/s in training",
]
PATHS = [
    "model runs/news/model",
    "result runs/news/result.json",
    "validation predictions runs/news/predictions-validation.jsonl",
    "test predictions runs/news/predictions-test.jsonl",
]
STEP = "step 0/0 epoch 0 mean loss 0 lr 0 grad norm 0 0 tokens/s 0 examples/s memory 0 MB"
SCORES = "accuracy 0 (0 of 0), macro F1 0, loss 0, 0"
PLAIN = [
    FIRST,
    "run started on 0-0-0, 0 steps",
    *(f" {fact}" for fact in FACTS),
    STEP,
    f"epoch 0, step 0 validation: {SCORES}, the best so far",
    STEP,
    f"epoch 0, step 0 validation: {SCORES}, the best so far",
    f"epoch 0, step 0 test: {SCORES}",
    "done",
    *(f" {line}" for line in (*RESULTS, *PATHS)),
]
BY_TIME = re.compile(r"(tokenize|frozen part): |checkpoint of step |[A-Za-z ]+: 0 so far$|step 0/0 .*ETA 0$")
"""Lines that depend on the speed of the machine."""


def mask(text: str) -> list[str]:
    """Replace numbers by 0, bars and sparklines by one sign each, runs of blanks by one; leave out what depends on the time."""
    text = re.sub(r"[━╸╺]+", "━", re.sub(r"[▁▂▃▄▅▆▇█]+", "▆", text))
    text = re.sub(r"(?<![A-Za-z\d.])\d+(:\d\d)+", "0", text)
    text = re.sub(r"(?<![A-Za-z\d.])\d+(,\d{3})*(\.\d+)*(e[-+]\d+)?", "0", text)
    text = re.sub(r"no checkpoint yet|checkpoint 0 s ago", "checkpoint 0 ago", text)
    text = re.sub(r"\b0 s\b", "0", re.sub(r"\b0 [kMG]B", "0 MB", text))
    lines = [re.sub(r" +", " ", line.rstrip()) for line in text.split("\n")]
    return [line for line in lines if line and not BY_TIME.match(line)]


def read_plain(text: str) -> list[str]:
    """Return the masked lines of plain output; each must have the time of day."""
    lines = text.splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d |         ", line) for line in lines), text
    return mask("\n".join(line[9:] for line in lines))


def train_in_a_terminal(directory: Path, columns: int) -> str:
    """Return what a training writes to a terminal."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (50, columns))
    environ = environment(**TERMINAL)
    terminal = Path(os.ttyname(theirs))
    command = ["-m", "agnews_dist.train", *TRAIN, *PLACE]
    process = fork_server.start(command, environ, fork_server.Streams(terminal, terminal), directory=directory)
    content = b""
    while process.is_alive() or select.select([ours], [], [], 0)[0]:
        if select.select([ours], [], [], 0.1)[0]:
            content += os.read(ours, 1 << 16)
    os.close(theirs)
    os.close(ours)
    assert process.exitcode == 0, content.decode()
    return content.decode()


def read_screen(written: str, columns: int) -> str:
    """Return what a person sees after a program has written this."""
    screen = pyte.Screen(columns, 200)
    pyte.Stream(screen).feed(written)
    return "\n".join(line.rstrip() for line in screen.display)


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 200])
def test_training_in_a_terminal(tmp_path: Path, columns: int) -> None:
    written = train_in_a_terminal(tmp_path, columns)
    lines = mask(read_screen(written, columns))
    columns_of_facts = [FACTS] if columns == 80 else [FACTS[:5], FACTS[5:]]
    facts = [f"│ {' '.join(row)} │" for row in zip(*columns_of_facts, strict=True)]
    frame = "─" * (columns - 2)
    assert lines == [
        f"{FIRST} ...",
        f"╭─ agnews_dist {frame[14:]}╮",
        *facts,
        f"╰{frame}╯",
        TITLES,
        OTHER,
        BEST,
        " 0 0 test 0 0 0 0",
        "loss ▆ 0 0 tokens/s 0 examples/s",
        f"╭─ done {frame[7:]}╮",
        *(f"│ {line} │" for line in RESULTS),
        "│ │",
        *(f"│ {line} │" for line in PATHS),
        f"╰{frame}╯",
    ]
    # The live display after the first evaluation, before it is erased for the next one.
    ends = [found.start() for found in re.finditer(r"\r\x1b\[2K\x1b\[1A", written)]
    live = next(lines for end in ends if BEST in (lines := mask(read_screen(written[:end], columns))))
    state = "epoch 0 lr 0 grad norm 0 memory 0 MB checkpoint 0 ago"
    rates = "loss ▆ 0 0 tokens/s 0 examples/s"
    figures = [rates, state] if columns == 80 else [f"{rates} {state}"]
    assert live[live.index(f"╰{frame}╯") + 1 :] == ["train ━ 0% 0/0 0 steps/s ETA 0", TITLES, BEST, *figures]


@pytest.mark.slow
def test_training_in_a_pipe(tmp_path: Path) -> None:
    place = ["--run.dir", str(tmp_path / "runs"), "--run.name", "news", "--data.cache_dir", str(tmp_path / "cache")]
    words = ["-m", "agnews_dist.train", *TRAIN, *place]
    done = fork_server.run_python(*words, TERM="xterm-256color", FORCE_COLOR="1")
    assert done.stderr == ""
    assert read_plain(done.stdout.replace(f"{tmp_path}/", "")) == PLAIN
    quiet = fork_server.run_python(*words, "--run.overwrite", "--quiet")
    assert read_plain(quiet.stdout.replace(f"{tmp_path}/", "")) == PLAIN[PLAIN.index("done") :]


PHASES = """
import sys
from agnews_dist.__main__ import main
from agnews_dist.events import Progress
from agnews_dist.report.plain import PlainLines

show = PlainLines.__call__

def record(self, event):
    if isinstance(event, Progress):
        print(event.task, file=sys.stderr)
    show(self, event)

PlainLines.__call__ = record
sys.exit(main(["train", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_every_part_of_a_training_is_a_phase(tmp_path: Path) -> None:
    place = ["--run.dir", str(tmp_path / "runs"), "--run.name", "news", "--data.cache_dir", str(tmp_path / "cache")]
    done = fork_server.run_python("-c", PHASES, *TRAIN, *place)
    tasks = dict.fromkeys(line for line in done.stderr.splitlines() if not line.startswith("write the checkpoint"))
    assert list(tasks) == [
        "connect 1 rank",
        "claim the run and read its checkpoint",
        "load embedded",
        "load synthetic",
        "tokenize",
        "hash the weights",
        "plan the batches",
        "start engine ddp",
        "frozen part",
        "first step",
        "score validation",
        "score test",
        "write the results",
        "export the model",
        "write the report",
    ]


@pytest.mark.slow
def test_training_in_a_notebook(tmp_path: Path) -> None:
    cells = [
        f"from agnews_dist.__main__ import main\nassert main({['train', *TRAIN, *PLACE]}) == 0",
        "import sys\n!{sys.executable} -m agnews_dist evaluate --quiet --model.name runs/news " + " ".join(DATA),
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute(env=environment())
    outputs = [output for cell in notebook.cells for output in cell.outputs]
    assert "\x1b" not in str(outputs) + repr(outputs).replace("\\x1b", "\x1b")
    assert {output.get("name") for output in outputs} == {"stdout"}, outputs
    trained, evaluated = ("".join(output.text for output in cell.outputs) for cell in notebook.cells)
    report, begin = " report runs/news/report.html", PLAIN.index(f" {PATHS[0]}")
    assert read_plain(trained) == [*PLAIN[:begin], report, *PLAIN[begin:]]
    (line,) = read_plain(evaluated.replace("\r\n", "\n"))
    assert line.startswith(f"test: {SCORES}; precision/recall: World 0/0, Sports 0/0, ")

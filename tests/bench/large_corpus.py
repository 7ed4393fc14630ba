"""Seconds and memory of reading, checking and tokenising a large corpus, per format of its file.

    OMP_NUM_THREADS=1 PYTHONPATH=. python tests/bench/large_corpus.py LOG.jsonl --directory DIR [--rows N] [--only FORMAT ...]

Rows: synthetic text with a number at its end, so that every text is different; about 52 tokens of the embedded tokenizer. The
files are kept in DIR. Every format is read by a process of its own, which holds out validation like a training run. Memory is
sampled every 0.05 s from /proc/self/status: anonymous memory (RssAnon), and VmHWM, which also counts the mapped files. Both are
given above what the process has once it has imported everything.
"""

import argparse
import csv
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from agnews_dist.data.corpus import Source, load_corpus
from agnews_dist.data.synthetic import generate
from agnews_dist.data.tokens import open_or_build
from agnews_dist.model.embedded import embedded_tokenizer
from agnews_dist.report.result_files import versions

FORMATS = ("parquet", "csv", "quoted.csv", "jsonl", "json")
"""`csv` puts fields in quotes where needed, `quoted.csv` all of them; `json` is an array in one line."""


def rows(num_rows: int) -> Iterator[tuple[str, int]]:
    some = generate(min(num_rows, 20_000), 0, "train")
    for i, (text, label) in zip(range(num_rows), itertools.cycle(some), strict=False):
        yield f"{text} {i}", label


def write(path: Path, form: str, num_rows: int) -> None:
    if form == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        texts, labels = zip(*rows(num_rows), strict=True)
        pq.write_table(pa.table({"text": texts, "label": labels}), path, row_group_size=100_000)
        return
    with path.open("w", encoding="utf-8", newline="") as file:
        if form.endswith("csv"):
            writer = csv.writer(file, quoting=csv.QUOTE_ALL if form == "quoted.csv" else csv.QUOTE_MINIMAL)
            writer.writerow(("text", "label"))
            writer.writerows(rows(num_rows))
        elif form == "jsonl":
            file.writelines(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows(num_rows))
        else:
            objects = (json.dumps({"text": text, "label": label}) for text, label in rows(num_rows))
            file.write("[" + next(objects))
            file.writelines(f", {each}" for each in objects)
            file.write("]")


def status(key: str) -> int:
    """Return a figure of /proc/self/status in bytes."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{key}:")[1].split()[0]) * 1024


class MemorySampler(threading.Thread):
    """The most anonymous memory since the last `restart`."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.restart()

    def restart(self) -> int:
        """Return the peak until now, and begin again."""
        peak, self._peak = getattr(self, "_peak", 0), status("RssAnon")
        return peak

    def run(self) -> None:
        while True:
            self._peak = max(self._peak, status("RssAnon"))
            time.sleep(0.05)


def measure(path: Path, cache: Path) -> dict[str, object]:
    """Read, check and tokenise one file in this process."""
    tokenizer = embedded_tokenizer()
    tokenizer(["a"])
    sampler = MemorySampler()
    sampler.start()
    base, base_peak = status("RssAnon"), status("VmHWM")
    begin = time.perf_counter()
    limits: dict[str, int | None] = {}
    corpus = load_corpus(Source(str(path), cache_dir=cache), validation_fraction=0.05, limits=limits, seed=0)
    read, reading = time.perf_counter(), sampler.restart()
    tokens = open_or_build(corpus, tokenizer, max_length=256, cache_dir=cache, emit=lambda _: None)
    done, building = time.perf_counter(), sampler.restart()
    num_tokens = sum(len(split.tokens) for split in tokens.splits.values())
    return {
        "read_seconds": round(read - begin, 1),
        "check_and_tokenise_seconds": round(done - read, 1),
        "read_anonymous_bytes": reading - base,
        "build_anonymous_bytes": building - base,
        "peak_bytes": status("VmHWM") - base_peak,
        "base_bytes": base_peak,
        "file_bytes": path.stat().st_size,
        "tokens": num_tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("log", type=Path)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--only", nargs="*", default=list(FORMATS))
    parser.add_argument("--measure", type=Path, help="used by the program itself")
    given = parser.parse_args()
    if given.measure is not None:
        print(json.dumps(measure(given.measure, given.directory / f"cache-{os.getpid()}")))
        return
    given.directory.mkdir(parents=True, exist_ok=True)
    with given.log.open("a", encoding="utf-8") as log:
        log.write(json.dumps({"versions": versions()}) + "\n")
        for form in given.only:
            path = given.directory / f"train-{given.rows}.{form}"
            if not path.exists():
                write(path, form, given.rows)
            command = [sys.executable, __file__, str(given.log), "--directory", str(given.directory), "--measure", str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            line = json.dumps({"format": form, "rows": given.rows, **json.loads(done.stdout)})
            print(line, flush=True)
            print(line, file=log, flush=True)


if __name__ == "__main__":
    main()

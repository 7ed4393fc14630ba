"""Ablations of the method: one sweep over seeds per row, scored on a test split that neither trains nor selects anything.

    OMP_NUM_THREADS=1 python tests/bench/ablations.py --output DIR [--rows 0 1 ...]

Every row is `agnews-dist sweep` on the shared real rows and checkpoint (held_out.py) with the settings of accuracy.py and those
of the row. One JSON line per row goes to DIR/log.jsonl, the table of docs/sweeps.md ends it. The same command continues.
rows.yaml of the shown commands is that of docs/sweeps.md.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from held_out import append, common_settings, run_command, write_rows
from safetensors.numpy import load_file

SEEDS = "--run.seed 0..2"
HEAD = "--model.trainable_blocks 0 --model.standardize true"
SOLVER = f"{HEAD} --optim.solver lbfgs --optim.weight_decay 1e-4,1e-3,1e-2"
ROWS = [
    ("defaults: last token, one block, new `[PAD]`, rate 1e-3", SEEDS),
    ("the end-of-text token as pad token", f"--data.pad_token eos {SEEDS}"),
    ("rate 3e-4", f"--optim.lr 3e-4 {SEEDS}"),
    ("rate 3e-3", f"--optim.lr 3e-3 {SEEDS}"),
    ("no block", f"--model.trainable_blocks 0 {SEEDS}"),
    ("no block, mean of all tokens", f"--model.trainable_blocks 0 --model.pooling mean {SEEDS}"),
    ("no block, standardised", f"{HEAD} {SEEDS}"),
    ("no block, solved by L-BFGS", SOLVER),
    ("no block, mean of all tokens, solved by L-BFGS", f"{SOLVER} --model.pooling mean"),
    ("mean of all tokens", f"--model.pooling mean {SEEDS}"),
    ("two blocks", f"--model.trainable_blocks 2 {SEEDS}"),
    ("three blocks", f"--model.trainable_blocks 3 {SEEDS}"),
    ("all six blocks", f"--model.trainable_blocks all {SEEDS}"),
    ("all six blocks and the embeddings", f"--model.trainable_blocks all --model.train_embeddings true {SEEDS}"),
]
"""(what, its settings), the cheap ones first."""
PADS = (0, 1)
"""Rows that differ in the pad token alone."""


def measure(number: int, rows: Path, output: Path) -> dict[str, Any]:
    """Run the sweep of a row; return its line of the log."""
    what, words = ROWS[number]
    path = output / "runs" / f"row-{number}"
    if not (path / "sweep.json").exists():
        run_command("sweep", *common_settings(rows, output), "--run.name", path.name, *words.split())
    report = json.loads((path / "sweep.json").read_text(encoding="utf-8"))
    test, selected = report["selected"]["test"], report["selected"]["values"]
    scores = {key: test[key]["values"] for key in ("accuracy", "macro_f1", "loss")}
    validation = report["settings"][0]["validation"]["accuracy"]["values"]
    fields = {"number": number, "what": what, "command": f"agnews-dist sweep --config rows.yaml {words}", "selected": selected}
    summary = {"mean": test["accuracy"]["mean"], "deviation": test["accuracy"]["deviation"]}
    return {**fields, **summary, "test": scores, "validation": validation, "versions": report["versions"]}


def have_equal_bits(output: Path) -> bool:
    """Return whether the members of both pad tokens have the same weights and predictions."""
    first, second = (output / "runs" / f"row-{number}" for number in PADS)
    names = sorted(path.name for path in (first / "members").glob("*.safetensors"))
    assert names
    for name in names:
        one, other = (load_file(path / "members" / name) for path in (first, second))
        if one.keys() != other.keys() or any(one[key].tobytes() != other[key].tobytes() for key in one):
            return False
    found = [(path / "best" / "predictions-test.jsonl").read_bytes() for path in (first, second)]
    return found[0] == found[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", type=int, default=list(range(len(ROWS))), choices=range(len(ROWS)), metavar="N")
    args = parser.parse_args()
    output = args.output.resolve()
    rows = write_rows(output / "rows")
    (output / "log.jsonl").unlink(missing_ok=True)
    found = []
    for number in args.rows:
        found.append(measure(number, rows, output))
        append(output / "log.jsonl", found[-1])
    if set(PADS) <= set(args.rows):
        append(output / "log.jsonl", {"what": "pad tokens", "equal_bits": have_equal_bits(output)})
    print("| what | test accuracy | command |\n|---|---|---|")
    for row in found:
        deviation = f" +- {row['deviation']:.4f}" if row["deviation"] is not None else ""
        print(f"| {row['what']} | {row['mean']:.4f}{deviation} | `{row['command']}` |")


if __name__ == "__main__":
    main()

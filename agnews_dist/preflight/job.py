"""How much the configured job has to compute: counts of texts, from files' own figures where they are at hand."""

from pathlib import Path

from agnews_dist.config.schema import Config
from agnews_dist.data.corpus import SYNTHETIC, SYNTHETIC_ROWS
from agnews_dist.data.local_files import files_by_split
from agnews_dist.engine.memory import Shape
from agnews_dist.errors import UserError
from agnews_dist.preflight.time_estimate import AG_NEWS_ROWS, Job

BYTES_PER_ROW = 240
"""Of AG News as csv."""


def job_of(config: Config, shape: Shape, *, trainable_blocks: int, num_ranks: int) -> Job:
    """What the expected time is computed from."""
    data, engine = config.data, config.engine
    counts = _rows(data.source)
    if not counts.get("validation"):
        held_out = round(counts["train"] * data.validation_fraction)
        counts |= {"train": counts["train"] - held_out, "validation": held_out}
    limits = {"train": data.limit_train, "validation": data.limit_validation, "test": data.limit_test}
    for name, most in limits.items():
        counts[name] = min(counts.get(name, 0), counts.get(name, 0) if most is None else most)
    budget = config.batch.global_token_budget
    return Job(
        shape=shape,
        trainable_blocks=trainable_blocks,
        num_ranks=num_ranks,
        epochs=config.optim.epochs,
        train_texts=counts["train"],
        scored_texts=counts["validation"],
        max_length=data.max_length,
        global_batch_size=config.batch.global_batch_size if budget is None else max(1, budget // 52),
        fast_path=engine.fast_path,
        keeps_features=engine.fast_path and engine.feature_cache != "off",
    )


def _rows(source: str) -> dict[str, int]:
    """Rows by split; those of AG News where nothing tells."""
    if source == SYNTHETIC:
        return dict(SYNTHETIC_ROWS)
    path = Path(source).expanduser()
    try:
        splits = files_by_split(path) if path.is_dir() else {"train": [path]} if path.is_file() else {}
        counts = {name: sum(map(_rows_of_file, files)) for name, files in splits.items()}
    except (OSError, UserError, ValueError):
        counts = {}
    return counts if counts.get("train") else dict(AG_NEWS_ROWS)


def _rows_of_file(file: Path) -> int:
    if file.suffix.lower() == ".parquet":
        from pyarrow import parquet

        return int(parquet.read_metadata(file).num_rows)  # pyright: ignore[reportUnknownMemberType]
    return max(1, file.stat().st_size // BYTES_PER_ROW)

"""The lengths that samplers are compared on: real AG News ones, a lognormal and a heavy-tailed sample. All are seeded."""

import os
from pathlib import Path

import numpy as np
import pyarrow.parquet
from numpy.typing import NDArray
from transformers import AutoTokenizer

from agnews_dist.data.tokens import encode

REPOSITORY = Path(__file__).resolve().parents[3]
SHARED = Path(os.environ.get("AGNEWS_SHARED", REPOSITORY.parent / "shared"))
NUM_SYNTHETIC = 120_011
"""A prime: no number of ranks and no batch divides it."""


def ag_news_rows() -> NDArray[np.int64]:
    """Lengths of the shared real training rows with GPT-2's tokenizer, truncated at 256."""
    file = SHARED / "data" / "ag_news" / "train-00000-of-00001.parquet"
    texts = pyarrow.parquet.read_table(file).column("text").to_pylist()
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "gpt2")
    tokens, _ = encode(tokenizer, texts, 256)
    return np.array([len(row) for row in tokens], dtype=np.int64)


def all_lengths() -> dict[str, NDArray[np.int64]]:
    """name -> lengths: AG News resampled to its real size of 120,000, and two of 120,011 that are clipped at 1,024 tokens."""
    rows_N, rng = ag_news_rows(), np.random.default_rng(0)
    ag_news_N = rows_N[rng.integers(0, len(rows_N), 120_000)]
    lognormal_N = rng.lognormal(np.log(50), 0.7, NUM_SYNTHETIC)
    pareto_N = 12 * (1 + rng.pareto(1.2, NUM_SYNTHETIC))
    return {
        "AG News": ag_news_N,
        "lognormal": np.clip(np.rint(lognormal_N), 1, 1024).astype(np.int64),
        "Pareto": np.clip(np.rint(pareto_N), 1, 1024).astype(np.int64),
    }

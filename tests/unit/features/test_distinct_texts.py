"""Distinct texts: equal tokens are one text, in any split and row; other tokens never are."""

import numpy as np
import pytest
import torch

from agnews_dist.data.batching.loader import TokenTable
from agnews_dist.data.tokens import TokenSplit
from agnews_dist.features.distinct_texts import NO_TEXT, DistinctTexts


def table_of(name: str, *texts: tuple[int, ...], dtype: type = np.uint16) -> TokenTable:
    tokens = np.array([token for text in texts for token in text], dtype)
    offsets = np.cumsum([0, *map(len, texts)]).astype(np.int64)
    split = TokenSplit(name, tokens, offsets, np.zeros(len(texts), np.int64), 0)
    return TokenTable(split, pad_id=0, device=torch.device("cpu"))


TABLES = {
    "train": table_of("train", (5, 6), (7,), (5, 6), (1, 2, 3)),
    "test": table_of("test", (1, 2, 3), (8, 9), (7,), dtype=np.int32),
}


def test_equal_tokens_are_one_text():
    texts = DistinctTexts(TABLES, one_row_per_text=False)
    assert {name: number_N.tolist() for name, number_N in texts.number_N.items()} == {"train": [0, 1, 0, 2], "test": [2, 3, 1]}
    assert (texts.lengths_U.tolist(), texts.rows_U.tolist(), texts.num_tokens) == ([2, 1, 3, 2], [2, 1, 3, 2], 8)
    assert DistinctTexts(TABLES, one_row_per_text=True).rows_U.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("other", [(1, 2, 3, 5), (1, 2, 3), (0, 1, 2, 3, 4), (4, 3, 2, 1), (257, 2, 3, 4), (1, 2, 3, 4, 0)])
def test_other_tokens_are_another_text(other):
    texts = DistinctTexts({"train": table_of("train", (1, 2, 3, 4), other)}, one_row_per_text=False)
    assert texts.number_N["train"].tolist() == [0, 1]


def test_texts_do_not_depend_on_where_their_tokens_are_cut():
    texts = DistinctTexts({"train": table_of("train", (1, 2), (3,), (1,), (2, 3))}, one_row_per_text=False)
    assert len(texts) == 4


def test_pack_takes_texts_of_any_split_in_order():
    texts = DistinctTexts(TABLES, one_row_per_text=False)
    tokens_P, lengths = texts.pack(np.array([3, 0, 1, 3, 2]))
    assert (tokens_P.tolist(), lengths) == ([8, 9, 5, 6, 7, 8, 9, 1, 2, 3], [2, 2, 1, 2, 3])
    assert tokens_P.dtype == torch.int64


def test_chosen_rows_leave_the_others_without_a_number():
    texts = DistinctTexts(TABLES, one_row_per_text=False, chosen={"train": np.array([3, 1]), "test": np.array([], np.int64)})
    assert texts.number_N["train"].tolist() == [NO_TEXT, 1, NO_TEXT, 0]
    assert texts.number_N["test"].tolist() == [NO_TEXT] * 3
    assert texts.pack(np.array([0]))[0].tolist() == [1, 2, 3]

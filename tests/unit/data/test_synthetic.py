"""Synthetic text: reproducible, without shared texts, as long as AG News, learnable but not perfectly."""

import hashlib

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import MultinomialNB
from tokenizers import Tokenizer

from agnews_dist.data.synthetic import CLASS_NAMES, SPLITS, generate


@pytest.fixture(scope="module")
def train() -> list[tuple[str, int]]:
    return generate(4_000, 0, "train")


@pytest.mark.slow
def test_generate_is_reproducible_and_fewer_rows_are_a_prefix(train):
    assert generate(300, 0, "train") == train[:300]
    assert generate(300, 1, "train") != train[:300]


def test_generate_values_are_frozen():
    rows = generate(200, 7, "test")
    digest = hashlib.sha256("\n".join(f"{label} {text}" for text, label in rows).encode()).hexdigest()
    assert digest == "e1fd2cdcd5565075b37be7166afdb5620b6958d856b2fca24b2d09673c23457f"


@pytest.mark.slow
def test_generate_repeats_no_text_in_or_across_splits(train):
    everything = {(split, seed): generate(1_500, seed, split) for split in SPLITS for seed in (0, 1)}
    assert len(everything) == 6
    for rows in (*everything.values(), train):
        assert len({text for text, _ in rows}) == len(rows)
    of_split = {split: {text for seed in (0, 1) for text, _ in everything[split, seed]} for split in SPLITS}
    assert all(len(texts) > 2_900 for texts in of_split.values())
    assert not of_split["train"] & of_split["validation"]
    assert not of_split["train"] & of_split["test"]
    assert not of_split["validation"] & of_split["test"]


def test_generate_balances_and_mixes_classes(train):
    labels = np.array([label for _, label in train])
    assert np.bincount(labels).tolist() == [1_000] * len(CLASS_NAMES)
    orders = {tuple(four) for four in labels.reshape(-1, 4).tolist()}
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders)
    assert len(orders) == 24


def test_generate_has_variety_and_unicode(train):
    text = " ".join(text for text, _ in train)
    assert len(set(text.split())) > 1_500
    assert "ü" in text
    assert "📈" in text
    assert all(text.strip() == text and "{" not in text and "  " not in text for text, _ in train)


@pytest.mark.slow
def test_generate_has_the_lengths_of_ag_news(shared, train):
    tokenizer = Tokenizer.from_file(str(shared / "tokenizers/gpt2/tokenizer.json"))
    lengths = np.array([len(encoding) for encoding in tokenizer.encode_batch([text for text, _ in train])])
    assert len(lengths) == 4_000
    assert lengths.mean() == pytest.approx(52, abs=2)
    assert lengths.std() == pytest.approx(18, abs=2.5)
    assert np.median(lengths) == pytest.approx(50, abs=2)
    assert np.quantile(lengths, 0.95) == pytest.approx(79, abs=6)
    assert np.quantile(lengths, 0.99) == pytest.approx(119, abs=12)
    assert 180 < lengths.max() < 340
    assert lengths.min() >= 8


@pytest.mark.slow
@pytest.mark.parametrize("model", [MultinomialNB(), LogisticRegression(max_iter=1_000)])
def test_generated_classes_can_be_learnt_but_not_perfectly(train, model):
    counts = CountVectorizer()
    model.fit(counts.fit_transform([text for text, _ in train]), [label for _, label in train])
    held_out = generate(2_000, 0, "test")
    accuracy = model.score(counts.transform([text for text, _ in held_out]), [label for _, label in held_out])
    assert 0.9 < accuracy < 0.97


def test_generated_classes_share_topic_words(train):
    counts = CountVectorizer(binary=True)
    present = counts.fit_transform([text for text, _ in train]).toarray()
    labels = np.array([label for _, label in train])
    frequent = present.sum(axis=0) > 100
    assert frequent.sum() > 100
    purity = np.array([present[labels == c][:, frequent].sum(axis=0) for c in range(4)]).max(axis=0)
    assert (purity / present[:, frequent].sum(axis=0)).max() < 0.999


def test_generate_refuses_an_unknown_split():
    with pytest.raises(ValueError, match="split 'dev' is none of train, validation, test"):
        generate(1, 0, "dev")

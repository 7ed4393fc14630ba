"""A training of two ranks on real AG News rows with a small trained GPT-2."""

import json

from support import fork_server
from transformers import pipeline


def test_training_on_real_rows_beats_random_features(shared, tmp_path):
    fork_server.run_ranks(
        2,
        *("-m", "agnews_dist.train", "--config", "configs/gpt2_mini_cpu.yaml"),
        *("--model.name", str(shared / "checkpoints" / "gpt2-mini"), "--data.source", str(shared / "data" / "ag_news")),
        *(
            "--data.class_names",
            "World,Sports,Business,Sci/Tech",
            "--data.limit_train",
            "1000",
            "--data.limit_validation",
            "300",
            "--optim.epochs",
            "2",
        ),
        *("--run.dir", str(tmp_path), "--run.name", "mini", "--data.cache_dir", str(tmp_path / "cache")),
    )
    result = json.loads((tmp_path / "mini" / "result.json").read_text())
    # The source has no test split, so there are no test scores.
    assert set(result["splits"]) == {"validation"}
    assert result["splits"]["validation"]["num_examples"] == 300
    # Random weights of the same shape reach 0.35 with 2,000 rows and three epochs, chance is 0.25.
    assert result["splits"]["validation"]["accuracy"] > 0.65
    assert result["critical_path_efficiency"] > 0.9
    classify = pipeline("text-classification", model=str(tmp_path / "mini" / "model"))
    found = classify(
        [
            "Striker scores twice as the team wins the cup final after extra time",
            "Oil prices and shares fall as investors fear higher interest rates",
        ],
        truncation=True,
    )
    assert [answer["label"] for answer in found] == ["Sports", "Business"]

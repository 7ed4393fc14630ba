"""Tokens: equal to the tokenizer's, never special ones from text; the cache survives crashes, races and damage."""

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import small_run
from support.fork_server import run_python
from support.processes import TIMEOUT, environment
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from agnews_dist.data.corpus import Source, load_corpus
from agnews_dist.data.rows import Corpus, Origin, Split
from agnews_dist.data.texts import Texts
from agnews_dist.data.tokens import TextEncoding, TokenStore, encode, open_or_build
from agnews_dist.errors import DataError
from agnews_dist.events import DataChecked, Event, Progress, Warned, ignore_event
from agnews_dist.model.embedded import embedded_tokenizer
from agnews_dist.storage import locks

SPECIAL = "a <|endoftext|> b [PAD] c"


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    limits = {"train": 2_500, "validation": 60, "test": 40}
    return load_corpus(Source("synthetic"), validation_fraction=0.1, limits=limits, seed=0)


def small_corpus(*texts: str) -> Corpus:
    labels = np.arange(len(texts), dtype=np.int64) % 4
    digest = hashlib.sha256(repr(texts).encode()).hexdigest()
    return Corpus(
        {"train": Split("train", Texts.of(texts), labels, Origin.of_file("x.csv", len(texts)))}, ("a", "b", "c", "d"), digest
    )


def set_pad_token(tokenizer: PreTrainedTokenizerFast, pad_token: str) -> PreTrainedTokenizerFast:
    if pad_token == "new":
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    else:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def open_tokens(corpus: Corpus, cache_dir: Path, max_length: int = 512, emit=ignore_event, **options) -> TokenStore:
    tokenizer = options.pop("tokenizer", None) or embedded_tokenizer()
    return open_or_build(corpus, tokenizer, max_length=max_length, cache_dir=cache_dir, emit=emit, **options)


def warnings_of(events: list[Event]) -> list[str]:
    return [event.message for event in events if isinstance(event, Warned)]


def check_tokens(store: TokenStore, corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> None:
    assert list(store.splits) == list(corpus.splits)
    for name, split in store.splits.items():
        texts = corpus.splits[name].texts
        expected = [tokenizer(text)["input_ids"] for text in texts]
        assert len(split) == len(texts) == len(expected)
        assert split.tokens.tolist() == [token for ids in expected for token in ids]
        assert split.lengths.tolist() == [len(ids) for ids in expected]
        assert split.offsets.tolist() == np.cumsum([0, *split.lengths]).tolist()
        assert split.labels.tolist() == corpus.splits[name].labels.tolist()
        assert split.offsets.dtype == split.labels.dtype == split.lengths.dtype == np.int64
        assert split.num_truncated == 0


# Encoding


@pytest.mark.slow
@pytest.mark.parametrize("pad_token", ["new", "eos"])
def test_encode_treats_special_tokens_as_text(shared, pad_token):
    for tokenizer in (AutoTokenizer.from_pretrained(shared / "tokenizers/gpt2"), embedded_tokenizer()):
        tokenizer = set_pad_token(tokenizer, pad_token)
        special = set(tokenizer.all_special_ids)
        assert special & set(tokenizer(SPECIAL, split_special_tokens=False)["input_ids"])
        # The state left by such a call, or by padding and truncation, must have no effect.
        tokenizer(["a b c", "d"], padding=True, truncation=True, max_length=2)
        ids, num_truncated = encode(tokenizer, [SPECIAL, "[PAD]", "<|endoftext|>"], 100)
        assert num_truncated == 0
        assert [tokenizer.decode(tokens) for tokens in ids] == [SPECIAL, "[PAD]", "<|endoftext|>"]
        assert all(len(tokens) > 1 and not special & set(tokens) for tokens in ids)


@pytest.mark.slow
def test_encode_gpt2_by_hand(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers/gpt2")
    assert encode(tokenizer, ["Hello world", "a<|endoftext|>"], 3) == ([[15496, 995], [64, 27, 91]], 1)


@pytest.mark.slow
def test_encode_truncates_and_counts_long_texts():
    tokenizer = embedded_tokenizer()
    long = " ".join(["news"] * 10_000)
    assert len(tokenizer(long, verbose=False)["input_ids"]) >= 10_000
    ids, num_truncated = encode(tokenizer, [long, "short", long], 7)
    assert num_truncated == 2
    assert [len(tokens) for tokens in ids][::2] == [7, 7]
    assert ids[1] == tokenizer("short")["input_ids"]
    assert ids[0] == tokenizer(long, verbose=False)["input_ids"][:7]


def test_encode_of_a_classifier_made_elsewhere():
    tokenizer = embedded_tokenizer()
    end = tokenizer.eos_token_id
    template = processors.TemplateProcessing(single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", end)])
    tokenizer.backend_tokenizer.post_processor = template
    first, second, third = tokenizer("news", add_special_tokens=False)["input_ids"]
    texts = ["news", "<|endoftext|>", "news" * 9, "news<|endoftext|>news"]
    rules = TextEncoding(adds_special_tokens=True, splits_special_tokens=False)
    ids, num_truncated = encode(tokenizer, texts, 5, encoding=rules)
    assert ids == [
        [first, second, third, end],
        [end, end],
        [first, second, third, first, end],
        [first, second, third, end, end],
    ]
    assert num_truncated == 2
    ids, _ = encode(tokenizer, texts, 5, encoding=replace(rules, pad_id=end))
    assert ids == [[first, second, third], [end], [first, second, third, first], [first, second, third]]
    tokenizer.truncation_side = "left"
    assert encode(tokenizer, ["news" * 9], 5, encoding=rules)[0] == [[third, first, second, third, end]]


def test_the_key_of_a_classifier_made_elsewhere_is_another(tmp_path):
    corpus, tokenizer = small_corpus("The market rose."), embedded_tokenizer()
    rules = [
        TextEncoding(),
        TextEncoding(adds_special_tokens=True),
        TextEncoding(splits_special_tokens=False),
        TextEncoding(pad_id=3),
    ]
    stores = [open_tokens(corpus, tmp_path, tokenizer=tokenizer, encoding=each) for each in rules]
    tokenizer.truncation_side = "left"
    stores.append(open_tokens(corpus, tmp_path, tokenizer=tokenizer))
    assert len({store.fingerprint for store in stores}) == 5
    assert stores[0].fingerprint == open_tokens(corpus, tmp_path, tokenizer=embedded_tokenizer()).fingerprint


@pytest.mark.slow
def test_encode_logs_nothing_for_long_texts():
    code = """if True:
        import sys
        from agnews_dist.data.tokens import encode
        from agnews_dist.model.embedded import embedded_tokenizer
        tokenizer, long = embedded_tokenizer(), "news " * 10_000
        encode(tokenizer, [long], 7)
        print("now the tokenizer itself", file=sys.stderr)
        tokenizer(long)
    """
    ours, its_own = run_python("-c", code).stderr.split("now the tokenizer itself")
    assert ours == ""
    assert "longer than the specified maximum" in its_own


def test_encode_keeps_a_text_of_the_maximum_length():
    tokenizer = embedded_tokenizer()
    length = len(tokenizer("The market rose.")["input_ids"])
    assert encode(tokenizer, ["The market rose."], length)[1] == 0
    assert encode(tokenizer, ["The market rose."], length - 1)[1] == 1


def test_encode_names_a_text_without_token(tmp_path):
    # Knows only 'a': other letters disappear.
    bpe = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)
    with pytest.raises(DataError, match=r"text 2 has no token \('xyz'\): .* Remove it"):
        encode(tokenizer, ["a", "xyz"], 5)
    with pytest.raises(DataError, match=r"x.csv row 1003 has no token \('xyz'\)"):
        open_tokens(small_corpus(*["a"] * 1_002, "xyz"), tmp_path, tokenizer=tokenizer)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


# Building and opening


@pytest.mark.slow
def test_open_or_build_gives_the_tokenizers_tokens(tmp_path, corpus):
    events: list[Event] = []
    built = open_tokens(corpus, tmp_path / "new" / "cache", emit=events.append)
    check_tokens(built, corpus, embedded_tokenizer())
    assert not built.was_cached
    assert built.path == tmp_path / "new" / "cache" / built.fingerprint
    assert built.class_names == corpus.class_names
    assert built.findings == ()
    progress = [event for event in events if isinstance(event, Progress)]
    assert [event.done for event in progress] == [0, 1_000, 2_000, 2_500, 2_500, 2_560, 2_560, 2_600]
    assert {event.total for event in progress} == {2_600}
    assert len(events) == len(progress)

    events.clear()
    cached = open_tokens(corpus, tmp_path / "new" / "cache", emit=events.append)
    assert cached.was_cached
    assert events == []
    check_tokens(cached, corpus, embedded_tokenizer())
    for split in cached.splits.values():
        assert isinstance(split.tokens, np.memmap)
        assert split.tokens.dtype == np.uint16
        assert not split.tokens.flags.writeable


@pytest.mark.slow
def test_open_or_build_tokenises_ag_news_with_gpt2(shared, tmp_path):
    source = shared / "data/ag_news"
    corpus = load_corpus(Source(str(source)), validation_fraction=0.1, limits={"train": 1_500, "validation": 100}, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers/gpt2")
    store = open_tokens(corpus, tmp_path, tokenizer=tokenizer)
    check_tokens(store, corpus, tokenizer)
    assert 48 < store.splits["train"].lengths.mean() < 56


@pytest.mark.slow
def test_large_vocabularies_are_int32(tmp_path):
    vocabulary = {f"w{i}": i for i in range(70_000)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    store = open_tokens(small_corpus("w69999 w5"), tmp_path, tokenizer=PreTrainedTokenizerFast(tokenizer_object=words))
    assert store.splits["train"].tokens.dtype == np.int32
    assert store.splits["train"].tokens.tolist() == [69_999, 5]


def test_the_key_is_data_tokenizer_and_length_but_not_the_pad_token(tmp_path):
    texts = ("The market rose.", "A team won.")
    base = open_tokens(small_corpus(*texts), tmp_path)
    other_tokenizer = embedded_tokenizer()
    other_tokenizer.add_tokens(["market"])
    others = [
        open_tokens(small_corpus(*texts[::-1]), tmp_path),
        open_tokens(small_corpus(*texts), tmp_path, max_length=3),
        open_tokens(small_corpus(*texts), tmp_path, tokenizer=other_tokenizer),
    ]
    assert not any(store.was_cached for store in (base, *others))
    assert len({store.fingerprint for store in (base, *others)}) == 4
    used = embedded_tokenizer()
    for pad_token in ("new", "eos"):
        used = set_pad_token(used, pad_token)
        used(["a", "b c"], padding=True, truncation=True, max_length=2)
        assert open_tokens(small_corpus(*texts), tmp_path, tokenizer=used).was_cached


def test_open_or_build_repeats_warnings_at_every_opening(tmp_path):
    texts = ["short", *["far too long for this length " * 3] * 3]
    corpus = small_corpus(*texts)
    twin = Split("test", Texts.of(texts[:1]), np.zeros(1, np.int64), Origin.of_file("t.csv", 1))
    corpus = Corpus({**corpus.splits, "test": twin}, corpus.class_names, corpus.fingerprint)
    for was_cached in (False, True):
        events: list[Event] = []
        store = open_tokens(corpus, tmp_path, max_length=4, emit=events.append)
        assert store.was_cached == was_cached
        assert store.splits["train"].num_truncated == 3
        assert store.splits["train"].lengths.max() == 4
        assert [event.findings for event in events if isinstance(event, DataChecked)] == [store.findings]
        leak, cut = store.findings[-2:]
        assert str(leak).startswith("1 row of test with a text that is also in train (t.csv row 1 = x.csv row 1): ")
        assert str(cut).startswith("3 of 5 texts are longer than 4 tokens (60.0%; train 3): they were cut off")
        assert "Raise --data.max_length" in str(cut)
    # Equal rows of another file have its name.
    moved = Split("test", twin.texts, twin.labels, Origin.of_file("other.csv", 1))
    store = open_tokens(
        Corpus({**corpus.splits, "test": moved}, corpus.class_names, corpus.fingerprint), tmp_path, max_length=4
    )
    assert store.was_cached
    assert "(other.csv row 1 = x.csv row 1)" in str(store.findings[-2])
    assert store.findings[-1] == cut


def test_default_directory_follows_xdg(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store = open_or_build(small_corpus("a"), embedded_tokenizer(), max_length=9, cache_dir=None, emit=ignore_event)
    assert store.path.parent == tmp_path / "agnews_dist"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    store = open_or_build(small_corpus("a"), embedded_tokenizer(), max_length=9, cache_dir=None, emit=ignore_event)
    assert store.path.parent == tmp_path / "home" / ".cache" / "agnews_dist"


def test_unwritable_directory_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"token cache .*/file/cache cannot be written: Not a directory\. Set --data.cache_dir"):
        open_tokens(small_corpus("a"), tmp_path / "file" / "cache")


def test_read_only_cache_is_used_if_it_is_valid(tmp_path):
    store = open_tokens(small_corpus("a"), tmp_path)
    lock = tmp_path / f"{store.fingerprint}.lock"
    lock.unlink(missing_ok=True)
    # Works for root too, who ignores permissions: a directory cannot be locked as a file.
    lock.mkdir()
    assert open_tokens(small_corpus("a"), tmp_path).was_cached
    (store.path / "meta.json").unlink()
    with pytest.raises(DataError, match=r"cannot be written: .* Set --data.cache_dir"):
        open_tokens(small_corpus("a"), tmp_path)


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "flipped token": (lambda d: flip(d / "train-tokens.npy", -1), "train-tokens.npy has another checksum"),
    "flipped header": (lambda d: flip(d / "train-offsets.npy", 0), "train-offsets.npy has another checksum"),
    "flipped label": (lambda d: flip(d / "train-labels.npy", -8), "train-labels.npy has another checksum"),
    "cut array": (lambda d: os.truncate(d / "train-tokens.npy", 130), "train-tokens.npy has another checksum"),
    "no array": (lambda d: (d / "train-offsets.npy").unlink(), "train-offsets.npy is missing"),
    "no meta": (lambda d: (d / "meta.json").unlink(), "meta.json is missing"),
    "cut meta": (lambda d: os.truncate(d / "meta.json", 100), "cannot be read: JSONDecodeError"),
    "binary meta": (lambda d: (d / "meta.json").write_bytes(b"\xff\xfe\x00"), "cannot be read: UnicodeDecodeError"),
    "foreign meta": (lambda d: (d / "meta.json").write_text('["other"]'), "cannot be read: TypeError"),
    "changed class": (
        lambda d: (d / "meta.json").write_text((d / "meta.json").read_text().replace('"a"', '"A"')),
        "meta.json was changed",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_cache_is_built_again(tmp_path, damage):
    corpus = small_corpus("The market rose.", "A team won.")
    store = open_tokens(corpus, tmp_path)
    hurt, reason = DAMAGE[damage]
    hurt(store.path)
    events: list[Event] = []
    again = open_tokens(corpus, tmp_path, emit=events.append)
    assert not again.was_cached
    (message,) = warnings_of(events)
    assert "is damaged" in message
    assert reason in message
    check_tokens(again, corpus, embedded_tokenizer())
    assert again.class_names == ("a", "b", "c", "d")
    assert open_tokens(corpus, tmp_path).was_cached


@pytest.mark.slow
def test_changed_bytes_of_meta_are_detected(tmp_path):
    corpus = small_corpus("The market rose.")
    store = open_tokens(corpus, tmp_path)
    whole = (store.path / "meta.json").read_bytes()
    assert len(whole) > 500
    for position in range(0, len(whole), 37):
        (store.path / "meta.json").write_bytes(whole)
        flip(store.path / "meta.json", position)
        again = open_tokens(corpus, tmp_path)
        assert (again.class_names, again.splits["train"].num_truncated) == (store.class_names, 0)
        check_tokens(again, corpus, embedded_tokenizer())


def test_file_at_the_path_of_the_cache_is_replaced(tmp_path):
    store = open_tokens(small_corpus("a"), tmp_path / "other")
    (tmp_path / store.fingerprint).write_text("not a directory")
    assert not open_tokens(small_corpus("a"), tmp_path).was_cached
    assert open_tokens(small_corpus("a"), tmp_path).was_cached


# Several processes

WORKER = """
import hashlib, json, os, sys, time
from pathlib import Path
from transformers import PreTrainedTokenizerFast
from agnews_dist.data.corpus import Source, load_corpus
from agnews_dist.data.tokens import open_or_build
from agnews_dist.events import Progress

cache, seconds, builds_first = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3] == "first"
limits = {"train": 2_500, "validation": 60, "test": 40}
corpus = load_corpus(Source("synthetic"), validation_fraction=0.1, limits=limits, seed=0)
# Not `embedded_tokenizer`: that imports torch and trains it again.
tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[4])
print("ready", flush=True)
sys.stdin.readline()

def slowly(event):
    if isinstance(event, Progress):
        print("progress", event.done, flush=True)
        time.sleep(seconds)

store = open_or_build(
    corpus, tokenizer, max_length=512, cache_dir=cache, emit=slowly, builds_first=builds_first
)
content = b"".join(part.tobytes() for s in store.splits.values() for part in (s.tokens, s.offsets, s.labels))
print(json.dumps([store.was_cached, hashlib.sha256(content).hexdigest()]), flush=True)
"""


class Worker:
    """Process that opens the corpus of this file slowly after `go`."""

    def __init__(self, cache: Path, seconds: float, order: str = "first") -> None:
        tokenizer = small_run.write_inputs() / "model"
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(cache), str(seconds), order, str(tokenizer)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def line(self) -> str:
        return self.process.stdout.readline().strip()

    def go(self) -> None:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def result(self) -> tuple[bool, str, int]:
        """Return (was cached, sha256 of the content, number of progress lines)."""
        *progress, last = self.process.communicate(timeout=TIMEOUT)[0].splitlines()
        was_cached, digest = json.loads(last)
        return was_cached, digest, len(progress)


def content_of(store: TokenStore) -> str:
    parts = (part.tobytes() for s in store.splits.values() for part in (s.tokens, s.offsets, s.labels))
    return hashlib.sha256(b"".join(parts)).hexdigest()


@pytest.mark.slow
def test_one_of_two_simultaneous_processes_builds(tmp_path, corpus):
    with Worker(tmp_path / "cache", 0.2) as one, Worker(tmp_path / "cache", 0.2) as two:
        assert [one.line(), two.line()] == ["ready", "ready"]
        one.go()
        two.go()
        results = sorted([one.result(), two.result()])
    assert [(was_cached, num_progress) for was_cached, _, num_progress in results] == [(False, 8), (True, 0)]
    expected = content_of(open_tokens(corpus, tmp_path / "reference"))
    assert [digest for _, digest, _ in results] == [expected, expected]
    assert not list((tmp_path / "cache").glob("*.building-*"))


@pytest.mark.slow
def test_builds_first_decides_which_process_builds(tmp_path):
    with Worker(tmp_path, 0.05, "second") as second, Worker(tmp_path, 0.05, "first") as first:
        assert [first.line(), second.line()] == ["ready", "ready"]
        second.go()
        time.sleep(0.5)
        first.go()
        assert first.result()[::2] == (False, 8)
        assert second.result()[::2] == (True, 0)


@pytest.mark.slow
def test_killed_builder_leaves_no_valid_cache(tmp_path, corpus):
    with Worker(tmp_path, 30) as victim, Worker(tmp_path, 0) as waiting:
        assert [victim.line(), waiting.line()] == ["ready", "ready"]
        victim.go()
        assert victim.line() == "progress 0"
        (building,) = tmp_path.glob("*.building-*")
        waiting.go()
        victim.process.send_signal(signal.SIGKILL)
        assert victim.process.wait(timeout=TIMEOUT) == -signal.SIGKILL
        # The lock ended with its holder, so the waiting process builds.
        was_cached, digest, _ = waiting.result()
    assert not was_cached
    store = open_tokens(corpus, tmp_path)
    assert store.was_cached
    check_tokens(store, corpus, embedded_tokenizer())
    assert digest == content_of(store)
    # A killed process counts as alive until its parent has reaped it. The next build removes its leftovers.
    shutil.rmtree(store.path)
    assert not open_tokens(corpus, tmp_path).was_cached
    assert not building.exists()


def test_leftovers_of_live_and_remote_builders_are_kept(tmp_path):
    corpus = small_corpus("a")
    key = open_tokens(corpus, tmp_path / "other").fingerprint
    node = os.uname().nodename
    alive = tmp_path / f"{key}.building-{node}-{os.getppid()}-0a"
    distant = tmp_path / f"{key}.building-far-away-1-0b"
    old = tmp_path / f"{key}.building-far-away-1-0c"
    for directory in (alive, distant, old):
        directory.mkdir()
    os.utime(old, (0, 0))
    open_tokens(corpus, tmp_path)
    assert [alive.exists(), distant.exists(), old.exists()] == [True, True, False]


SUSPENDED = """
import os, signal, sys
from pathlib import Path
from agnews_dist.storage.locks import LockWait, wait_for_lock
path = Path(sys.argv[1])
lock = wait_for_lock(path, LockWait(path, "", print))
print("locked", flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
"""


@pytest.mark.slow
def test_suspended_builder_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "SPEAK_SECONDS", 0.5)
    corpus, events = small_corpus("one text"), list[Event]()
    path = open_tokens(corpus, tmp_path).path
    shutil.rmtree(path)
    lock = path.with_name(f"{path.name}.lock")
    with subprocess.Popen(
        [sys.executable, "-c", SUSPENDED, str(lock)], stdout=subprocess.PIPE, text=True, env=environment()
    ) as builder:
        assert builder.stdout.readline() == "locked\n"
        try:
            store = open_tokens(corpus, tmp_path, emit=events.append)
            assert not store.was_cached
            assert warnings_of(events) == [
                f"token cache {path}: process {builder.pid} on {socket.gethostname()}, which has the lock {lock}, is "
                "suspended. It is not waited for any longer."
            ]
            assert open_tokens(corpus, tmp_path, emit=events.append).was_cached, "nor is it asked once the cache is there"
            assert len(warnings_of(events)) == 1
        finally:
            builder.kill()

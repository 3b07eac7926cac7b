"""Texts are cut before they are tokenised: what is kept gives the tokens that the whole text would have given."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from memsafe.models.content import ContentTokenizer, Cutter
from memsafe.models.words import Words
from tests.tiny_models import minilm_folder

CORPUS = [
    "the quick brown fox jumps over the lazy dog; aaaa bbbb    spaces\n\nlines 123 4567",
    "你好世界 这是一个没有空格的文本",
    "ab" * 40,
]


def wordpiece() -> Tokenizer:
    return Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))


def byte_level(pretokenised: bool = True) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pretokenised)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS * 3, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(
        CORPUS * 3,
        trainers.UnigramTrainer(vocab_size=120, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False),
    )
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "wordpiece": wordpiece,
    "byte-level": byte_level,
    "byte-level, no pieces": lambda: byte_level(pretokenised=False),
    "unigram": unigram,
}


@pytest.fixture(scope="module", params=KINDS)
def content(request: pytest.FixtureRequest) -> ContentTokenizer:
    return ContentTokenizer(KINDS[request.param]())


def filled(unit: str, num_chars: int) -> str:
    return (unit * (num_chars // len(unit) + 1))[:num_chars]


def mixed(seed: int, num_chars: int) -> str:
    """Words, runs of white space, runs of letters and unspaced script, of any length."""
    random_ = random.Random(seed)
    parts = [
        lambda: "".join(random_.choices("abcdefgh ,.", k=random_.randrange(1, 300))),
        lambda: random_.choice(" \n\t\u00a0") * random_.choice([1, 2, 30, 9000]),
        lambda: random_.choice("ax!你\U0001f9ec\u0301") * random_.choice([1, 5, 120, 9000]),
        lambda: "".join(random_.choices("你好世界這是一個", k=random_.randrange(1, 400))),
        lambda: "[SEP]" + "the quick brown fox " * random_.randrange(1, 50),
    ]
    text = ""
    while len(text) < num_chars:
        text += random_.choice(parts)()
    return text


def any_of(codes: range, num_chars: int) -> str:
    return "".join(random.Random(0).choices([chr(code) for code in codes], k=num_chars))


GIANTS = {
    "words": filled("the quick brown fox ", 150_000),
    "unspaced": filled("你好世界這是一個没有空格的文本", 60_000),
    "spaces": "the" + " " * 150_000 + "dog",
    "lines": " \n\t\r\n" * 30_000 + "dog 123 quick",
    "one letter": "a" * 150_000,
    "one letter, odd": "the " + "a" * 99_999 + "b quick",
    "two letters": "ab" * 50_001,
    "digits": "x0123456789abcdef" * 9000,
    "combining": "e" + "\u0301" * 50_000 + " dog",
    "unknown": "\U0001f9ec" * 50_000 + " the dog",
    "emoji": any_of(range(0x1F300, 0x1F6FF), 40_000) + " the dog",
    "accents": "e" + any_of(range(0x300, 0x36F), 40_000) + " dog",
    "runs of spaces, just too short": (" " * 4095 + "x") * 20,
    "runs of letters, just too short": ("a" * 4095 + " ") * 20,
    **{f"mixed {seed}": mixed(seed, 60_000) for seed in range(12)},
}


def whole_ids(content: ContentTokenizer, text: str) -> list[int]:
    return np.frombuffer(content._encode([text])[0], np.int32).tolist()


@pytest.mark.parametrize("name", GIANTS)
def test_a_cut_text_has_the_tokens_of_the_whole_one(content: ContentTokenizer, name: str) -> None:
    """From either end, for a little and for more: the first (last) tokens, and none more than there are."""
    text = GIANTS[name]
    wanted = whole_ids(content, text)
    for need in (1, 30, 500):
        right = np.frombuffer(content.ids([text], need)[0], np.int32).tolist()
        assert right[:need] == wanted[:need] and (len(right) > need) == (len(wanted) > need)
        left = np.frombuffer(content.ids([text], need, left=True)[0], np.int32).tolist()
        assert left[-need:] == wanted[-need:] and (len(left) > need) == (len(wanted) > need)
        (piece,) = content.pieces([text], need, left=False)
        assert whole_ids(content, piece)[:need] == wanted[:need]


ENDLESS = {
    "words": "the fox ",
    "unspaced": "你好世界",
    "spaces": " ",
    "lines": " \n",
    "one letter": "a",
    "digits": "0a1",
    "unknown": "\U0001f9ec",
}


class Counting(ContentTokenizer):
    """Notes how many characters go to the tokenizer at a time."""

    def __init__(self, backend: Any) -> None:
        self.seen: list[int] = []
        super().__init__(backend)

    def _encode(self, texts: Any) -> list[bytes]:
        self.seen.append(sum(map(len, texts)))
        return super()._encode(texts)


@pytest.mark.parametrize("unit", ENDLESS.values(), ids=ENDLESS)
def test_no_text_costs_more_than_a_long_one(unit: str) -> None:
    """What reaches BERT's tokenizer of a text of two million characters is a few thousand of them."""
    text = "the " + filled(unit, 2_000_000)
    content = Counting(wordpiece())
    for left in (False, True):
        content.ids([text], 256, left)
        content.pieces([text], 256, left)
    assert max(content.seen) < 40_000


ATTACKS = {
    "emoji without a space": lambda: any_of(range(0x1F300, 0x1F6FF), 700_000),
    "accents only": lambda: "e" + any_of(range(0x300, 0x36F), 700_000),
    "letters without a space": lambda: any_of(range(0xE01, 0xE2E), 700_000),
    "spaces, just too few": lambda: (" " * 4095 + "x") * 170,
    "letters, just too few": lambda: ("ab" * 2047 + "c ") * 170,
    "one letter, just too few": lambda: ("\U0001f9ec" * 4095 + " ") * 170,
    "many letters, each too often": lambda: "".join(chr(0x1200 + place) * 4100 + " " for place in range(170)),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_text_of_which_next_to_nothing_comes(attack: str, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """700,000 characters that never give the 256 tokens that are needed: they go to the tokenizer in parts, within seconds. Where
    text is wanted it ends, and that is said. (They went whole, three times at once; and looking for runs took the square of one.)"""
    text, content = ATTACKS[attack](), Counting(KINDS[kind]())
    started = time.perf_counter()
    for left in (False, True):
        content.ids([text], 256, left)
        (piece,) = content.pieces([text], 256, left)
        assert len(piece) <= 1 << 18
    assert max(content.seen) <= 3 << 17
    assert time.perf_counter() - started < 20
    if len(np.frombuffer(content._encode([piece])[0], np.int32)) < 256:
        assert "is cut to" in caplog.text and text[:20] not in caplog.text
    assert len(content._runs._same) <= 20


def test_a_slow_tokenizer_is_spared_too() -> None:
    """One in Python, of which only its call is known: endless runs are shortened, the rest is cut, and what follows is kept."""
    seen: list[int] = []

    def encode(texts: Any) -> list[bytes]:
        seen.append(sum(map(len, texts)))
        return [np.array([len(word) for word in text.split()], np.int32).tobytes() for text in texts]

    (piece, _), (short, _), (accents, _) = Cutter(encode).cut(
        ["a" + " " * 3_000_000 + "dog", "the fox " * 300_000, ATTACKS["accents only"]()], 256, False, encode_short=False
    )
    assert piece.endswith("dog") and len(piece) < 10_000 and len(short) < 10_000 and len(accents) <= 1 << 18
    assert max(seen) <= 3 << 17


@pytest.mark.parametrize("left", [False, True])
def test_parts_of_a_text_have_the_tokens_of_the_whole(left: bool) -> None:
    """Where parts end at spaces, for a tokenizer that treats words apart, nothing differs, however long the text."""
    words = ["".join(random.Random(place).choices("0123456789abcdef", k=3000)) for place in range(250)]
    text = " ".join(words) + " the quick brown fox"
    content = Counting(wordpiece())
    ids = np.frombuffer(content.ids([text], 256, left)[0], np.int32).tolist()
    assert ids == whole_ids(content, text) and len(ids) == 254
    assert max(content.seen[:-1]) <= 1 << 18


def test_words_give_what_texts_give() -> None:
    """Word by word, known or new, in one order or another: the ids are the tokenizer's for the whole text."""
    content = ContentTokenizer(wordpiece())
    assert content._words is not None
    texts = [mixed(seed, 3_000) for seed in range(20)] + CORPUS * 30
    texts += [
        "a\u0301 \u0301b",
        "tab\tthen",
        "nul\x00 \x1c\x85 x",
        " [SEP]x[MASK] ",
        "Σας ΣΑΣ",
        "",
        " ",
        "I\u0307 \ufb01",
    ]
    wanted = [whole_ids(content, text) for text in texts]
    for _ in range(2):
        for start in range(0, len(texts), 7):
            got = content._words.ids(texts[start : start + 7])
            assert [np.frombuffer(ids, np.int32).tolist() for ids in got] == wanted[start : start + 7]


def test_texts_of_words_that_never_come_again() -> None:
    """They go to the tokenizer as they are, more and more often without a look; words that come again are remembered again."""
    content, asked = ContentTokenizer(wordpiece()), 0
    words = content._words
    assert words is not None
    for start in range(0, 40_000, 1_000):
        texts = [" ".join(f"{number:x}z" for number in range(start + i, start + i + 100)) for i in range(0, 1_000, 100)]
        assert words.ids(texts) == content._encode(texts)
    assert len(words._known) < 100 and words._backoff >= 7
    for _ in range(60):
        asked += words._pause > 0
        assert words.ids(CORPUS) == content._encode(CORPUS)
    assert asked <= 31 and len(words._known) > 10


def test_words_forget_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many different words come, what is remembered stays bounded, and the ids right."""
    monkeypatch.setattr("memsafe.models.words._MOST_WORDS", 500)
    content = ContentTokenizer(wordpiece())
    assert content._words is not None
    for start in range(0, 4_000, 400):
        texts = [f"word{number} the dog " * 3 for number in range(start, start + 400)]
        assert content._words.ids(texts) == content._encode(texts)
        assert len(content._words._known) <= 900


def test_only_tokenizers_that_treat_words_apart_are_taken_by_words() -> None:
    """Not where a space belongs to a token, nor where something added to the vocabulary holds one."""
    assert ContentTokenizer(byte_level())._words is None and ContentTokenizer(unigram())._words is None
    tokenizer = wordpiece()
    tokenizer.add_tokens(["new york"])
    assert Words.of(tokenizer, lambda texts: []) is None


@pytest.mark.timeout(60)
def test_a_giant_text_is_quick() -> None:
    """Five million characters of any kind take less than a few seconds, not minutes."""
    content = ContentTokenizer(wordpiece())
    started = time.perf_counter()
    for unit in ("the fox ", "你好世界", " ", " \n", "a", "0a1", "\U0001f9ec"):
        content.ids([filled(unit, 5_000_000)], 512)
    assert time.perf_counter() - started < 30

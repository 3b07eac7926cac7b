"""Texts on which a way of encoding is compared with the model's own, chosen for what versions and models treat apart."""

from __future__ import annotations

from typing import Any

from memsafe.models.ways import Text

__all__ = ["long_samples", "pairs_about", "samples"]

_TEXTS = (
    "Hello World",
    "  two  spaces\nand\tlines \n",
    "",
    "MiXeD Case \u00c4\u00d6\u00df e\u0301 \u4f60\u597d\u4e16\u754c [SEP] \U0001f642",
    "don't re-use 3,000.50 \u20ac/kg; see https://example.org/a_b?c=d\u00a0now\u3000then\r\n",
    "word " * 40,
    "\u0915\u094d\u0937 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01 \u0645\u0631\u062d\u0628\u0627 "
    + "long" * 40,
)


def samples(tokenizer: Any, pairs: bool) -> list[Text]:
    """Texts, or pairs both ways: of several scripts, with white space at the ends, empty, and with the tokenizer's own
    special tokens written in them."""
    special = [str(token) for token in (getattr(tokenizer, "all_special_tokens", None) or ())][:8]
    texts = [*_TEXTS, "a " + " b".join(special) + " c" + "".join(special)]
    if not pairs:
        return list(texts)
    return [*((text, texts[1]) for text in texts), *((texts[3], text) for text in texts)]


def long_samples(num_tokens: int, pairs: bool) -> list[Text]:
    """Texts of more tokens than `num_tokens`, whose ends can be told apart; of pairs: one long, the other, and both."""
    long = "one two three " + "a " * num_tokens + "seven eight nine"
    if not pairs:
        return [long]
    return [("what is it", long), (long, "it is that"), (long, long.replace("a", "b"))]


def pairs_about(num_tokens: int) -> list[Text]:
    """Pairs that are longer than `num_tokens` together, but neither text alone: which of them gives way shows who is cut."""
    most, some = "a b c " * (num_tokens // 4), "d e f " * (num_tokens // 6)
    return [(most, most), (some, most), (most, some), ("g", "h " * num_tokens), ("i " * num_tokens, "j")]

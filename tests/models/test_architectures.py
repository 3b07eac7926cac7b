"""Every architecture of text gives its own rows, whichever way the self-check finds for it, and the document says which."""

from __future__ import annotations

import pytest

from tests import architectures

FEW = (
    "albert",
    "bart",
    "bert",
    "deberta-v2",
    "gpt2",
    "llama",
    "modernbert",
    "mpnet",
    "roberta",
    "t5",
    "xlnet",
    "esm",
)
GRID = [(token_types, left) for token_types in (True, False) for left in (False, True)]
KINDS = ("embedder", "reranker")


def check(name: str, kind: str, token_types: bool, left: bool) -> architectures.Outcome | None:
    found = architectures.outcome(name, kind, token_types=token_types, left=left)
    if found is not None:
        assert found.path.startswith("refused") or (found.difference is not None and found.difference < 1e-5), found
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FEW)
def test_rows_of_a_few_architectures(name: str, kind: str) -> None:
    """Row by row what the model's own encode or predict gives, with special tokens in texts; as the document says."""
    found = check(name, kind, token_types=True, left=False)
    if architectures.is_of_this_version():
        assert architectures.short(found) == architectures.table().get(name, ["-", "-"])[KINDS.index(kind)]


@pytest.mark.parametrize(
    ("name", "kind", "token_types", "left"),
    [
        ("gpt2", "embedder", False, True),
        ("llama", "reranker", False, True),
        ("roberta", "embedder", False, True),
        ("xlnet", "embedder", False, True),
    ],
)
def test_padding_on_the_left_and_no_token_types(name: str, kind: str, token_types: bool, left: bool) -> None:
    """Learned positions shift with padding on the left: rows are still those of each text alone."""
    assert check(name, kind, token_types, left) is not None


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", architectures.names())
def test_rows_of_every_architecture(name: str) -> None:
    """The whole grid: embedding and reranking, tokenizers with and without types, padding on either side."""
    for kind in KINDS:
        for token_types, left in GRID:
            check(name, kind, token_types, left)


def test_the_document_has_a_row_for_every_architecture_that_runs() -> None:
    """Hundreds of architectures stand in it, and the first ones that anybody looks for are packed."""
    cells = architectures.table()
    assert len(cells) > 100 and set(cells) <= {*architectures.names(), "-"}
    for name in ("bert", "deberta-v2", "modernbert", "mpnet", "qwen3", "roberta", "xlm-roberta"):
        assert cells[name] == ["packed", "packed"]

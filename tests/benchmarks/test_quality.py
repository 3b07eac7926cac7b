"""Ranking quality: the measure itself, labelled sets as they are read, and that windows, chunks and peers rank what they should."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks import labelled, quality, tables
from benchmarks.labelled import Labelled

ROOT = Path(__file__).resolve().parents[2]
POD = """=head1 NAME

perlfaq1 - questions

=head2 How do I B<sort> an array X<sort> L<by value|perlfunc/sort>?

Use C<< sort { $a <=> $b } @list >>.

=over 4

=item one

first

=back

=head3 Deeper

Not of the answer. """


def test_ndcg_of_known_rankings() -> None:
    """By hand: the best order is 1, a relevant document in second place 1 / log2(3), nothing found 0, and ten places count."""
    judged = {"a": 2, "b": 1}
    assert labelled.ndcg(["a", "b", "c"], judged) == pytest.approx(1)
    assert labelled.ndcg(["c", "b"], {"b": 1}) == pytest.approx(1 / math.log2(3))
    assert labelled.ndcg(["b", "a"], judged) == pytest.approx((1 + 3 / math.log2(3)) / (3 + 1 / math.log2(3)))
    assert labelled.ndcg(["c"] * 10 + ["a"], judged) == 0 == labelled.ndcg(["a"], {})


def test_a_set_in_beirs_layout(tmp_path: Path) -> None:
    """Title and text are one document; the row of names in qrels is none; every so manieth query can be taken."""
    rows = [{"_id": "1", "title": "A", "text": "b"}, {"_id": "2", "text": "c"}]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "queries.jsonl").write_text("\n".join(json.dumps({"_id": f"q{n}", "text": "?"}) for n in range(4)))
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(f"q{n}\t1\t{n}\n" for n in range(4)))
    found = labelled.beir(tmp_path, "x")
    assert dict(found.documents) == {"1": "A b", "2": "c"}
    assert found.judged["q3"] == {"1": 3} and list(found.first(2).judged) == ["q0", "q2"]
    assert found.ndcg({query: ["1"] for query in found.judged}) == pytest.approx(
        0.75
    )  # q0 has nothing that is relevant


def test_perls_documentation_as_a_set(tmp_path: Path) -> None:
    """A question of the FAQ is answered by its own section alone, without its heading, its markup and deeper headings."""
    assert labelled.sections(POD)[1:] == [
        ("How do I sort an array by value?", "Use sort { $a <=> $b } @list . one first".replace("list .", "list.")),
        ("Deeper", "Not of the answer."),
    ]
    for name in ("perlfaq1", "perlfaq4", "perlfunc", "perltoc"):
        (tmp_path / f"{name}.pod").write_text(POD.replace("perlfaq1", name))
    found = labelled.perlfaq(10, 2, tmp_path)
    assert found is not None and set(found.queries) == {"perlfaq1-1", "perlfaq4-1"}
    assert len(found.documents) == 4 and not any(name.startswith("perltoc") for name in found.documents)
    assert found.judged["perlfaq4-1"] == {"perlfaq4-1": 1}
    assert labelled.perlfaq(10, 2, tmp_path / "nowhere") is None


def test_chunks_cover_a_text_and_end_with_sentences() -> None:
    """Nothing is lost and nothing twice; a chunk passes its size only where one sentence does."""
    text = "A short one. Another one? " + "x" * 50 + ". The end has no stop"
    spans = quality.chunk_spans(text, 30)
    assert "".join(text[start:stop] for start, stop in spans) == text
    assert [text[start:stop].strip()[-1] for start, stop in spans[:-1]] == ["?", "."]
    assert quality.chunk_spans("one", 30) == [(0, 3)]


def test_fewer_documents_have_only_their_questions() -> None:
    """A question whose answers are all gone would count as one that nobody can answer."""
    found = Labelled("x", {"a": "", "b": "", "c": ""}, {"p": "", "q": ""}, {"p": {"a": 1, "c": 2}, "q": {"c": 1}})
    some = quality.fewer(found, 2)
    assert (list(some.documents), some.judged, list(some.queries)) == (["a", "b"], {"p": {"a": 1}}, ["p"])
    assert quality.fewer(found, None) is found


def test_the_best_chunk_ranks_its_document() -> None:
    """Three documents of two, one and two chunks; equal scores stay in the documents' order."""
    found = Labelled("x", {"a": "", "b": "", "c": ""}, {"q": ""}, {"q": {"c": 1}})
    scores = np.array([[0.1, 0.5, 0.3, 0.2, 0.9]])
    assert quality.rank_chunks(scores, np.array([0, 0, 1, 2, 2]), found) == {"q": ["c", "a", "b"]}
    assert quality.rank(np.array([[1.0, 1.0, 2.0]]), ["q"], ["a", "b", "c"]) == {"q": ["c", "a", "b"]}


def test_changes_are_to_the_first_row_of_a_stage() -> None:
    """nDCG beside the first row's, and how many of the first ten stay, in whatever order."""
    ten = [str(n) for n in range(10)]
    rows = [
        {"stage": "embedding", "ndcg_10": 0.5, "ranked": {"q": [*ten, "x"]}},
        {"stage": "reranking", "ndcg_10": 0.2, "ranked": {"q": ["x"]}},
        {"stage": "embedding", "ndcg_10": 0.6, "ranked": {"q": ["x", *ten]}},
    ]
    found = quality.compared(rows)
    assert [row["change_of_ndcg"] for row in found] == [0, 0, pytest.approx(0.1)]
    assert (found[0]["kept"], found[2]["kept"]) == (1.0, 0.9) and "ranked" not in found[0]


@pytest.mark.cuts
@pytest.mark.peers
def test_chunks_find_an_answer_behind_the_cut(minilm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers stand behind 300 words of something else: cut they rank by chance, as sentence-transformers ranks them too; in chunks
    they are found."""
    monkeypatch.setattr(quality.models, "minilm", lambda: minilm)
    answers = ("a crane lifts loads at the port", "bread is baked in an oven", "the violin has four strings")
    asked = ("which machine lifts loads?", "where is bread baked?", "how many strings has a violin?")
    documents = {str(n): f"{'the weather was grey and wet that day ' * 40}. {text}." for n, text in enumerate(answers)}
    queries = {str(n): text for n, text in enumerate(asked)}
    found = Labelled("made", documents, queries, {str(n): {str(n): 1} for n in range(3)})
    ours, theirs = (
        quality._embedding(found, who, "float32", quality._peer(who, {}))
        for who in ("memsafe", "sentence-transformers")
    )
    assert ours["ranked"] == theirs["ranked"] and ours["ndcg_10"] < 1
    (chunks,) = quality._chunked(found, 256, late=False)
    assert chunks["ndcg_10"] == pytest.approx(1)


def test_the_table_shows_figures_and_what_is_missing() -> None:
    """nDCG with four decimals, its change with a sign, the share that stays; a set that is not at hand is named."""
    row = {
        "stage": "embedding",
        "who": "memsafe",
        "change": "bfloat16",
        "ndcg_10": 0.36789,
        "change_of_ndcg": -0.0012,
        "kept": 0.985,
    }
    found = {"name": "X", "documents": 1400, "queries": 225, "reranked_queries": 30, "rows": [row | {"seconds": 12.3}]}
    lines = tables.quality({"sets": [found], "not_run": ["Y is not at hand"]})
    assert "| embedding: memsafe | `bfloat16` | 0.3679 | -0.0012 | 98.5% |" in lines
    assert (
        "### X: 1,400 documents, 225 questions, 30 of them reranked" in lines
        and lines[-1] == "- Not run: Y is not at hand"
    )


def test_documents_show_the_measured_tables() -> None:
    """Every line of the published tables is that of the result, and where float32 is compared with the peers nDCG is equal to three
    decimals."""
    (path,) = sorted((ROOT / "benchmarks" / "results").glob("quality-*.json"))
    section = json.loads(path.read_text(encoding="utf-8"))["sections"]["quality"]
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for line in tables.quality(section):
        assert line in page, line
    (judged,) = (found for found in section["sets"] if found["name"] == "Cranfield")
    for stage in ("embedding", "embedding + reranking"):
        exact = [row["ndcg_10"] for row in judged["rows"] if row["stage"] == stage and row["change"] == "float32"]
        assert len(exact) == 3 and max(exact) - min(exact) < 5e-4

"""Retrieval sets with judgements, where they are at hand, and nDCG. Nothing is downloaded here, and no text is kept in the repository.

Cranfield: 1,400 abstracts judged by people (BEIR's layout), from $MEMSAFE_BENCH_CRANFIELD or beside the checkout. perlfaq: Perl's own
documentation, from $MEMSAFE_BENCH_PERL_DOC or where Debian's package perl-doc puts it; each question of its FAQ is
answered by the section below it, among the other long sections of all pages: judged by construction.
"""

from __future__ import annotations

import csv
import json
import math
import os
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.texts import ROOT

__all__ = ["Labelled", "beir", "cranfield", "ndcg", "perlfaq", "sections"]


@dataclass(frozen=True)
class Labelled:
    """documents, queries: by id. judged: of each query, by document, how good it is (0 and what is not named: not at all)."""

    name: str
    documents: Mapping[str, str]
    queries: Mapping[str, str]
    judged: Mapping[str, Mapping[str, int]]

    def first(self, queries: int) -> Labelled:
        """The same documents, with every so manieth query: `queries` of them at most."""
        step = max(-(-len(self.judged) // queries), 1)
        judged = dict(list(self.judged.items())[::step])
        return Labelled(self.name, self.documents, {query: self.queries[query] for query in judged}, judged)

    def ndcg(self, ranked: Mapping[str, Sequence[str]], cut: int = 10) -> float:
        """Mean of :func:`ndcg` over the queries; ranked: documents of each, best first."""
        return sum(ndcg(ranked[query], judged, cut) for query, judged in self.judged.items()) / len(self.judged)


def ndcg(ranked: Sequence[str], judged: Mapping[str, int], cut: int = 10) -> float:
    """Gain 2^score - 1, discount log2(place + 1); 0 where nothing is relevant."""

    def gain(scores: Sequence[int]) -> float:
        return sum((2**score - 1) / math.log2(place + 2) for place, score in enumerate(scores[:cut]))

    ideal = gain(sorted(judged.values(), reverse=True))
    return gain([judged.get(document, 0) for document in ranked]) / ideal if ideal else 0.0


def beir(folder: Path, name: str) -> Labelled:
    """A folder with corpus.jsonl, queries.jsonl and qrels.tsv; a document is its title and its text."""
    documents, queries = (
        {
            row["_id"]: f"{row.get('title', '')} {row['text']}".strip()
            for row in map(json.loads, (folder / file).read_text(encoding="utf-8").splitlines())
        }
        for file in ("corpus.jsonl", "queries.jsonl")
    )
    judged: dict[str, dict[str, int]] = {}
    with (folder / "qrels.tsv").open(encoding="utf-8") as file:
        for row in csv.reader(file, delimiter="\t"):
            if row and row[-1].lstrip("-").isdigit():  # not the names of the columns
                judged.setdefault(row[0], {})[row[-2]] = int(row[-1])
    return Labelled(name, documents, queries, judged)


def cranfield() -> Labelled | None:
    """None where it is not at hand."""
    folder = Path(os.environ.get("MEMSAFE_BENCH_CRANFIELD") or ROOT.parent / "shared" / "data" / "cranfield")
    return beir(folder, "Cranfield") if (folder / "corpus.jsonl").exists() else None


def perlfaq(least_chars: int = 1000, others: int = 200, folder: Path | None = None) -> Labelled | None:
    """Questions whose answer has `least_chars` or more, among all such answers and `others` sections of as many; None where the
    documentation is not at hand. A section's heading is not part of it."""
    given = folder or os.environ.get("MEMSAFE_BENCH_PERL_DOC") or "/usr/share/perl"
    pods = {path.stem: path for path in sorted(Path(given).rglob("*.pod"))}
    if "perlfaq4" not in pods:
        return None
    found: dict[str, tuple[str, str]] = {}
    for name, path in pods.items():
        if name != "perltoc":  # headings of all the others
            for place, (heading, body) in enumerate(sections(path.read_text(encoding="utf-8", errors="replace"))):
                if len(body) >= least_chars:
                    found[f"{name}-{place}"] = (heading, body)
    asked = {
        name: heading for name, (heading, _) in found.items() if re.match(r"perlfaq\d", name) and heading[-1] == "?"
    }
    rest = [name for name in found if name not in asked]
    kept = [*asked, *random.Random(0).sample(rest, min(others, len(rest)))]
    return Labelled("perlfaq", {name: found[name][1] for name in kept}, asked, {name: {name: 1} for name in asked})


def sections(pod: str) -> list[tuple[str, str]]:
    """(heading, body) of each section of a page in Perl's pod, as plain text, without what stands below deeper headings."""
    parts = re.split(r"^=head[1-4]\s+(.*?)\s*$", pod, flags=re.M)
    return [
        (_plain(heading), _plain(body))
        for heading, body in zip(parts[1::2], parts[2::2], strict=True)
        if _plain(heading)
    ]


def _plain(pod: str) -> str:
    text = re.sub(r"X<[^>]*>", "", pod)  # words of the index
    text = re.sub(r"^=item\s+", "", text, flags=re.M)
    text = re.sub(r"^=[a-z]\w*.*$", "", text, flags=re.M)
    for _ in range(4):  # formatting codes lie in each other
        text = re.sub(r"[A-Z]<<+ (.*?) >>+", r"\1", text, flags=re.S)
        text = re.sub(r"L<(?:([^|<>]*)\|)?([^<>]*)>", lambda link: link[1] or link[2], text)
        text = re.sub(r"[A-Z]<([^<>]*)>", r"\1", text)
    return " ".join(text.replace("E<gt>", ">").replace("E<lt>", "<").split())

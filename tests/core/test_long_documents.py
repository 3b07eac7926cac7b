"""Documents longer than a model reads at once: windows and late chunks, against a plain reference written with upstream's classes."""

from __future__ import annotations

import asyncio
import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer

from memsafe import ConfigError, Embedder, InputError, InputTooLargeError, MemoryPolicy, Reranker
from memsafe.long_documents import best, mean, weighted
from memsafe.models.windows import starts
from tests import tiny_models as models

QUERY = "where does the river run"
WORDS = "the river runs past nine old mills and a red bridge before it meets a wide grey sea ".split()
MAX = 64


def text_of(words: int, seed: int = 0) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


DOCUMENTS = [text_of(300, 1), "short", text_of(61, 2), text_of(90, 3), "", text_of(300, 1), text_of(56, 4)]


@pytest.fixture(scope="module")
def reranker_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(models.save_reranker(tmp_path_factory.mktemp("reranker") / "model", "bert", max_length=MAX))


@pytest.fixture(scope="module")
def embedder_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    prompts = {"query": "query: ", "document": "passage: "}
    folder = tmp_path_factory.mktemp("embedder") / "model"
    return str(models.save_embedder(folder, "bert", max_length=MAX, normalize=True, prompts=prompts))


@torch.inference_mode()
def reference_scores(model: CrossEncoder, query: str, document: str, overlap: int | None, fold: Any) -> Any:
    """transformers' own overflowing windows, through the CrossEncoder's own model and activation, one at a time."""
    tokenizer = model.tokenizer
    room = MAX - 3 - len(tokenizer(query, add_special_tokens=False)["input_ids"])
    fits = len(tokenizer(document, add_special_tokens=False)["input_ids"]) <= room
    if fits:
        return model.predict([(query, document)])[0]
    windows = tokenizer(
        query,
        document,
        truncation="only_second",
        max_length=MAX,
        stride=room // 8 if overlap is None else overlap,
        return_overflowing_tokens=True,
        return_token_type_ids=True,
    )
    scores = []
    for ids, types in zip(windows["input_ids"], windows["token_type_ids"], strict=True):
        features = {"input_ids": torch.tensor([ids]), "token_type_ids": torch.tensor([types])}
        features["attention_mask"] = torch.ones_like(features["input_ids"])
        logits = model.model(**features).logits
        scores.append(model.activation_fn(logits).squeeze(-1).numpy())
    return fold(np.stack(scores), axis=0).squeeze()


@pytest.mark.parametrize("overlap", [None, 0, 20])
@pytest.mark.parametrize(("mode", "fold"), [("max_passage", np.max), ("mean_passage", np.mean)])
def test_scores_of_windows_are_upstreams(reranker_folder: str, mode: str, fold: Any, overlap: int | None) -> None:
    """The windows are transformers' own (stride, return_overflowing_tokens), the query is whole in each, and a document has the best or
    the mean score of its windows; what fits has predict's. No warning: nothing was cut."""
    theirs = CrossEncoder(reranker_folder, device="cpu")
    with (
        Reranker(reranker_folder, device="cpu", long_documents=mode, window_overlap=overlap) as ours,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("error")
        run = ours.run([(QUERY, document) for document in DOCUMENTS])
    expected = [reference_scores(theirs, QUERY, document, overlap, fold) for document in DOCUMENTS]
    np.testing.assert_allclose(run.scores, np.asarray(expected, dtype=np.float32), rtol=0, atol=1e-5)
    assert run.scores.dtype == np.float32 and run.scores.shape == (len(DOCUMENTS),)
    assert run.report.truncated == 0
    assert (run.report.texts, run.report.distinct_texts) == (len(DOCUMENTS), len(DOCUMENTS) - 1)
    assert run.report.windowed == 3
    assert 0 < run.report.tokenize_s < run.report.total_s
    assert "long texts" in str(run.report) and run.report.to_dict()["windows"] == run.report.windows


def test_windows_cost_is_in_the_report(reranker_folder: str) -> None:
    """300 tokens beside a query of 5 in 64: windows of 56 that overlap by 7, so 6 of them."""
    with Reranker(reranker_folder, device="cpu", long_documents="max_passage") as ours:
        report = ours.run([(QUERY, DOCUMENTS[0]), (QUERY, "short")]).report
    tokens = len(
        CrossEncoder(reranker_folder, device="cpu").tokenizer(DOCUMENTS[0], add_special_tokens=False)["input_ids"]
    )
    assert tokens == 300
    assert report.windows == len(starts(300, 56, 7)) == 6
    assert report.windowed == 1


def test_progress_is_told_in_documents(reranker_folder: str) -> None:
    """However many windows they have: in the end as many as there are distinct ones."""
    told: list[int] = []
    with Reranker(reranker_folder, device="cpu", long_documents="max_passage") as ours:
        ours.score(QUERY, DOCUMENTS, progress=told.append, max_rows=2)
    assert sum(told) == len(DOCUMENTS) - 1 and min(told) > 0


def test_truncating_stays_as_it_was(reranker_folder: str) -> None:
    """The default: predict's scores, cut, counted and warned of; no windows."""
    theirs = CrossEncoder(reranker_folder, device="cpu")
    pairs = [(QUERY, document) for document in DOCUMENTS]
    with Reranker(reranker_folder, device="cpu") as ours, pytest.warns(UserWarning, match="as the model demands"):
        run = ours.run(pairs)
    np.testing.assert_allclose(run.scores, theirs.predict(pairs), rtol=0, atol=1e-5)
    assert run.report.truncated == 3 and run.report.windows == 0


def test_the_end_of_a_document_counts(reranker_folder: str) -> None:
    """What stands behind the limit changes the score with windows, and never with truncation."""
    pair = [(QUERY, DOCUMENTS[0] + " red bridge"), (QUERY, DOCUMENTS[0] + " old sea")]
    with Reranker(reranker_folder, device="cpu", long_documents="mean_passage") as ours:
        read = ours.score_pairs(pair)
    with Reranker(reranker_folder, device="cpu") as ours, pytest.warns(UserWarning, match="as the model demands"):
        cut = ours.score_pairs(pair)
    assert read[0] != read[1] and cut[0] == cut[1]


def test_ranking_async_and_several_labels(reranker_folder: str, tmp_path: Path) -> None:
    """rerank and its async form rank documents, not windows; labels are folded one by one."""
    with Reranker(reranker_folder, device="cpu", long_documents="max_passage") as ours:
        ranked = ours.rerank(QUERY, DOCUMENTS, top_n=3)
        again = asyncio.run(ours.arerank(QUERY, DOCUMENTS, top_n=3))
        scores = ours.score(QUERY, DOCUMENTS)
    assert [each.index for each in ranked] == list(np.argsort(-scores, kind="stable")[:3])
    assert ranked == again
    folder = str(models.save_reranker(tmp_path / "labels", "bert", num_labels=3, max_length=MAX))
    with Reranker(folder, device="cpu", long_documents="max_passage") as ours:
        three = ours.score(QUERY, DOCUMENTS)
        assert three.shape == (len(DOCUMENTS), 3)
        assert ours.score_pairs([]).shape == (0, 3)
    expected = reference_scores(CrossEncoder(folder, device="cpu"), QUERY, DOCUMENTS[3], None, np.max)
    np.testing.assert_allclose(three[3], expected, rtol=0, atol=1e-5)


def test_a_query_that_fills_the_windows_is_an_error_with_numbers(reranker_folder: str) -> None:
    """Beside a document that fits it is fine; where windows are needed it may fill half of what there is."""
    query = text_of(40, 7)
    with Reranker(reranker_folder, device="cpu", long_documents="max_passage") as ours:
        assert ours.score(query, ["short"]).shape == (1,)
        with pytest.raises(
            InputError, match=r"input 1 has a query of 40 tokens.* may have 30, half of the 61"
        ) as caught:
            ours.score(query, ["short", DOCUMENTS[0]])
        assert caught.value.index == 1
    with Reranker(reranker_folder, device="cpu", long_documents="max_passage", query_max_length=20) as ours:
        assert ours.score(query, [DOCUMENTS[0]]).shape == (1,)  # cut to its share, as was asked for
    with Reranker(reranker_folder, device="cpu", long_documents="max_passage", window_overlap=60) as wide:
        with pytest.raises(InputError) as caught:
            wide.score(QUERY, [DOCUMENTS[0]])
        assert "lower window_overlap" in str(caught.value)


def test_windows_are_bounded_loudly(reranker_folder: str) -> None:
    """Two windows at most: the rest is cut, counted once and warned of, and the score is that of the first two."""
    with (
        Reranker(reranker_folder, device="cpu", long_documents="max_passage", max_windows=2, window_overlap=0) as ours,
        pytest.warns(UserWarning, match="as max_windows demands"),
    ):
        run = ours.run([(QUERY, DOCUMENTS[0]), (QUERY, DOCUMENTS[3])])
    assert (run.report.truncated, run.report.windows, run.report.windowed) == (1, 4, 2)
    first = " ".join(DOCUMENTS[0].split()[: 2 * 56])  # each of these words is one token
    with Reranker(reranker_folder, device="cpu", long_documents="max_passage", window_overlap=0) as ours:
        assert ours.score(QUERY, [first])[0] == pytest.approx(run.scores[0], abs=1e-6)


@torch.inference_mode()
def reference_rows(model: SentenceTransformer, text: str, prompt: str, **more: Any) -> np.ndarray:
    """Windows of the text behind the whole prompt, each through the model's own modules; their mean by tokens, of length 1."""
    tokenizer = model.tokenizer
    head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    room = MAX - 2 - len(head)
    places = [0] if len(ids) <= room else starts(len(ids), room, room // 8)
    rows, weights = [], []
    for place in places:
        part = ids[place : place + room]
        whole = torch.tensor([[101, *head, *part, 102]])
        features = {"input_ids": whole, "attention_mask": torch.ones_like(whole), **more}
        rows.append(model(features)["sentence_embedding"][0].numpy())
        weights.append(max(len(part), 1))
    row = np.average(np.stack(rows), axis=0, weights=weights)
    return row / np.linalg.norm(row)


@pytest.mark.parametrize("kind", ["query", "document", None])
def test_embeddings_of_windows(embedder_folder: str, kind: str | None) -> None:
    """mean_windows: every window has the prompt, the mean is weighted by tokens and of length 1 where the model's rows are."""
    theirs = SentenceTransformer(embedder_folder, device="cpu")
    prompt = {"query": "query: ", "document": "passage: ", None: ""}[kind]
    with Embedder(embedder_folder, device="cpu", long_documents="mean_windows") as ours:
        run = ours.run(DOCUMENTS, kind=kind)
    expected = np.stack([reference_rows(theirs, text, prompt) for text in DOCUMENTS])
    np.testing.assert_allclose(run.embeddings, expected, rtol=0, atol=2e-6)
    assert run.report.truncated == 0 and run.report.windowed >= 2


def test_a_prompt_that_pooling_leaves_out_is_left_out_of_every_window(tmp_path: Path) -> None:
    """As upstream does for the first tokens of a text (include_prompt=False)."""
    prompts = {"document": "passage: "}
    folder = models.save_embedder(
        tmp_path / "m", "bert", max_length=MAX, normalize=True, prompts=prompts, include_prompt=False
    )
    theirs = SentenceTransformer(str(folder), device="cpu")
    with Embedder(folder, device="cpu", long_documents="mean_windows") as ours:
        rows = ours.embed_documents([DOCUMENTS[0], DOCUMENTS[3]])
    expected = [reference_rows(theirs, text, "passage: ", prompt_length=3) for text in (DOCUMENTS[0], DOCUMENTS[3])]
    np.testing.assert_allclose(rows, np.stack(expected), rtol=0, atol=2e-6)


def test_short_texts_are_untouched_by_windows(embedder_folder: str) -> None:
    """Texts that fit have the very rows of truncation, to the last bit."""
    short = ["a", "", "the river", text_of(20, 9)]
    with (
        Embedder(embedder_folder, device="cpu") as plain,
        Embedder(embedder_folder, device="cpu", long_documents="mean_windows") as ours,
    ):
        assert np.array_equal(plain.embed_documents(short), ours.embed_documents(short))


@pytest.mark.parametrize(("overlap", "most"), [(-1, 64), (True, 64), (1.5, 64), (None, 0), (None, None), (None, True)])
def test_options_out_of_range(reranker_folder: str, overlap: Any, most: Any) -> None:
    """Refused before anything is loaded, and an unknown mode with the ones there are."""
    with pytest.raises(ConfigError, match=r"window_overlap|max_windows"):
        Reranker(reranker_folder, long_documents="max_passage", window_overlap=overlap, max_windows=most)
    with pytest.raises(ConfigError, match="truncate, max_passage, mean_passage"):
        Reranker(reranker_folder, long_documents="mean_windows")
    with pytest.raises(ConfigError, match="truncate, mean_windows"):
        Embedder(reranker_folder, long_documents="max_passage")


def test_copies_and_pickles_keep_the_mode(reranker_folder: str) -> None:
    """The settings travel."""
    with Reranker(reranker_folder, device="cpu", long_documents="mean_passage") as ours:
        expected = ours.score(QUERY, DOCUMENTS)
        other = pickle.loads(pickle.dumps(ours))
    with other:
        np.testing.assert_array_equal(copy.copy(other).score(QUERY, DOCUMENTS), expected)


def test_bad_texts_are_named_by_the_callers_position(reranker_folder: str) -> None:
    """Lone surrogates, in the second of equal documents' successors."""
    with (
        Reranker(reranker_folder, device="cpu", long_documents="max_passage") as ours,
        pytest.raises(InputError, match="input 2 holds lone surrogates"),
    ):
        ours.score(QUERY, ["a", "a", "\ud800"])


def test_folds_are_the_plain_ones() -> None:
    """By hand: three documents of one, three and two windows; NaN of a window is the document's."""
    rows = np.array([1, 5, 2, 5, 4, np.nan], dtype=np.float32)
    owners, tokens = np.array([0, 1, 1, 1, 2, 2]), np.array([9, 1, 1, 2, 3, 3], dtype=np.float32)
    np.testing.assert_array_equal(best(rows, owners, tokens), np.array([1, 5, np.nan], dtype=np.float32))
    np.testing.assert_allclose(mean(rows, owners, tokens), np.array([1, 4, np.nan], dtype=np.float32))
    np.testing.assert_allclose(weighted(rows, owners, tokens), np.array([1, 17 / 4, np.nan], dtype=np.float32))
    assert starts(10, 10, 3) == [0] and starts(11, 10, 3) == [0, 7] and starts(0, 5, 1) == [0]


# late chunking


@torch.inference_mode()
def reference_chunks(
    model: SentenceTransformer, document: str, spans: list[tuple[int, int]], prompt: str
) -> np.ndarray:
    """All token embeddings by upstream's own encode, the mean of those of each span, then the modules behind pooling."""
    encoding = model.tokenizer(prompt + document, return_offsets_mapping=True, truncation=True, max_length=MAX)
    tokens = model.encode([document], prompt=prompt, output_value="token_embeddings")[0].cpu()
    rows = []
    for start, stop in spans:
        inside = [
            place
            for place, (first, last) in enumerate(encoding["offset_mapping"])
            if last > first and start < last - len(prompt) <= stop
        ]
        features = {"sentence_embedding": tokens[inside].mean(0)[None]}
        for module in list(model.children())[2:]:
            features = module(features)
        rows.append(features["sentence_embedding"][0].numpy())
    return np.stack(rows)


@pytest.mark.parametrize("architecture", ["bert", "modernbert", "mpnet"])
def test_late_chunks_are_means_of_the_whole_documents_tokens(tmp_path: Path, architecture: str) -> None:
    """One forward, one row for each span, whatever order and overlap they have; what stands outside a span changes its row."""
    folder = models.save_embedder(
        tmp_path / "m", architecture, max_length=MAX, normalize=True, dense_dim=16, prompts={"document": "passage: "}
    )
    theirs = SentenceTransformer(str(folder), device="cpu")
    document = text_of(50, 11)
    word = document.index("river", 41)  # a single token
    spans = [(0, 40), (40, len(document)), (10, 90), (0, len(document)), (word, word + 5)]
    with Embedder(folder, device="cpu") as ours:
        rows = ours.embed_chunks(document, spans)
        other = ours.embed_chunks(document + " red", spans[:1])
        assert ours.embed_chunks(document, []).shape == (0, 16)
        np.testing.assert_allclose(asyncio.run(ours.aembed_chunks(document, spans)), rows, rtol=0, atol=1e-6)
    np.testing.assert_allclose(rows, reference_chunks(theirs, document, spans, "passage: "), rtol=0, atol=2e-5)
    assert rows.dtype == np.float32 and rows.shape == (5, 16)
    assert not np.allclose(other[0], rows[0], atol=1e-6)


def test_late_chunks_of_a_model_that_runs_padded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's own modules do it where packing is not shown to be right: the same rows."""
    from memsafe.models import model as module
    from memsafe.models.selfcheck import SelfCheck

    folder = str(models.save_embedder(tmp_path / "m", "bert", max_length=MAX, dense_dim=16))
    document = text_of(50, 11)
    spans = [(0, 40), (40, len(document))]
    quiet = MemoryPolicy(learn=False)
    with Embedder(folder, device="cpu", memory=quiet) as packed:
        expected = packed.embed_chunks(document, spans)
    check = SelfCheck(False, False, "the test asks for the padded path")
    monkeypatch.setattr(module, "run_self_check", lambda routes: routes.use(check) or check)
    with Embedder(folder, device="cpu", memory=quiet) as padded:
        assert padded.path.startswith("padded")
        np.testing.assert_allclose(padded.embed_chunks(document, spans), expected, rtol=0, atol=2e-6)


def test_late_chunks_refuse_what_they_cannot_do(embedder_folder: str, tmp_path: Path) -> None:
    """Another pooling, a document that is too long, spans out of range or without a token: each says so, with numbers."""
    cls = models.save_embedder(tmp_path / "cls", "bert", pooling="cls", max_length=MAX)
    with Embedder(cls, device="cpu") as ours, pytest.raises(ConfigError, match="pooling is cls"):
        ours.embed_chunks("the river", [(0, 3)])
    with Embedder(embedder_folder, device="cpu") as ours:
        with pytest.raises(InputError, match=r"30\d tokens, and the model reads 62"):
            ours.embed_chunks(DOCUMENTS[0], [(0, 3)])
        for spans in ([(0, 99)], [(3, 3)], [(-1, 2)], [(0, 1, 2)], ["ab"], "ab", [(0.5, 2)]):
            with pytest.raises(InputError, match="spans"):
                ours.embed_chunks("the river", spans)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="no token in span 1"):
            ours.embed_chunks("the   river", [(0, 3), (3, 5)])
        with pytest.raises(InputError, match="document"):
            ours.embed_chunks(["the river"], [(0, 3)])  # type: ignore[arg-type]


def test_late_chunks_share_a_model_with_other_calls(embedder_folder: str) -> None:
    """Chunks run in micro-batches of their own: calls beside them get their rows, and equal documents with other spans too."""
    document = text_of(40, 5)

    async def many(ours: Embedder) -> list[Any]:
        jobs = [ours.aembed_documents([document, "a"]) for _ in range(3)]
        jobs += [asyncio.to_thread(ours.embed_chunks, document, [(0, n)]) for n in (20, 30)]
        return await asyncio.gather(*jobs)

    with Embedder(embedder_folder, device="cpu") as ours:
        *plain, twenty, thirty = asyncio.run(many(ours))
        expected = ours.embed_documents([document, "a"])
        np.testing.assert_allclose(twenty, ours.embed_chunks(document, [(0, 20)]), atol=1e-6)
    for rows in plain:
        np.testing.assert_allclose(rows, expected, rtol=0, atol=1e-6)
    assert twenty.shape == thirty.shape == (1, 32) and not np.allclose(twenty, thirty, atol=1e-5)


def test_a_window_that_does_not_fit_fails_its_document(reranker_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names documents of the caller's list, and its partial has the scores of the others."""
    from memsafe.engine.engine import Engine

    def finish(self: Engine, job: Any, *, num_texts: int) -> Any:
        job.result()
        error = InputTooLargeError("too large", index=job.position(2), num_tokens=1, need_bytes=1, free_bytes=0)
        rows = job.writer.array.copy()
        rows[2] = np.nan
        error.partial, error.failed = rows, [2]
        raise error

    with Reranker(
        reranker_folder, device="cpu", long_documents="max_passage", memory=MemoryPolicy(learn=False)
    ) as ours:
        whole = ours.score(QUERY, ["short", DOCUMENTS[0], DOCUMENTS[0], "sea"])
        monkeypatch.setattr(Engine, "finish", finish)
        with pytest.raises(InputTooLargeError) as caught:
            ours.score(QUERY, ["short", DOCUMENTS[0], DOCUMENTS[0], "sea"])
    assert caught.value.index == 1 and caught.value.failed == [1, 2]
    np.testing.assert_allclose(caught.value.partial[[0, 3]], whole[[0, 3]], atol=1e-6)
    assert np.isnan(caught.value.partial[[1, 2]]).all()

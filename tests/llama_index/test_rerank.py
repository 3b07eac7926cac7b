"""MemsafeRerank beside SentenceTransformerRerank, its switch for FlagEmbeddingReranker, and where it differs."""

from __future__ import annotations

import asyncio
import copy
import inspect
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from llama_index.core import VectorStoreIndex
from llama_index.core.callbacks import CallbackManager
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.span_handlers import SimpleSpanHandler
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from sentence_transformers import CrossEncoder

from llama_index_memsafe import MemsafeEmbedding, MemsafeRerank
from memsafe import ConfigError, MemoryPolicy, MemsafeError, Reranker
from tests.llama_index.conftest import TEXTS, CoreCalls, recorded
from tests.tiny_models import save_reranker

Pair = tuple[Any, MemsafeRerank]


def make_nodes(texts: list[str] | None = None, **metadata: Any) -> list[NodeWithScore]:
    chosen = TEXTS if texts is None else texts
    return [
        NodeWithScore(node=TextNode(text=text, id_=f"n{i}", metadata=dict(metadata)), score=i / 100)
        for i, text in enumerate(chosen)
    ]


@pytest.fixture(scope="session")
def make_rerank_pair(demo_reranker: str) -> Callable[..., Pair]:
    """Upstream's reranker and ours with the same arguments, on a real cross-encoder unless told; kept."""
    upstream = pytest.importorskip("llama_index.postprocessor.sbert_rerank", reason="the replaced class is missing")
    known: dict[str, Pair] = {}

    def make(model: str = demo_reranker, parity: bool = False, **options: Any) -> Pair:
        key = repr((model, parity, sorted(options.items(), key=str)))
        if key not in known:
            options.setdefault("device", "cpu")
            theirs = upstream.SentenceTransformerRerank(model, **options)
            known[key] = theirs, MemsafeRerank(model, parity=parity, **options)
        return known[key]

    return make


OPTIONS: dict[str, dict[str, Any]] = {
    "logits": {"top_n": 30, "cross_encoder_kwargs": {"activation_fn": torch.nn.Identity()}},
    "prompt": {"top_n": 30, "cross_encoder_kwargs": {"prompts": {"q": "Find: "}, "default_prompt_name": "q"}},
    "dtype": {"top_n": 30, "cross_encoder_kwargs": {"model_kwargs": {"dtype": torch.float64}}},
    "defaults": {},
    "all": {"top_n": 100},
    "none": {"top_n": 0},
    "keep": {"top_n": 5, "keep_retrieval_score": True},
    "short": {"top_n": 30, "cross_encoder_kwargs": {"max_length": 24}},
    "revision": {"top_n": 4, "cross_encoder_kwargs": {"revision": "main", "trust_remote_code": False}},
}


@pytest.mark.peers
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.cuts(r"\[short\]")
def test_scores_and_order_are_upstreams(name: str, make_rerank_pair: Any, passages: list[str]) -> None:
    """Same nodes, same order, same scores (python floats) on a real cross-encoder, sync and async."""
    if name == "prompt" and "prompts" not in inspect.signature(CrossEncoder.__init__).parameters:
        pytest.skip("this sentence-transformers has no prompts for cross-encoders")
    theirs, ours = make_rerank_pair(**OPTIONS[name])
    texts = [*passages[5:10], "", TEXTS[0]]
    expected = theirs.postprocess_nodes(make_nodes(texts, source="a page"), query_str="How do rivers flow?")
    for got in (
        ours.postprocess_nodes(make_nodes(texts, source="a page"), query_str="How do rivers flow?"),
        asyncio.run(ours.apostprocess_nodes(make_nodes(texts, source="a page"), QueryBundle("How do rivers flow?"))),
    ):
        assert [node.node.node_id for node in got] == [node.node.node_id for node in expected]
        np.testing.assert_allclose([n.score for n in got], [n.score for n in expected], atol=1e-5)
        assert all(type(node.score) is float for node in got)
        assert [node.node.metadata for node in got] == [node.node.metadata for node in expected]


@pytest.mark.peers
def test_arguments_are_upstreams_in_its_order() -> None:
    """Every positional argument has upstream's place and default; what is ours is keyword-only."""
    upstream = pytest.importorskip("llama_index.postprocessor.sbert_rerank")

    def positional(kind: Any) -> list[tuple[str, Any]]:
        parameters = inspect.signature(kind).parameters.values()
        return [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"]

    assert positional(MemsafeRerank.__init__) == positional(upstream.SentenceTransformerRerank.__init__)
    # FlagEmbeddingReranker 0.6.0: top_n=2, model="BAAI/bge-reranker-large", use_fp16=False
    assert positional(MemsafeRerank.from_flag) == [
        ("top_n", 2),
        ("model", "BAAI/bge-reranker-large"),
        ("use_fp16", False),
    ]


@pytest.mark.peers
@pytest.mark.parametrize("count", [0, 1, 5])
def test_events_are_upstreams(make_rerank_pair: Any, tiny_cross: str, count: int) -> None:
    """Instrumentation events and callbacks: upstream's number, order and payloads; for no nodes only the start."""
    logs = []
    for model in make_rerank_pair(tiny_cross, top_n=3):
        with recorded(model) as log:
            model.postprocess_nodes(make_nodes(TEXTS[:count]), query_str="a river")
            asyncio.run(model.apostprocess_nodes(make_nodes(TEXTS[:count]), query_str="a river"))
        logs.append(log.entries)
    assert logs[0] == logs[1]
    assert [name for name, _ in logs[1]][:1] == ["ReRankStartEvent"]
    assert len(logs[1]) == (8 if count else 2)


@pytest.mark.peers
def test_events_of_a_failure_are_upstreams(
    make_rerank_pair: Any, tiny_cross: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model fails: the same exception, and the same events and callbacks with it, sync and async."""

    def fail(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise KeyError("no such weight")

    logs = []
    theirs, ours = make_rerank_pair(tiny_cross, top_n=3)
    monkeypatch.setattr(type(theirs._model), "predict", fail)
    monkeypatch.setattr(Reranker, "rerank", fail)
    monkeypatch.setattr(Reranker, "arerank", fail)
    for model in (theirs, ours):
        with recorded(model) as log:
            with pytest.raises(KeyError):
                model.postprocess_nodes(make_nodes(), query_str="a river")
            with pytest.raises(KeyError):
                asyncio.run(model.apostprocess_nodes(make_nodes(), query_str="a river"))
        logs.append(log.entries)
    assert logs[0] == logs[1]
    names = ["ReRankStartEvent", "start reranking", "end reranking", "SpanDropEvent"]
    assert [name for name, _ in logs[1]] == names * 2


@pytest.mark.parametrize("name", ["dtype", "hooks", "memory", "query_max_length", "show_progress", "truncation"])
def test_our_own_options_do_not_get_lost_among_the_cross_encoders(tiny_cross: str, name: str) -> None:
    """Difference: upstream's CrossEncoder raises TypeError; ours says where the option belongs."""
    with pytest.raises(ConfigError, match=f"'{name}' is not an option of CrossEncoder"):
        MemsafeRerank(tiny_cross, device="cpu", cross_encoder_kwargs={name: None})


@pytest.mark.peers
@pytest.mark.parametrize("nodes", [[], TEXTS[:2]], ids=["no nodes", "two nodes"])
def test_a_missing_query_is_upstreams_error(make_rerank_pair: Any, tiny_cross: str, nodes: list[str]) -> None:
    """No query: the start event, then ValueError in upstream's words, even without nodes; both kinds at once too."""
    logs = []
    for model in make_rerank_pair(tiny_cross, top_n=3):
        with recorded(model) as log:
            with pytest.raises(ValueError, match="Missing query bundle in extra info"):
                model.postprocess_nodes(make_nodes(nodes))
            with pytest.raises(ValueError, match="Cannot specify both query_str and query_bundle"):
                model.postprocess_nodes(make_nodes(nodes), QueryBundle("a"), "a")
        logs.append(log.entries)
    assert logs[0] == logs[1]


@pytest.mark.peers
@pytest.mark.parametrize("name", ["device", "model"])
def test_wrong_keyword_arguments_are_upstreams_error(make_rerank_pair: Any, tiny_cross: str, name: str) -> None:
    """device and model do not belong into cross_encoder_kwargs: ValueError in upstream's words."""
    messages = []
    for kind in map(type, make_rerank_pair(tiny_cross)):
        with pytest.raises(ValueError) as caught:
            kind(tiny_cross, device="cpu", cross_encoder_kwargs={name: "x"})
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.peers
def test_parity_edits_the_callers_nodes_as_upstream(make_rerank_pair: Any, tiny_cross: str) -> None:
    """parity=True: the same objects come back, and all of them, dropped ones too, carry their new score."""
    states = []
    for model in make_rerank_pair(tiny_cross, parity=True, top_n=2, keep_retrieval_score=True):
        nodes = make_nodes(TEXTS[:5])
        kept = model.postprocess_nodes(nodes, query_str="a river")
        assert all(any(node is given for given in nodes) for node in kept)
        again = model.postprocess_nodes(nodes, query_str="a river")
        states.append([(n.node.node_id, round(n.score, 4), n.node.metadata.keys()) for n in [*nodes, *kept, *again]])
    assert states[0] == states[1]


@pytest.mark.peers
def test_parity_slices_as_upstream(make_rerank_pair: Any, tiny_cross: str) -> None:
    """parity=True with top_n=-1 drops the last node, as a slice does."""
    results = [
        [node.node.node_id for node in model.postprocess_nodes(make_nodes(TEXTS[:5]), query_str="a")]
        for model in make_rerank_pair(tiny_cross, parity=True, top_n=-1)
    ]
    assert results[0] == results[1] and len(results[1]) == 4


@pytest.mark.peers
def test_spans_are_upstreams(make_rerank_pair: Any, tiny_cross: str) -> None:
    """One span per call, sync and async."""
    counts = []
    for model in make_rerank_pair(tiny_cross):
        handler = SimpleSpanHandler()
        root = get_dispatcher()
        root.add_span_handler(handler)
        try:
            model.postprocess_nodes(make_nodes(TEXTS[:2]), query_str="a")
            asyncio.run(model.apostprocess_nodes(make_nodes(TEXTS[:2]), query_str="a"))
        finally:
            root.span_handlers.remove(handler)
        counts.append((len(handler.completed_spans), len(handler.open_spans), len(handler.dropped_spans)))
    assert counts[0] == counts[1] == (2, 0, 0)


# --- Differences ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [False, True])
def test_the_callers_nodes_are_left_alone(tiny_cross: str, keep: bool) -> None:
    """Difference: scores and metadata of the nodes that were given do not change; a second pass ranks the same."""
    model = MemsafeRerank(tiny_cross, device="cpu", top_n=3, keep_retrieval_score=keep)
    nodes = make_nodes(TEXTS[:6], source="a page")
    before = copy.deepcopy(nodes)
    first = model.postprocess_nodes(nodes, query_str="a river")
    assert nodes == before
    second = model.postprocess_nodes(nodes, query_str="a river")
    assert [(n.node.node_id, n.score) for n in first] == [(n.node.node_id, n.score) for n in second]
    for node in first:
        old = next(given for given in nodes if given.node.node_id == node.node.node_id)
        assert node.node.metadata.get("retrieval_score") == (old.score if keep else None)
        assert node.node.relationships == old.node.relationships and node.node.text == old.node.text


def test_equal_scores_keep_their_order(reranker: MemsafeRerank) -> None:
    """Nodes with the same text come back in the order in which they were given."""
    ranked = reranker.postprocess_nodes(make_nodes(["same"] * 3), query_str="a")
    assert [node.node.node_id for node in ranked] == ["n0", "n1", "n2"]


def test_a_score_that_is_no_number_comes_last(reranker: MemsafeRerank, monkeypatch: pytest.MonkeyPatch) -> None:
    """Difference: NaN sorts behind every number (upstream: anywhere)."""
    scores = np.array([0.1, np.nan, -3.0, 0.5], dtype=np.float32)
    monkeypatch.setattr(Reranker, "score", lambda self, query, documents, **options: scores)
    ranked = reranker.postprocess_nodes(make_nodes(["a", "b", "c", "d"]), query_str="a")
    assert [node.node.node_id for node in ranked] == ["n3", "n0", "n2"]


def test_the_core_sees_all_pairs_in_one_call(reranker: MemsafeRerank, core_calls: CoreCalls) -> None:
    """All nodes are one call of the core, sync and async; no nodes are none."""
    reranker.postprocess_nodes(make_nodes(), query_str="a river")
    asyncio.run(reranker.apostprocess_nodes(make_nodes(), query_str="a river"))
    reranker.postprocess_nodes([], query_str="a river")
    assert core_calls == [23, 23]


@pytest.mark.parametrize("top_n", [-1, -7])
def test_a_negative_top_n_is_refused(tiny_cross: str, reranker: MemsafeRerank, top_n: int) -> None:
    """Difference: a negative top_n is a ConfigError, in the constructor and when set later."""
    with pytest.raises(ConfigError, match="top_n"):
        MemsafeRerank(tiny_cross, device="cpu", top_n=top_n)
    reranker.top_n = top_n
    with pytest.raises(ConfigError, match="top_n"):
        reranker.postprocess_nodes(make_nodes(), query_str="a")


def test_no_top_n_is_refused(tiny_cross: str) -> None:
    """top_n=None is pydantic's error, as upstream."""
    with pytest.raises(ValueError, match="top_n"):
        MemsafeRerank(tiny_cross, device="cpu", top_n=None)  # type: ignore[arg-type]


def test_several_labels_are_refused(tmp_path: Any) -> None:
    """Difference: a model with two labels is one of our errors that says so (upstream: TypeError from float())."""
    folder = str(save_reranker(tmp_path / "two", num_labels=2))
    with pytest.raises(MemsafeError, match=r"2|label"):
        MemsafeRerank(folder, device="cpu").postprocess_nodes(make_nodes(), query_str="a")


def test_bad_options_are_refused(tiny_cross: str) -> None:
    """An unknown keyword of the cross-encoder, a wrong truncation or memory: ConfigError."""
    for options in ({"cross_encoder_kwargs": {"max_len": 3}}, {"truncation": "first"}, {"memory": 7}):
        with pytest.raises(ConfigError):
            MemsafeRerank(tiny_cross, device="cpu", **options)  # type: ignore[arg-type]


def test_memory_and_callback_manager_are_arguments(tiny_cross: str) -> None:
    """memory reaches the core; callback_manager is an argument (upstream: TypeError) and stays assignable."""
    events: list[Any] = []
    manager = CallbackManager([])
    policy = MemoryPolicy(max_tokens=64, learn=False)
    model = MemsafeRerank(tiny_cross, device="cpu", memory=policy, hooks=[events.append], callback_manager=manager)
    model.postprocess_nodes(make_nodes(), query_str="a river")
    sizes = [event.computed_tokens for event in events if type(event).__name__ == "MicroBatchDone"]
    assert len(sizes) > 3 and max(sizes) <= 64
    assert model.callback_manager is manager
    model.callback_manager = CallbackManager([])


@pytest.mark.cuts
async def test_the_event_loop_stays_free(reranker: MemsafeRerank, passages: list[str]) -> None:
    """While nodes are scored the loop keeps turning."""
    gaps: list[float] = []
    last = time.perf_counter()
    work = asyncio.ensure_future(reranker.apostprocess_nodes(make_nodes(passages * 2), query_str="a river"))
    while not work.done():
        await asyncio.sleep(0.005)
        now = time.perf_counter()
        gaps.append(now - last)
        last = now
    assert len(await work) == 3
    assert len(gaps) > 10 and max(gaps) < max(0.25, sum(gaps) / 4)


def test_a_subclass_that_overrides_the_work_is_obeyed(tiny_cross: str) -> None:
    """A subclass with its own _postprocess_nodes is used by the asynchronous method too."""

    class First(MemsafeRerank):
        def _postprocess_nodes(self, nodes: Any, query_bundle: Any = None) -> Any:
            return nodes[:1]

    model = First(tiny_cross, device="cpu")
    assert len(asyncio.run(model.apostprocess_nodes(make_nodes(), query_str="a"))) == 1


def test_in_a_query_engine(plain: str, reranker: MemsafeRerank) -> None:
    """As node_postprocessors of a query engine it gets the engine's callback manager and reranks what is retrieved."""
    index = VectorStoreIndex([TextNode(text=text) for text in TEXTS], embed_model=MemsafeEmbedding(plain, device="cpu"))
    engine = RetrieverQueryEngine.from_args(
        index.as_retriever(similarity_top_k=8), llm=MockLLM(), node_postprocessors=[reranker]
    )
    assert reranker.callback_manager is engine.callback_manager
    response = engine.query("a river crosses the plain")
    scores = [node.score for node in response.source_nodes]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True)


# --- FlagEmbeddingReranker --------------------------------------------------------------------------------------------


def flag_scores(folder: str, pairs: list[tuple[str, str]], max_length: int = 512) -> list[float]:
    """What FlagEmbedding 1.4.2 computes for a BERT-like model, written from its description, one pair at a time."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    scores = []
    for query, passage in pairs:
        first = tokenizer(query, add_special_tokens=False)["input_ids"][: max_length * 3 // 4]
        second = tokenizer(passage, add_special_tokens=False)["input_ids"][:max_length]
        second = second[: max_length - 3 - len(first)]
        ids = [tokenizer.cls_token_id, *first, tokenizer.sep_token_id, *second, tokenizer.sep_token_id]
        types = [0] * (len(first) + 2) + [1] * (len(second) + 1)
        with torch.inference_mode():
            output = model(input_ids=torch.tensor([ids]), token_type_ids=torch.tensor([types]))
        scores.append(float(output.logits.reshape(-1)[0]))
    return scores


QUERIES = {"short": "a river", "long": "which river " * 150, "longer": "which river crosses " * 400}


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.cuts
def test_from_flag_gives_flags_numbers(tiny_cross: str, query: str) -> None:
    """Raw logits; the query is cut at 3/4 of 512 tokens, then only the passage gives way."""
    texts = ["a short passage", "the plain is wide " * 30, "a river crosses the plain " * 300]
    model = MemsafeRerank.from_flag(5, tiny_cross, device="cpu")
    ranked = model.postprocess_nodes(make_nodes(texts), query_str=QUERIES[query])
    expected = flag_scores(tiny_cross, [(QUERIES[query], text) for text in texts])
    got = {node.node.node_id: node.score for node in ranked}
    np.testing.assert_allclose([got[f"n{i}"] for i in range(3)], expected, atol=1e-4)


def test_from_flag_differs_from_the_plain_constructor(tiny_cross: str) -> None:
    """The plain constructor applies the sigmoid and cuts the longest side; from_flag does neither."""
    nodes = make_nodes(TEXTS[:4])
    flag = MemsafeRerank.from_flag(9, tiny_cross, device="cpu").postprocess_nodes(nodes, query_str="a river")
    plain = MemsafeRerank(tiny_cross, device="cpu", top_n=9).postprocess_nodes(nodes, query_str="a river")
    assert [n.node.node_id for n in flag] == [n.node.node_id for n in plain]
    np.testing.assert_allclose([1 / (1 + np.exp(-n.score)) for n in flag], [n.score for n in plain], atol=1e-5)


def test_from_flag_options(tiny_cross: str) -> None:
    """use_fp16 is ignored on a CPU, as there; the configuration says what was chosen."""
    model = MemsafeRerank.from_flag(4, tiny_cross, True, device="cpu")
    assert (model.top_n, model.dtype, model.raw_scores) == (4, None, True)
    assert (model.truncation, model.query_max_length) == ("only_second", 384)
    assert model.reranker.max_length == 512


@pytest.mark.cuts
def test_from_flag_in_words(tiny_cross: str) -> None:
    """The constructor's raw_scores, truncation and query_max_length give what from_flag gives, as the page says."""
    words = {"raw_scores": True, "truncation": "only_second", "query_max_length": 384}
    model: Any = MemsafeRerank(tiny_cross, device="cpu", top_n=5, **words)  # type: ignore[arg-type]
    flag = MemsafeRerank.from_flag(5, tiny_cross, device="cpu")
    texts = ["a short passage", "a river crosses the plain " * 300]
    for query in QUERIES.values():
        a, b = (m.postprocess_nodes(make_nodes(texts), query_str=query) for m in (model, flag))
        assert [(n.node.node_id, n.score) for n in a] == [(n.node.node_id, n.score) for n in b]


def test_long_passages_are_read_in_windows(demo_reranker: str) -> None:
    """The option goes to the core: what stands behind 64 tokens counts, sync and async; in cross_encoder_kwargs it is refused."""
    query = "How do rivers flow?"
    texts = ["nothing of interest here " * 40 + query, "a short one"]
    ours = MemsafeRerank(
        demo_reranker, device="cpu", cross_encoder_kwargs={"max_length": 64}, long_documents="max_passage"
    )
    with Reranker(demo_reranker, device="cpu", max_length=64, long_documents="max_passage") as reranker:
        expected = dict(zip(texts, reranker.score(query, texts).tolist(), strict=True))
    for got in (
        ours.postprocess_nodes(make_nodes(texts), query_str=query),
        asyncio.run(ours.apostprocess_nodes(make_nodes(texts), query_str=query)),
    ):
        for node in got:
            assert node.score == pytest.approx(expected[node.node.get_content()], abs=1e-5)
    assert ours.to_dict()["long_documents"] == "max_passage"
    with pytest.raises(ConfigError, match="long_documents"):
        MemsafeRerank(demo_reranker, cross_encoder_kwargs={"long_documents": "max_passage"})

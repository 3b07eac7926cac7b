"""What upstream loads is loaded, exactly as upstream does; and what is handed in loaded stays as it was."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import AutoModel

from memsafe import Embedder, ModelError, Reranker
from memsafe.machine.store import CostStore
from memsafe.models import loading
from memsafe.models.probes import Call
from memsafe.planning.batch import BatchShape
from memsafe.planning.cost import CostModel
from tests import tiny_models as models
from tests.models.hub import hub
from tests.tiny_models import own_rows

QUIET = {"learn": False}
TEXTS = ["a", "the quick brown fox", "", "jumps " * 60, "over [PAD] the [SEP] dog"]
PAIRS = [("a", text) for text in TEXTS]


def test_models_of_which_a_part_is_cached(tmp_path: Path) -> None:
    """With a hub in reach, what a cache lacks is fetched: tokenizer first, an interrupted download, one shard of several."""
    embedder, reranker = models.save_embedder(tmp_path / "embedder"), models.save_reranker(tmp_path / "reranker")
    sharded = models.save_embedder(tmp_path / "sharded")
    (sharded / "model.safetensors").unlink()
    AutoModel.from_pretrained(str(embedder)).save_pretrained(str(sharded), max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    names = ("tokenizer-first", "interrupted", "no-tokenizer-yet")
    folders = {f"org/{name}": embedder for name in names} | {"org/sharded": sharded, "org/reranker": reranker}
    with hub(folders) as (address, asked):
        home = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        home |= {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
        program = str(Path(__file__).parent / "program_hub.py")
        done = subprocess.run(
            [sys.executable, program, str(tmp_path)], env={**os.environ, **home}, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr[-3000:]
    differences = json.loads(done.stdout.splitlines()[-1])
    assert len(differences) == 5 and max(differences.values()) < 1e-5
    assert "org/tokenizer-first/model.safetensors" in asked  # so that the test tests something


# peft calls it, of transformers
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_an_adapter_whose_base_is_elsewhere(tmp_path: Path) -> None:
    """A folder with only a LoRA adapter loads as upstream loads it, and its base's weights are counted."""
    peft = pytest.importorskip("peft")
    base = models.save_embedder(tmp_path / "base")
    model = AutoModel.from_pretrained(str(base))
    config = peft.LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    folder = tmp_path / "adapter"
    adapted.save_pretrained(str(folder))
    models.save_tokenizer(folder)
    assert not (folder / "config.json").exists()
    theirs = SentenceTransformer(str(folder), device="cpu")
    plain = own_rows(SentenceTransformer(str(base), device="cpu"), TEXTS)
    with Embedder(str(folder), device="cpu", memory=QUIET) as ours:
        wanted = own_rows(theirs, TEXTS)
        np.testing.assert_allclose(ours.embed_documents(TEXTS), wanted, rtol=0, atol=1e-5)
        assert np.abs(wanted - plain).max() > 0.01  # so that the test tests something
    found = loading.weights.inspect(str(folder), kind="embedding")
    alone = loading.weights.inspect(str(base), kind="embedding")
    assert found is not None and alone is not None
    assert found.bytes_as(None) > alone.bytes_as(None)
    revision = found.revision
    os.utime(base / "model.safetensors", ns=(1, 1))
    assert found.revision != revision


# a second adapter is the point
@pytest.mark.filterwarnings("ignore:Already found a .peft_config. attribute:UserWarning")
def test_a_switched_adapter_reaches_a_handed_in_model(tmp_path: Path) -> None:
    """Adapters that the user switches on the object that he handed in are those that our rows are made with."""
    peft = pytest.importorskip("peft")
    theirs = SentenceTransformer(str(models.save_embedder(tmp_path)), device="cpu")
    for name, seed in (("one", 1), ("two", 2)):
        torch.manual_seed(seed)
        theirs.add_adapter(peft.LoraConfig(r=4, target_modules=["query"], init_lora_weights=False), name)
    theirs.set_adapter("one")
    with Embedder(theirs, device="cpu", memory=QUIET) as ours:
        seen = []
        for name in ("one", "two"):
            theirs.set_adapter(name)
            seen.append(ours.embed_documents(TEXTS))
            np.testing.assert_allclose(seen[-1], own_rows(theirs, TEXTS), rtol=0, atol=1e-5)
        assert np.abs(seen[0] - seen[1]).max() > 1e-3


def test_a_classifier_as_an_embedder(tmp_path: Path) -> None:
    """A ForSequenceClassification folder loads as SentenceTransformer loads it, with a warning."""
    folder = models.save_reranker(tmp_path)
    with pytest.warns(UserWarning, match="saved as a cross-encoder"):
        ours = Embedder(str(folder), device="cpu", memory=QUIET)
    with ours:
        wanted = own_rows(SentenceTransformer(str(folder), device="cpu"), TEXTS)
        np.testing.assert_allclose(ours.embed_documents(TEXTS), wanted, rtol=0, atol=1e-5)


def test_an_encoder_as_a_reranker(tmp_path: Path) -> None:
    """A base model with num_labels=1 loads as CrossEncoder loads it, with a warning: its head is new."""
    folder = models.save_embedder(tmp_path)
    torch.manual_seed(0)
    theirs = CrossEncoder(str(folder), num_labels=1, device="cpu").predict(PAIRS)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="saved as an embedding model"):
        ours = Reranker(str(folder), num_labels=1, device="cpu", memory=QUIET)
    with ours:
        np.testing.assert_allclose(ours.score_pairs(PAIRS), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cls", [Embedder, Reranker])
def test_a_bare_transformers_model_is_a_model_error(tmp_path: Path, cls: Any) -> None:
    """A transformers model, or its class, says what to give instead."""
    hf = AutoModel.from_pretrained(str(models.save_embedder(tmp_path)))
    for given, words in ((hf, "got a BertModel"), (AutoModel, "got the class AutoModel")):
        with pytest.raises(ModelError, match=words):
            cls(given, device="cpu")


def test_a_saved_length_beyond_the_learnt_positions_is_cut(tmp_path: Path) -> None:
    """A folder that was saved with a longer maximum than it has positions: long texts are cut there, with a warning."""
    folder = models.save_embedder(tmp_path, "roberta", max_positions=40, max_length=256)
    with pytest.warns(UserWarning, match="saved with a maximum length of 256, but it has learnt 40 positions"):
        ours = Embedder(str(folder), device="cpu", memory=QUIET, processor_kwargs={"model_max_length": 256})
    with ours:
        assert ours.max_length == 40
        with pytest.warns(UserWarning, match="longer than 40 tokens"):
            rows = ours.embed_documents(TEXTS)
        assert np.isfinite(rows).all()


def test_models_of_several_dtypes_loaded_at_once(tmp_path: Path) -> None:
    """Loads in several threads do not give each other's default dtype: every weight and buffer has the dtype asked for."""
    folder = str(models.save_embedder(tmp_path))
    wanted = {dtype: own_rows(SentenceTransformer(folder, device="cpu").to(dtype), TEXTS) for dtype in DTYPES}
    failures: list[Any] = []

    def work(name: str, dtype: torch.dtype) -> None:
        try:
            for _ in range(3):
                loaded = models.loaded(folder, dtype=name)
                dtypes = {p.dtype for p in loaded.st.parameters()}
                rows = loaded.routes.rows_of(TEXTS, Call()).float().numpy()
                if dtypes != {dtype} or np.abs(rows - wanted[dtype]).max() > 0.2:
                    failures.append((name, dtypes))
        except Exception as error:
            failures.append((name, error))

    threads = [threading.Thread(target=work, args=(str(d).removeprefix("torch."), d)) for d in DTYPES * 2]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_only_one_model_is_built_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstream's constructor, which changes the process's default dtype, never runs in two threads of ours."""
    import sentence_transformers

    folder, inside, most = str(models.save_embedder(tmp_path)), [0], [0]

    class Slow(SentenceTransformer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            threading.Event().wait(0.2)
            super().__init__(*args, **kwargs)
            inside[0] -= 1

    monkeypatch.setattr(sentence_transformers, "SentenceTransformer", Slow)
    threads = [threading.Thread(target=models.loaded, args=(folder,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and inside == [0]


# -- the object that a user hands in ---------------------------------------------------------------------------------


def settings_of(model: Any) -> Any:
    """Everything that can be seen of a model's modules, configs and tokenizer."""
    seen: dict[str, Any] = {}
    for name, module in model.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, (str, int, float, bool, tuple, type(None)))}
        hooks = {k: dict(v) for k, v in vars(module).items() if k.endswith("_hooks") and isinstance(v, dict)}
        config = getattr(module, "config", None)
        attention = getattr(config, "_attn_implementation", None)
        seen[name] = (id(module), type(module), plain, hooks, attention, sorted(vars(module)), sorted(module._buffers))
    tokenizer = model.tokenizer
    return seen, tokenizer.model_max_length, tokenizer.backend_tokenizer.to_str(), model.max_seq_length


@models.needs_interface
@pytest.mark.parametrize("kind", ["embedder", "reranker"])
@pytest.mark.parametrize("architecture", ["bert", "modernbert", "qwen3", "mpnet"])
def test_a_model_that_is_handed_in_stays_as_it_was(tmp_path: Path, architecture: str, kind: str) -> None:
    """While and after we use it: no module, setting, hook, attention or length of the user's object is another, it can be
    pickled without us (which encode on several devices does), and its own rows are bit for bit the same."""
    if kind == "embedder":
        theirs: Any = SentenceTransformer(str(models.save_embedder(tmp_path, architecture)), device="cpu")
        texts: Any = TEXTS
    else:
        theirs = CrossEncoder(str(models.save_reranker(tmp_path, architecture)), device="cpu")
        texts = PAIRS
    run = theirs.encode if kind == "embedder" else theirs.predict
    before_rows = run(texts)
    theirs.train()
    before = settings_of(theirs)
    ours: Any = (Embedder if kind == "embedder" else Reranker)(theirs, device="cpu", max_length=20, memory=QUIET)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert ours.max_length == 20
        (ours.embed_documents if kind == "embedder" else ours.score_pairs)(texts)
        assert settings_of(theirs) == before
        assert b"memsafe" not in pickle.dumps(theirs)
        assert ours.model is theirs
        theirs.eval()
        np.testing.assert_array_equal(run(texts), before_rows)
        theirs.train()
    ours.close()
    assert settings_of(theirs) == before


def test_a_model_that_is_handed_in_still_encodes_in_processes(tmp_path: Path) -> None:
    """encode(device=[...]) on the user's own object, while we use it: his rows, from processes that know nothing of us."""
    theirs = SentenceTransformer(str(models.save_embedder(tmp_path)), device="cpu")
    wanted = theirs.encode(TEXTS)
    with Embedder(theirs, device="cpu", memory=QUIET) as ours:
        ours.embed_documents(TEXTS[:3])
        np.testing.assert_allclose(theirs.encode(TEXTS, device=["cpu"]), wanted, rtol=0, atol=1e-6)
        np.testing.assert_allclose(ours.embed_documents(TEXTS[:3]), wanted[:3], rtol=0, atol=1e-5)


def test_kept_costs_follow_todays_formula(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements of another day are used, the formula that was kept with them is not; and other versions of the software,
    whose kernels may need other memory, have costs of their own."""
    monkeypatch.setenv("MEMSAFE_CACHE_DIR", str(tmp_path / "cache"))
    folder = str(models.save_embedder(tmp_path / "model", "bert"))
    with Embedder(folder, device="cpu") as embedder:
        model = embedder._engine.model
        key, prior = model.cost_key(), model.cost_prior()
    old = CostModel(key, replace(prior, per_token_bytes=10 * prior.per_token_bytes))
    old.observe(BatchShape.of([64] * 8, packed=True), 10_000_000, 12_000_000)
    assert CostStore(tmp_path / "cache" / "costs").save(old)
    with Embedder(folder, device="cpu") as embedder:
        cost = embedder._engine.runners[0].tenant.ledger.cost
        assert cost.num_observations == 1 and cost.prior == prior
        for package in ("memsafe", "torch", "transformers"):
            with monkeypatch.context() as patch:
                patch.setattr(f"{package}.__version__", "0.0.0")
                assert embedder._engine.model.cost_key().digest() != key.digest()

"""Models that OpenVINO and ONNX Runtime compute: the same rows, through the same queue and planner, with their loss known."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import CrossEncoder, SentenceTransformer

from memsafe import ConfigError, Embedder, MemoryPolicy, ModelTooLargeError, Quantization, Reranker
from memsafe.models.runtimes import attach, onnx, openvino
from memsafe.models.runtimes.agreement import agreement, passages
from tests.hostile.texts import text_of
from tests.runtimes.conftest import need

MAKERS = {"openvino": openvino, "onnx": onnx}
TEXTS = [text_of(length, number) for number, length in enumerate((5, 190, 6, 33, 34, 90, 7, 250, 12, 60, 61, 120))]

FEW = {"texts": TEXTS}
"""To measure agreement on, and to find scales from: quicker than the built-in ones."""


def own_rows(folder: Path, texts: list[str], **options: Any) -> Any:
    return SentenceTransformer(str(folder), device="cpu").encode(texts, batch_size=1, **options)


def exported(cache: Path, pattern: str) -> Path:
    """The one export in a cache."""
    (found,) = (cache / "exports").rglob(pattern)
    return found


def test_float32_rows_are_those_of_torch(engine: str, tiny: Path) -> None:
    """Each row is that of the model's own encode, prompts and all; padding stays below a twentieth, and the report says who ran."""
    with Embedder(str(tiny), engine=engine, quantization=FEW) as embedder:
        run = embedder.run(TEXTS, kind="query")
        documents = embedder.embed_documents(TEXTS)
    assert np.abs(run.embeddings - own_rows(tiny, TEXTS, prompt_name="query")).max() < 1e-4
    assert np.abs(documents - own_rows(tiny, TEXTS)).max() < 1e-4
    assert run.report.padding_ratio < 0.05 and run.report.dtype == "float32"
    assert {"openvino": "OpenVINO", "onnx": "ONNX Runtime"}[engine] in run.report.path


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
def test_int8_rows_depend_on_no_neighbour(engine: str, scheme: str, tiny: Path) -> None:
    """int8 rows in company are those of the same texts alone, which per-tensor scales of a whole micro-batch would not give; and
    they agree with float32, as the model says of itself."""
    with Embedder(
        str(tiny), engine=engine, dtype="int8", quantization=Quantization(scheme=scheme, texts=tuple(TEXTS))
    ) as embedder:
        together = embedder.run(TEXTS)
        alone = np.concatenate([embedder.embed_documents([text], warn=False) for text in TEXTS])
        measured = embedder._engine.model.agreement
        in_company = not embedder._engine.model.check.alone
    wanted = own_rows(tiny, TEXTS)
    assert in_company is ((engine, scheme) != ("onnx", "dynamic"))  # whose scales are those of all that runs together
    assert together.report.micro_batches < len(TEXTS) and together.report.dtype == "int8"
    assert relative(together.embeddings, alone).max() < (1e-2 if in_company else 1e-6)
    assert agreement(together.embeddings, wanted) > 0.98 and measured is not None and measured > 0.98
    assert relative(together.embeddings, wanted).max() > 1e-4  # it is int8


def relative(rows: Any, wanted: Any) -> Any:
    return np.linalg.norm(rows - wanted, axis=1) / np.linalg.norm(wanted, axis=1)


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_scores_are_those_of_predict(engine: str, dtype: str | None, tiny_reranker: Path) -> None:
    """A Reranker's scores are those of predict, of int8 about those."""
    pairs = [("which birds are tall", text) for text in TEXTS]
    wanted = CrossEncoder(str(tiny_reranker), device="cpu").predict(pairs, batch_size=1)
    with Reranker(str(tiny_reranker), engine=engine, dtype=dtype, quantization=FEW) as reranker:
        scores, path = reranker.score_pairs(pairs), reranker.path
        ranked = reranker.rerank("which birds are tall", TEXTS, top_n=3)
    assert "int8" in path or dtype is None
    assert np.abs(scores - wanted).max() < (1e-4 if dtype is None else 0.05)
    assert [each.index for each in ranked] == np.argsort(-scores, kind="stable")[:3].tolist()


def test_what_loses_too_much_is_refused(engine: str, tiny: Path) -> None:
    """Below the user's least agreement a warning says so with the figure, torch computes in float32, and every report notes it."""
    with (
        pytest.warns(UserWarning, match=r"agrees with float32 to 0\.99\d* only.*torch computes in float32 instead"),
        Embedder(str(tiny), engine=engine, dtype="int8", quantization={**FEW, "least_agreement": 1.0}) as embedder,
    ):
        run = embedder.run(TEXTS)
    assert np.abs(run.embeddings - own_rows(tiny, TEXTS)).max() < 1e-5
    assert run.report.path == "packed" and run.report.dtype == "float32"
    assert any("agrees with float32" in note for note in run.report.notes)


def test_an_export_is_made_once(engine: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second load opens what the first one made, and measures nothing again; what was cut short is made anew; other weights
    have an export of their own."""
    monkeypatch.setenv("MEMSAFE_CACHE_DIR", str(tmp_path / "cache"))
    folder = shutil.copytree(tiny, tmp_path / "model")
    made: list[Path] = []
    export = MAKERS[engine].export

    def counted(model: Any, inputs: Any, file: Path) -> None:
        made.append(file)
        export(model, inputs, file)

    monkeypatch.setattr(MAKERS[engine], "export", counted)
    rows = [load_and_embed(folder, engine)]
    measured: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(attach, "rows_of", lambda *given: measured.append(given))
        rows.append(load_and_embed(folder, engine))
    assert len(made) == 1 and not measured
    file = exported(tmp_path / "cache", {"openvino": "*.bin", "onnx": "*.onnx"}[engine])
    file.write_bytes(file.read_bytes()[:-100])
    rows.append(load_and_embed(folder, engine))
    assert len(made) == 2
    assert all(np.array_equal(each, rows[0]) for each in rows)
    shutil.copy(folder / "config.json", folder / "other.json")
    load_and_embed(folder, engine)
    assert len(made) == 3


def load_and_embed(folder: Path, engine: str) -> Any:
    with Embedder(str(folder), engine=engine, quantization=FEW) as embedder:
        return embedder.embed_documents(TEXTS[:4])


@pytest.mark.parametrize("place", ["", "onnx"])
def test_an_export_beside_the_model_is_used_as_it_is(
    place: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model.onnx where sentence-transformers leaves it is opened; nothing is exported."""
    need("onnx")
    monkeypatch.setenv("MEMSAFE_CACHE_DIR", str(tmp_path / "cache"))
    wanted = load_and_embed(tiny, "onnx")
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / place).mkdir(exist_ok=True)
    shutil.move(exported(tmp_path / "cache", "*.onnx"), folder / place / "model.onnx")
    monkeypatch.delattr(onnx, "export")
    assert np.array_equal(load_and_embed(folder, "onnx"), wanted)
    with Embedder(str(folder), engine="onnx", model_kwargs={"file_name": "model.onnx"}) as embedder:
        assert np.array_equal(embedder.embed_documents(TEXTS[:4]), wanted)
    with pytest.raises(OSError, match=r"has no other\.onnx"):
        Embedder(str(folder), engine="onnx", model_kwargs={"file_name": "other.onnx"})


def test_an_export_without_torchs_weights_runs(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As save_pretrained of another backend leaves it: there is nothing to compare with, and nothing else is needed. Where that
    lacks the dtype, the error says so."""
    need("onnx")
    monkeypatch.setenv("MEMSAFE_CACHE_DIR", str(tmp_path / "cache"))
    wanted = load_and_embed(tiny, "onnx")
    folder = shutil.copytree(tiny, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "onnx").mkdir()
    shutil.move(exported(tmp_path / "cache", "*.onnx"), folder / "onnx" / "model.onnx")
    with Embedder(str(folder), engine="onnx") as embedder:
        assert np.array_equal(embedder.embed_documents(TEXTS[:4]), wanted)
        assert embedder._engine.model.agreement is None and embedder.dimension == wanted.shape[1]
    with pytest.raises(OSError, match="neither weights nor an export for engine='onnx' in int8"):
        Embedder(str(folder), engine="onnx", dtype="int8")


def test_nothing_is_exported_where_memory_does_not_suffice(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The room is looked at before anything is made: the error names need, room and remedy."""
    need("onnx")
    monkeypatch.setenv("MEMSAFE_CACHE_DIR", str(tmp_path / "cache"))
    size = sum(file.stat().st_size for file in tiny.glob("*.safetensors"))
    with pytest.raises(ModelTooLargeError, match=r"exporting .* takes about .* leave engine out"):
        Embedder(str(tiny), engine="onnx", memory=MemoryPolicy(limit=2 * size))
    assert not (tmp_path / "cache" / "exports").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"engine": "tensorrt"}, "choose from 'torch', 'openvino', 'onnx'"),
        ({"dtype": "int8"}, "torch has no int8 here; give engine="),
        ({"engine": "onnx", "dtype": "float16"}, "engine='onnx' has no 'float16'"),
        ({"engine": "onnx", "device": "cuda"}, "runs on the CPU, once"),
        ({"engine": "onnx", "device": ["cpu", "cpu"]}, "runs on the CPU, once"),
        ({"engine": "onnx", "backend": "onnx"}, "give one of them"),
        ({"engine": "onnx", "quantization": {"threshold": 1}}, "unknown field 'threshold'"),
        ({"engine": "onnx", "quantization": 0.9}, "give a memsafe.Quantization"),
        ({"engine": "onnx", "quantization": {"least_agreement": 2}}, "give a number from 0 to 1"),
        ({"engine": "onnx", "quantization": {"scheme": "tensor"}}, "choose from 'auto', 'static', 'dynamic'"),
        ({"engine": "onnx", "quantization": {"texts": "one"}}, "texts must be a list of str"),
    ],
)
def test_what_an_engine_does_not_do_is_said(options: dict[str, Any], says: str, tiny: Path) -> None:
    """Before anything is loaded."""
    with pytest.raises(ConfigError) as caught:
        Embedder(str(tiny), **options)
    assert says in str(caught.value)


def test_running_out_while_exporting_is_the_same_error(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where it is seen beforehand, with the remedy; nothing half made is left."""
    from memsafe.models.runtimes import onnx

    pytest.importorskip("onnxruntime", reason='engine="onnx" is an extra')

    def export(*given: object) -> None:
        raise MemoryError

    monkeypatch.setenv("MEMSAFE_CACHE_DIR", str(tmp_path / "cache"))  # no other test has exported it into this one
    monkeypatch.setattr(onnx, "export", export)
    with pytest.raises(ModelTooLargeError, match="bring MEMSAFE_CACHE_DIR along"):
        Embedder(str(tiny), engine="onnx")
    assert not list((tmp_path / "cache").rglob("*.onnx"))


def test_a_loaded_model_is_not_exported(tiny: Path) -> None:
    """It is the user's own, and has no files to know it by."""
    with pytest.raises(ConfigError, match="with a loaded model; give its folder"):
        Embedder(SentenceTransformer(str(tiny), device="cpu"), engine="onnx")


_FORKED = """
import os, sys, warnings
from memsafe import ClosedError, Embedder
warnings.simplefilter("ignore")  # Python warns of forking with threads
embedder = Embedder(sys.argv[1], engine=sys.argv[2])
rows = embedder.embed_documents(["a crane is a bird"])
if os.fork() == 0:
    try:
        same = (embedder.embed_documents(["a crane is a bird"]) == rows).all()
        print("served" if same else "other rows", flush=True)
    except ClosedError as error:
        print(error, flush=True)
    os._exit(0)
os.wait()
print((embedder.embed_documents(["a crane is a bird"]) == rows).all())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_is_served_or_told(engine: str, tiny: Path) -> None:
    """OpenVINO's threads do not survive a fork, which the child is told instead of waiting for ever; ONNX Runtime has none. The
    parent goes on."""
    done = subprocess.run(
        [sys.executable, "-c", _FORKED, str(tiny), engine], capture_output=True, text=True, timeout=60, check=True
    )
    told, parent = done.stdout.splitlines()
    assert parent == "True"
    assert told == "served" if engine == "onnx" else "forked after openvino had loaded a model" in told


def test_a_missing_runtime_is_named(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the command that installs it."""
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ImportError, match=r'pip install "memsafe\[openvino\]"'):
        Embedder(str(tiny), engine="openvino")


def test_agreement_is_a_median_of_cosines_or_a_correlation() -> None:
    """Rows of several numbers have a direction; single scores only an order and distances, wherever they begin."""
    rows = np.random.default_rng(0).normal(size=(9, 5)).astype(np.float32)
    assert agreement(2 * rows, rows) == pytest.approx(1)
    spoilt = rows.copy()
    spoilt[:4] *= -1
    assert agreement(spoilt, rows) == pytest.approx(1)  # of nine rows four
    spoilt[4] *= -1
    assert agreement(spoilt, rows) == 0
    scores = rows[:, :1]
    assert agreement(3 * scores + 7, scores) == pytest.approx(1)
    assert agreement(-scores, scores) == 0
    spoilt[0] = np.nan
    assert agreement(spoilt, rows) == 0


def test_there_are_texts_to_measure_on() -> None:
    """Short and long ones, of the interpreter's own documentation."""
    texts = passages()
    assert len(texts) >= 200 and len(set(texts)) > 150
    lengths = sorted(map(len, texts))
    assert lengths[0] >= 60 and lengths[len(texts) // 10] < 150 and lengths[-len(texts) // 10] > 600

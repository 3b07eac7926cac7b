"""The public names, what importing them costs, and what happens when an optional dependency is missing."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

PUBLIC = {
    "memsafe": [
        "Advice",
        "BusyError",
        "CacheFile",
        "CancelledError",
        "ClosedError",
        "ConfigError",
        "CorpusProgress",
        "CorpusReport",
        "EmbedBatches",
        "Embedder",
        "EmbeddingRun",
        "Event",
        "EventHook",
        "GiB",
        "HybridEmbedder",
        "HybridRun",
        "InputError",
        "InputTooLargeError",
        "LateInteractionReranker",
        "MemoryPolicy",
        "MemsafeError",
        "MiB",
        "MissingExtraError",
        "ModelError",
        "ModelNotFoundError",
        "ModelTooLargeError",
        "MultiVectorEmbedder",
        "MultiVectorRun",
        "Neighbours",
        "PerProcess",
        "Quantization",
        "RaggedArray",
        "RankedDocument",
        "Recording",
        "RerankRun",
        "Reranker",
        "RunReport",
        "SparseEmbedder",
        "SparseRun",
        "Store",
        "StoreError",
        "__version__",
        "advise",
        "embed_corpus",
        "embed_ray_dataset",
        "maxsim",
        "open_store",
    ],
    "llama_index_memsafe": ["MemsafeEmbedding", "MemsafeKVStore", "MemsafeRerank"],
    "langchain_memsafe": ["MemsafeByteStore", "MemsafeCrossEncoder", "MemsafeEmbeddings", "MemsafeRerank"],
    "chroma_memsafe": ["MemsafeEmbeddingFunction"],
    "haystack_memsafe": ["MemsafeDocumentEmbedder", "MemsafeRanker", "MemsafeTextEmbedder"],
}
HEAVY = {
    "torch",
    "scipy",
    "transformers",
    "sentence_transformers",
    "tokenizers",
    "llama_index",
    "langchain_core",
    "chromadb",
}


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("package", PUBLIC)
def test_public_names(package: str) -> None:
    """The public names are these; one more or one less is a decision, made here and in the changelog."""
    module = importlib.import_module(package)
    assert sorted(module.__all__) == sorted(PUBLIC[package])
    for name in module.__all__:
        assert getattr(module, name) is not None
    assert set(module.__all__) <= set(dir(module))


def test_importing_memsafe_is_cheap() -> None:
    """`import memsafe` loads no torch and takes under 0.1 s, beyond what starting Python takes."""
    code = (
        "import sys, time; started = time.perf_counter(); import memsafe; taken = time.perf_counter() - started\n"
        f"print(taken, sorted({HEAVY!r} & set(sys.modules)))"
    )
    runs = [python(code).split(maxsplit=1) for _ in range(5)]
    assert {loaded.strip() for _, loaded in runs} == {"[]"}
    assert min(float(taken) for taken, _ in runs) < 0.1


def test_errors_and_policy_need_no_torch() -> None:
    """A program may build a policy and catch our errors before, or without, loading torch."""
    code = (
        "import sys; from memsafe import MemoryPolicy, MemsafeError, InputError, RunReport\n"
        "MemoryPolicy(limit='2GiB'); print(RunReport())\n"
        f"assert not {HEAVY!r} & set(sys.modules), sorted({HEAVY!r} & set(sys.modules))"
    )
    python(code)


@pytest.mark.parametrize(
    ("package", "dependency", "extra"),
    [
        ("llama_index_memsafe", "llama_index", "llama-index"),
        ("langchain_memsafe", "langchain_core", "langchain"),
        ("chroma_memsafe", "chromadb", "chroma"),
        ("haystack_memsafe", "haystack", "haystack"),
    ],
)
def test_missing_extra_names_its_pip_command(package: str, dependency: str, extra: str) -> None:
    """Without the framework, using its adapter says exactly what to install; it is an ImportError too."""
    code = (
        f"import sys; sys.modules[{dependency!r}] = None\n"
        "import memsafe\n"
        f"try:\n    import {package}\n    {package}.{PUBLIC[package][-1]}\n"
        "except memsafe.MissingExtraError as error:\n    assert isinstance(error, ImportError); print(error)"
    )
    assert f'pip install "memsafe[{extra}]"' in python(code)

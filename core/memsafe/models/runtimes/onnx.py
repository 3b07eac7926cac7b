"""ONNX Runtime on a CPU: made from a transformers model, made int8, opened, run. Needs the extra ``onnx``."""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from memsafe.errors import MissingExtraError
from memsafe.models.runtimes.traced import Traced, example, tracing, wanted_output

__all__ = ["Opened", "export", "quantized", "versions"]

Array = NDArray[Any]
OPSET = 17


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError(
            f'engine="onnx" needs {name}, which is not installed; run: pip install "memsafe[onnx]"', name=name
        ) from error


def versions(dtype: str) -> dict[str, str]:
    """Versions of what makes and runs exports. Raises :class:`MissingExtraError`."""
    return {name: str(_module(name).__version__) for name in ("onnx", "onnxruntime")}


def export(model: Any, inputs: Sequence[str], file: Path) -> None:
    """Write `model`, a transformers model, with rows and lengths left open, as `file` (.onnx)."""
    _module("onnx")
    axes = {name: {0: "rows", 1: "tokens"} for name in inputs}
    with tracing(model):
        torch.onnx.export(
            Traced(model, inputs),
            example(inputs),
            str(file),
            input_names=list(inputs),
            output_names=["output"],
            dynamic_axes={**axes, "output": {0: "rows", 1: "tokens"}},
            opset_version=OPSET,
            dynamo=False,
        )


def quantized(source: Path, file: Path, samples: Sequence[Mapping[str, Array]], scheme: str) -> None:
    """Write the export `source` as int8 to `file`. samples: features of one row each, for static scales.

    onnxruntime's dynamic scales are those of all that runs together, so that the self-check lets rows run one at a time.
    """
    tools = _module("onnxruntime.quantization")
    common = {"per_channel": True, "weight_type": tools.QuantType.QInt8}
    with _quiet():
        if scheme == "dynamic":
            tools.quantize_dynamic(str(source), str(file), **common)
            return
        tools.quantize_static(
            str(source),
            str(file),
            _Samples(samples),
            quant_format=tools.QuantFormat.QDQ,
            activation_type=tools.QuantType.QUInt8,
            op_types_to_quantize=["MatMul", "Gemm"],
            **common,
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without onnxruntime's advice on the root logger to pre-process the model."""
    root = logging.getLogger()
    root.addFilter(_is_no_advice)
    try:
        yield
    finally:
        root.removeFilter(_is_no_advice)


def _is_no_advice(record: logging.LogRecord) -> bool:
    return "pre-process" not in record.getMessage()


class _Samples:
    """Samples as onnxruntime's calibration reads them."""

    def __init__(self, samples: Sequence[Mapping[str, Array]]) -> None:
        self._left: Iterator[Mapping[str, Array]] = iter(samples)

    def get_next(self) -> dict[str, Array] | None:
        found = next(self._left, None)
        return None if found is None else dict(found)


class Opened:
    """See :class:`memsafe.models.runtimes.session.Session`. Without an arena: what a forward takes, it gives back."""

    survives_fork = True  # it computes in the calling thread
    fuses_attention = False

    def __init__(self, file: Path, *, dtype: str, cores: int) -> None:
        onnxruntime = _module("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1  # micro-batches run side by side instead
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        options.log_severity_level = 3
        self.dtype = dtype
        self.weights_bytes = sum(each.stat().st_size for each in (file, *file.parent.glob(f"{file.name}*data")))
        self.told = f"ONNX Runtime {onnxruntime.__version__}"
        self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self.inputs = tuple(each.name for each in self._session.get_inputs())
        outputs = self._session.get_outputs()
        self._output = outputs[wanted_output([(each.name, len(each.shape)) for each in outputs])].name

    def run(self, features: Mapping[str, Array]) -> Array:
        return np.asarray(self._session.run([self._output], dict(features))[0], dtype=np.float32)

    def release(self) -> None:
        return

    def close(self) -> None:
        return

"""OpenVINO on a CPU: made from a transformers model, made int8, opened, run. Needs the extra ``openvino``."""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memsafe.errors import MissingExtraError
from memsafe.models.runtimes.traced import Traced, example, tracing, wanted_output

__all__ = ["Opened", "export", "quantized", "versions"]

Array = NDArray[Any]
GROUP = 128
"""Numbers of a token that share a scale. MiniLM: 32 gives a cosine of 0.9993 to float32 in the median, 128 0.9989 and a tenth more
speed."""
_HINTS = {"float32": "f32", "int8": "f32", "bfloat16": "bf16", "float16": "f16"}


def _module(name: str = "openvino") -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError(
            f'engine="openvino" needs {name}, which is not installed; run: pip install "memsafe[openvino]"', name=name
        ) from error


def versions(dtype: str) -> dict[str, str]:
    """Versions of what makes and runs exports. Raises :class:`MissingExtraError`."""
    names = ("openvino", "nncf") if dtype == "int8" else ("openvino",)
    return {name: str(_module(name).__version__) for name in names}


def export(model: Any, inputs: Sequence[str], file: Path) -> None:
    """Write `model`, a transformers model, with rows and lengths left open, as `file` (.xml) and what belongs to it."""
    openvino = _module()
    with tracing(model):
        found = openvino.convert_model(Traced(model, inputs), example_input=example(inputs))
    open_shape = openvino.PartialShape([-1, -1])
    found.reshape(dict.fromkeys(found.inputs, open_shape))
    for each, name in zip(found.inputs, inputs, strict=True):
        each.get_tensor().set_names({name})
    for each in found.outputs:
        each.get_tensor().set_names({"output"})
    openvino.save_model(found, str(file), compress_to_fp16=False)


def quantized(source: Path, file: Path, samples: Sequence[Mapping[str, Array]], scheme: str) -> None:
    """Write the export `source` as int8 to `file`. samples: features of one row each, for static scales."""
    openvino, nncf = _module(), _module("nncf")
    nncf.set_log_level(logging.ERROR)
    model = openvino.Core().read_model(str(source))
    if scheme == "static":
        data = nncf.Dataset([dict(each) for each in samples])
        made = nncf.quantize(model, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(samples))
    else:
        made = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
    openvino.save_model(made, str(file), compress_to_fp16=False)


class Opened:
    """See :class:`memsafe.models.runtimes.session.Session`. Requests hold the memory of their largest micro-batch until
    :meth:`release`; there are as many as threads that ever ran at once."""

    survives_fork = False
    fuses_attention = True

    def __init__(self, file: Path, *, dtype: str, cores: int) -> None:
        openvino = _module()
        self.dtype = dtype
        self.weights_bytes = file.with_suffix(".bin").stat().st_size
        self.told = f"OpenVINO {openvino.__version__.split('-')[0]}"
        settings = {
            "NUM_STREAMS": cores,  # one core each: micro-batches side by side are faster than one on all
            "INFERENCE_NUM_THREADS": cores,
            "ENABLE_CPU_PINNING": False,  # neighbours, and other containers, have the same first cores
            "INFERENCE_PRECISION_HINT": _HINTS[dtype],
        }
        if dtype == "int8":  # scales of a token's numbers by groups; what has static scales takes no notice
            settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = GROUP
        self._compiled = openvino.Core().compile_model(str(file), "CPU", settings)
        self.inputs = tuple(each.any_name for each in self._compiled.inputs)
        names = [next(iter(sorted(each.get_names())), "") for each in self._compiled.outputs]
        ranks = [len(each.partial_shape) for each in self._compiled.outputs]
        self._output = wanted_output(list(zip(names, ranks, strict=True)))
        self._idle: list[Any] = []  # whose append and pop are each one step
        self._warm_up(cores)

    def _warm_up(self, cores: int) -> None:
        """One small forward on each core: what the first one makes for good is not to count as that of a micro-batch."""
        requests = [self._compiled.create_infer_request() for _ in range(cores)]
        for request in requests:
            request.start_async({name: np.ones((1, 8), np.int64) for name in self.inputs})
        for request in requests:
            request.wait()

    def run(self, features: Mapping[str, Array]) -> Array:
        try:
            request = self._idle.pop()
        except IndexError:
            request = self._compiled.create_infer_request()
        try:
            request.infer(dict(features), share_inputs=True)
            return np.array(request.get_output_tensor(self._output).data, dtype=np.float32)
        finally:
            self._idle.append(request)

    def release(self) -> None:
        self._idle.clear()
        with contextlib.suppress(RuntimeError):  # something runs: it holds what it needs, and may keep it
            self._compiled.release_memory()

    def close(self) -> None:
        self.release()

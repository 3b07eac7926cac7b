"""What `dtype="auto"` chooses, by what the processor computes in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from memsafe.models.loading import DTYPES, _dtype_name
from memsafe.runtimes import DTYPES as RUNTIME_DTYPES


@pytest.mark.parametrize(
    ("native", "torch", "openvino", "onnx"),
    [
        ((), "float32", "float32", "float32"),
        (("float16",), "float16", "float16", "float32"),
        (("bfloat16",), "bfloat16", "bfloat16", "float32"),
        (("bfloat16", "float16"), "bfloat16", "bfloat16", "float32"),
    ],
)
def test_auto_is_half_precision_only_where_it_is_native(native: Any, torch: str, openvino: str, onnx: str) -> None:
    """Never emulated, never a dtype that the engine lacks, and never int8, which is asked for by name."""
    device: Any = SimpleNamespace(name="cpu", supports=lambda dtype: dtype in native)
    found = [
        _dtype_name("auto", device, known) for known in (DTYPES, RUNTIME_DTYPES["openvino"], RUNTIME_DTYPES["onnx"])
    ]
    assert found == [torch, openvino, onnx]

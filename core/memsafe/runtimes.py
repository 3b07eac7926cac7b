"""Which engine computes, and what int8 may cost: the words of ``engine=`` and ``quantization=``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from memsafe.errors import ConfigError

__all__ = ["ENGINES", "Quantization", "check_engine", "int8_instructions"]

ENGINES = ("torch", "openvino", "onnx")
"""torch runs a model as it is. OpenVINO and ONNX Runtime (extras ``openvino`` and ``onnx``) run an export of it, on a CPU."""

DTYPES = {"openvino": ("float32", "bfloat16", "float16", "int8"), "onnx": ("float32", "int8")}


_INT8 = (
    (("amx_int8",), "AMX", "int8 is much faster than float32"),
    (("avx512_vnni", "avx_vnni"), "VNNI", "int8 is faster than float32"),
    (("i8mm", "asimddp"), "dot products", "int8 is faster than float32"),
    (("avx2", "avx512f"), "AVX without VNNI", "int8 saves memory, and little time"),
)


def int8_instructions(features: Collection[str]) -> tuple[str, str]:
    """What multiplies int8 on a processor with these `features`, in the words of /proc/cpuinfo; and what that means."""
    for names, told, means in _INT8:
        if any(name in features for name in names):
            return told, means
    return "unknown instructions", "whether int8 is faster than float32 must be tried"


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How a model becomes int8 (``dtype="int8"``), and what that may cost.

    Raises :class:`ConfigError` for values out of range.
    """

    scheme: Literal["auto", "static", "dynamic"] = "auto"
    """What activations are rounded by: ``"static"`` scales, found from `texts`, or the scales of each token by itself
    (``"dynamic"``). Neither looks at other rows. Weights have a scale for each output channel. ``"auto"``: ``"dynamic"``."""

    least_agreement: float = 0.98
    """The model must agree so well with itself in float32, or it runs in torch's float32 instead, with a warning. Of embeddings
    the median cosine over `texts`, of one score a pair the correlation over pairs of them. 0: whatever comes of it."""

    texts: tuple[str, ...] = ()
    """What scales are found from and agreement is measured on; some like those that will come are best. The
    first 64 are read, of large models fewer, 16 at least. (): passages of documentation, in English."""

    def __post_init__(self) -> None:
        if self.scheme not in ("auto", "static", "dynamic"):
            raise ConfigError(f"quantization: scheme is {self.scheme!r}; choose from 'auto', 'static', 'dynamic'")
        least = self.least_agreement
        if isinstance(least, bool) or not isinstance(least, (int, float)) or not 0 <= least <= 1:
            raise ConfigError(f"quantization: least_agreement is {least!r}; give a number from 0 to 1")
        if isinstance(self.texts, str) or not all(isinstance(text, str) for text in self.texts):
            raise ConfigError("quantization: texts must be a list of str")
        object.__setattr__(self, "texts", tuple(self.texts))

    @classmethod
    def of(cls, given: Any) -> Quantization:
        """`given` as it may be handed in: None for the defaults, a dict of fields, or a Quantization."""
        if given is None:
            return cls()
        if isinstance(given, cls):
            return given
        if not isinstance(given, Mapping):
            raise ConfigError(
                f"quantization: got a {type(given).__name__}; give a memsafe.Quantization, or a dict of its fields"
            )
        names = [field.name for field in fields(cls)]
        for name in given:
            if name not in names:
                raise ConfigError(f"quantization: unknown field {name!r}; choose from {', '.join(names)}")
        return cls(**given)


def check_engine(engine: Any, *, dtype: Any, device: Any, options: Mapping[str, Any]) -> list[Any]:
    """The devices that `engine` computes on, as they are to be opened. dtype, device, options: as they were handed in.

    Raises :class:`ConfigError` for an engine that is unknown, or what it does not do.
    """
    devices = list(device) if isinstance(device, (list, tuple)) else [device]
    name = str(dtype).removeprefix("torch.")
    if engine not in ENGINES:
        raise ConfigError(f"engine: got {engine!r}; choose from {', '.join(map(repr, ENGINES))}")
    if engine == "torch":
        if name == "int8":
            raise ConfigError("dtype: torch has no int8 here; give engine='openvino' or engine='onnx' with it")
        return devices
    if options.get("backend") not in (None, "torch"):
        raise ConfigError(
            f"engine={engine!r} is memsafe's own way to run an export, backend={options['backend']!r} is "
            "sentence-transformers'; give one of them"
        )
    if dtype is not None and name != "auto" and name not in DTYPES[engine]:
        raise ConfigError(
            f"dtype: engine={engine!r} has no {name!r}; choose from None, 'auto', {', '.join(map(repr, DTYPES[engine]))}"
        )
    wrong = [each for each in devices if each is not None and str(each).split(":")[0] != "cpu"]
    if wrong or len(devices) > 1:
        raise ConfigError(
            f"device: engine={engine!r} runs on the CPU, once, but got {device!r}; leave it out, or give 'cpu'"
        )
    return ["cpu"]

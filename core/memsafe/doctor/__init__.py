"""What this machine offers, what limits it, and what is known to go wrong on it: :func:`examine`; :func:`compare` two machines.

Nothing secret is looked at: no environment beyond the few settings in :data:`SETTINGS`, no paths, no arguments of processes.
"""

from __future__ import annotations

import importlib
import os
import platform
from dataclasses import asdict, dataclass
from typing import Any

from memsafe.config import MemoryPolicy, format_bytes
from memsafe.doctor.comparing import Difference, compare
from memsafe.doctor.findings import Finding, findings_of
from memsafe.runtimes import int8_instructions

__all__ = ["SETTINGS", "Difference", "Examination", "Finding", "compare", "examine", "findings_of"]

SETTINGS = (
    "CUDA_VISIBLE_DEVICES",
    "HF_HUB_OFFLINE",
    "LRU_CACHE_CAPACITY",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_MPS_HIGH_WATERMARK_RATIO",
    "TOKENIZERS_PARALLELISM",
)
"""Environment variables that memory and speed depend on; their values are numbers and names of options."""
_PACKAGES = (
    "memsafe", "torch", "transformers", "sentence-transformers", "tokenizers", "safetensors", "numpy", "llama-index-core",
    "langchain-core", "flash-attn", "accelerate", "peft", "openvino", "nncf", "onnx", "onnxruntime",
)  # fmt: skip
_DTYPES = ("float32", "float16", "bfloat16")
_FEATURES = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "asimdhp", "asimddp", "i8mm", "bf16",
)  # fmt: skip


@dataclass(frozen=True)
class Examination:
    """A machine as memsafe sees it; plain values throughout. ``print`` it, or :meth:`to_dict` for JSON and :func:`compare`."""

    versions: dict[str, str]
    system: dict[str, Any]
    memory: dict[str, Any]
    cpu: dict[str, Any]
    devices: list[dict[str, Any]]
    allocator: dict[str, Any]
    settings: dict[str, str]
    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = ["Versions", *(f"  {name:<23} {value}" for name, value in self.versions.items())]
        lines += ["System", *(f"  {name:<23} {value}" for name, value in self.system.items() if value != "")]
        memory = self.memory
        lines += [
            "Main memory",
            f"  free of total           {_of(memory['free_bytes'])} of {_of(memory['total_bytes'])}",
        ]
        lines += [f"  limit                   {_of(size)} ({name})" for name, size in memory["limits"].items()]
        lines += ["Processor", *(f"  {name:<23} {_words(value)}" for name, value in self.cpu.items())]
        for device in self.devices:
            lines.append(f"Device {device['name']}: {device.get('card', device['kind'])}")
            lines.append(f"  free of total           {_of(device['free_bytes'])} of {_of(device['total_bytes'])}")
            lines += [
                f"  {name:<23} {_words(value)}"
                for name, value in device.items()
                if name in ("capability", "driver", "dtypes", "holders unknown")
            ]
            lines += [f"  {name:<30} {value}" for name, value in device.get("kernels", {}).items()]
            for holder in device.get("held_by", ()):
                who = f"{holder['program'] or 'a process'} ({holder['pid']}){', this one' if holder['ours'] else ''}"
                lines.append(f"  held by                 {who}: {_of(holder['used_bytes'])}")
        lines += [
            "Allocator",
            f"  in force                {self.allocator['in_force']} ({self.allocator['status']}: {self.allocator['note']})",
        ]
        lines += (
            ["Settings", *(f"  {name:<23} {value}" for name, value in self.settings.items())] if self.settings else []
        )
        lines += ["Findings", *(f"  {found.level}: {found.text}" for found in self.findings)] if self.findings else []
        return "\n".join(lines if self.findings else [*lines, "Findings", "  none: nothing known to go wrong here"])


def examine() -> Examination:
    """Look at this machine. Takes a second or two: torch is imported, and each CUDA device's context is opened for its free
    memory. Allocator settings are put in force first, as loading a model would."""
    from memsafe.machine import allocator

    given = {name: os.environ[name] for name in SETTINGS if name in os.environ}
    state = allocator.configure(MemoryPolicy().alloc_conf)
    from memsafe.machine.device import open_device

    host = open_device("cpu")
    snapshot = host.snapshot()
    memory = {
        "free_bytes": snapshot.free_bytes,
        "total_bytes": snapshot.total_bytes,
        "limits": dict(host.host_limits()),
    }
    versions = _versions()
    devices, why = _devices()
    system = {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "container": os.path.exists("/.dockerenv") or os.path.exists("/run/.containerenv"),
        "wsl": "microsoft" in platform.release().lower(),
        "cards without torch": why,
    }
    allocated = asdict(state)
    cpu = _cpu(host)
    found = findings_of(versions=versions, system=system, memory=memory, cpu=cpu, devices=devices, allocator=allocated)
    return Examination(versions, system, memory, cpu, devices, allocated, given, tuple(found))


def _versions() -> dict[str, str]:
    metadata = importlib.import_module("importlib.metadata")
    found: dict[str, str] = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    torch = importlib.import_module("torch")
    for name, value in (("cuda of torch", torch.version.cuda), ("hip of torch", torch.version.hip)):
        found |= {name: str(value)} if value else {}
    return found


def _cpu(host: Any) -> dict[str, Any]:
    torch = importlib.import_module("torch")
    products = importlib.import_module("memsafe.models.products")
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    features = host.cpu_features()
    return {
        "cores of the machine": os.cpu_count() or 1,
        "cores by affinity": affinity,
        "cores to use": host.num_cores,  # by affinity and CPU quota
        "torch threads": torch.get_num_threads(),
        "features": [name for name in _FEATURES if name in features],
        "dtypes": [name for name in _DTYPES if host.supports(name)],
        "float32": "oneDNN, since MKL does not use this processor's AVX-512"
        if products.pays()
        else "as torch multiplies it",
        "int8": ": ".join(int8_instructions(features)),
    }


def _devices() -> tuple[list[dict[str, Any]], str]:
    """Accelerators that torch sees; and why cards that the driver sees are none of them, or ""."""
    from memsafe.attention import kernels
    from memsafe.machine import nvml
    from memsafe.machine.device import open_device

    torch = importlib.import_module("torch")
    cards, unknown = nvml.cards()
    found: list[dict[str, Any]] = []
    for kind in ("cuda", "xpu", "mps"):
        module: Any = getattr(torch, kind, None)
        there = torch.backends.mps.is_available() if kind == "mps" else module is not None and module.is_available()
        for index in range((1 if kind == "mps" else module.device_count()) if there else 0):
            device = open_device(kind if kind == "mps" else f"{kind}:{index}")
            snapshot = device.snapshot()
            facts: dict[str, Any] = {
                "name": device.name,
                "kind": kind,
                "free_bytes": snapshot.free_bytes,
                "total_bytes": snapshot.total_bytes,
                "reserved_bytes": snapshot.reserved_bytes,
                "dtypes": [name for name in _DTYPES if device.supports(name)],
            }
            if kind == "cuda":
                capability = torch.cuda.get_device_capability(index)
                facts |= {"card": torch.cuda.get_device_name(index), "capability": list(capability)}
                facts["kernels"] = kernels.offered(capability)
                uuid = str(getattr(torch.cuda.get_device_properties(index), "uuid", ""))
                card = next((each for each in cards if uuid and uuid in each.uuid), None)
                if card is not None:
                    facts |= {"driver": card.driver, "held_by": [asdict(holder) for holder in card.holders]}
                else:
                    facts["holders unknown"] = unknown or "NVIDIA's library lists no card with this one's identifier"
            found.append(facts)
    why = ""
    if cards and not any(facts["kind"] == "cuda" for facts in found):
        names = ", ".join(sorted({card.name for card in cards}))
        why = f"the driver sees {names}, but torch {torch.__version__} does not: install torch's CUDA build, or look at CUDA_VISIBLE_DEVICES"
    return found, why


def _of(size: Any) -> str:
    return "unknown" if size is None else format_bytes(size)


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)

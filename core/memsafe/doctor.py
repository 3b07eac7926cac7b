"""What this machine offers, what limits it, and what is known to go wrong on it: :func:`examine`; :func:`compare` two machines.

Nothing secret is looked at: no environment beyond the few settings in :data:`SETTINGS`, no paths, no arguments of processes.
"""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from memsafe.config import MemoryPolicy, format_bytes

__all__ = ["SETTINGS", "Difference", "Examination", "Finding", "compare", "examine", "findings_of"]

SETTINGS = (
    "CUDA_VISIBLE_DEVICES",
    "HF_HUB_OFFLINE",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_MPS_HIGH_WATERMARK_RATIO",
    "TOKENIZERS_PARALLELISM",
)
"""Environment variables that memory and speed depend on; their values are numbers and names of options."""
_PACKAGES = (
    "memsafe", "torch", "transformers", "sentence-transformers", "tokenizers", "safetensors", "numpy", "llama-index-core",
    "langchain-core", "flash-attn", "accelerate", "peft",
)  # fmt: skip
_DTYPES = ("float32", "float16", "bfloat16")
_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "asimdhp", "bf16")
_PASSING = (
    "free_bytes",
    "allocated_bytes",
    "reserved_bytes",
    "used_bytes",
    "held_by",
    "findings",
    "pid",
    "resident_bytes",
)
"""What differs from one minute to the next: never a difference between machines."""


@dataclass(frozen=True)
class Finding:
    """Something worth knowing. level: "problem", "warning" or "note". Each says what is so, why it matters and what to do."""

    level: str
    text: str


@dataclass(frozen=True)
class Difference:
    """One place where two examinations differ. where: names joined by dots. matters: why it can change what runs; "" if hardly."""

    where: str
    one: Any
    other: Any
    matters: str


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
                if name in ("capability", "driver", "dtypes", "computed in emulation")
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


def compare(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[Difference]:
    """Where two examinations (:meth:`Examination.to_dict`) differ, what matters first; what changes by the minute is left out."""
    found = [
        Difference(where, a, b, _why(where))
        for where, a, b in _differences("", one, other)
        if not any(part in _PASSING for part in where.split("."))
    ]
    return sorted(found, key=lambda difference: not difference.matters)


def findings_of(
    *,
    versions: Mapping[str, str],
    system: Mapping[str, Any],
    memory: Mapping[str, Any],
    cpu: Mapping[str, Any],
    devices: Sequence[Mapping[str, Any]],
    allocator: Mapping[str, Any],
) -> list[Finding]:
    """What is known to go wrong with these facts, worst first. Pure: tests hand in machines that are not there."""
    found: list[Finding] = []
    if _older(versions.get("transformers"), (5, 0)):
        found.append(
            Finding("warning", "transformers before 5: BERT, RoBERTa and XLM-R run padded; upgrade for packed forwards")
        )
    if system.get("cards without torch"):
        found.append(Finding("problem", str(system["cards without torch"])))
    if system.get("wsl"):
        found.append(
            Finding("note", "WSL: expandable_segments is left out of the allocator's settings, since it can fail there")
        )
    if str(system.get("platform", "")).startswith("Windows"):
        text = "Windows: drivers from 536.40 on swap to main memory instead of refusing, which is very slow; set "
        found.append(Finding("warning", text + "'Prefer No Sysmem Fallback' in NVIDIA's control panel"))
    if cpu["torch threads"] > cpu["cores to use"]:
        text = f"torch would use {cpu['torch threads']} threads on {cpu['cores to use']} cores (affinity or CPU quota): they wait for "
        found.append(
            Finding(
                "warning",
                text
                + f"each other. memsafe sets its own lanes; other code needs OMP_NUM_THREADS={cpu['cores to use']}",
            )
        )
    binding = [(name, size) for name, size in memory["limits"].items() if size < 2 << 30]
    for name, size in binding[:1]:
        text = (
            f"main memory is limited to {format_bytes(size)} ({name}): at the limit the kernel kills without an error"
        )
        found.append(
            Finding("warning", text + "; memsafe reads it, MemoryPolicy(strict_heap=True) makes it predictable")
        )
    for device in devices:
        found += _findings_of_device(device)
    if allocator["status"] in ("user", "late") and "expandable_segments:True" not in str(allocator["in_force"]):
        found.append(
            Finding(
                "warning",
                f"allocator: expandable_segments is not in force ({allocator['note']}); fragmentation may cost gigabytes",
            )
        )
    return sorted(found, key=lambda finding: ("problem", "warning", "note").index(finding.level))


def _findings_of_device(device: Mapping[str, Any]) -> list[Finding]:
    found: list[Finding] = []
    name = device["name"]
    capability = tuple(device.get("capability") or ())
    if capability and capability < (8, 0):
        text = f"{name} (compute capability {capability[0]}.{capability[1]}, as a T4's 7.5) has no flash and no cuDNN attention and no "
        text += "bfloat16: use float16 or float32; in bfloat16 attention falls to a kernel that holds all scores"
        found.append(Finding("warning", text))
    others = [holder for holder in device.get("held_by", ()) if not holder["ours"]]
    held = device["total_bytes"] - device["free_bytes"] - device.get("reserved_bytes", 0)
    if device["kind"] == "cuda" and held > device["total_bytes"] // 4:
        who = (
            ", ".join(sorted({holder["program"] or "a process of another container" for holder in others}))
            or "who, the driver does not say"
        )
        found.append(
            Finding(
                "warning",
                f"{name}: {format_bytes(held)} of {format_bytes(device['total_bytes'])} are held by others ({who})",
            )
        )
    kernels = device.get("kernels", {})
    if capability >= (8, 0) and not str(kernels.get("packed flash (varlen_attn)", "yes")).startswith("yes"):
        found.append(
            Finding(
                "note",
                f"{name}: {kernels['packed flash (varlen_attn)'][4:]}; half precision runs on memory-efficient attention",
            )
        )
    return found


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
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    features = host.cpu_features()
    return {
        "cores of the machine": os.cpu_count() or 1,
        "cores by affinity": affinity,
        "cores to use": host.num_cores,  # by affinity and CPU quota
        "torch threads": torch.get_num_threads(),
        "features": [name for name in _FEATURES if name in features],
        "dtypes": [name for name in _DTYPES if host.supports(name)],
    }


def _devices() -> tuple[list[dict[str, Any]], str]:
    """Accelerators that torch sees; and why cards that the driver sees are none of them, or ""."""
    from memsafe.attention import kernels
    from memsafe.machine import nvml
    from memsafe.machine.device import open_device

    torch = importlib.import_module("torch")
    cards, _ = nvml.cards()
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
            found.append(facts)
    why = ""
    if cards and not any(facts["kind"] == "cuda" for facts in found):
        names = ", ".join(sorted({card.name for card in cards}))
        why = f"the driver sees {names}, but torch {torch.__version__} does not: install torch's CUDA build, or look at CUDA_VISIBLE_DEVICES"
    return found, why


def _older(version: str | None, least: tuple[int, int]) -> bool:
    if version is None:
        return False
    numbers = [int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit()]
    return tuple(numbers) < least


def _differences(where: str, one: Any, other: Any) -> list[tuple[str, Any, Any]]:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        names = list(dict.fromkeys([*one, *other]))
        return [
            found
            for name in names
            for found in _differences(f"{where}.{name}" if where else str(name), one.get(name), other.get(name))
        ]
    if isinstance(one, list) and isinstance(other, list) and any(isinstance(each, Mapping) for each in (*one, *other)):
        longest = max(len(one), len(other))
        pairs = [(each[i] if i < len(each) else None for each in (one, other)) for i in range(longest)]
        return [found for i, (a, b) in enumerate(pairs) for found in _differences(f"{where}.{i}", a, b)]
    plain = [list(each) if isinstance(each, tuple) else each for each in (one, other)]
    return [] if plain[0] == plain[1] else [(where, one, other)]


_MATTERS = {
    "versions.torch": "kernels and allocator",
    "versions.transformers": "attention and which models run packed",
    "versions.sentence-transformers": "prompts and pooling",
    "versions.tokenizers": "token ids",
    "memory.total_bytes": "how much fits",
    "memory.limits": "how much fits, and who kills",
    "cpu.cores to use": "speed",
    "cpu.dtypes": "dtype='auto' chooses by it",
    "devices": "how much fits, which kernels and dtypes there are",
    "allocator.in_force": "fragmentation",
    "settings": "what torch and tokenizers do",
}


def _why(where: str) -> str:
    return next((why for place, why in _MATTERS.items() if where == place or where.startswith(f"{place}.")), "")


def _of(size: Any) -> str:
    return "unknown" if size is None else format_bytes(size)


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)

"""What is known to go wrong, from facts alone: machines that are not there can be handed in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memsafe.config import format_bytes

__all__ = ["Finding", "findings_of"]


@dataclass(frozen=True)
class Finding:
    """Something worth knowing. level: "problem", "warning" or "note". Each says what is so, why it matters and what to do."""

    level: str
    text: str


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
        unknown = f": {device['holders unknown']}" if device.get("holders unknown") else ""
        who = (
            ", ".join(sorted({holder["program"] or "a process of another container" for holder in others}))
            or f"who, the driver does not say{unknown}"
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


def _older(version: str | None, least: tuple[int, int]) -> bool:
    if version is None:
        return False
    numbers = [int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit()]
    return tuple(numbers) < least

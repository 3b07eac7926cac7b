"""Whether an error means that memory ran out: of a device, or of the machine."""

from __future__ import annotations

import errno
import re

import torch

from memsafe.errors import MemsafeError

__all__ = ["is_out_of_memory"]

# Wordings of "out of memory" that arrive as plain RuntimeErrors. Each is as narrow as its recorded examples allow
# (tests/machine/test_refusals.py), because everything that matches is retried rather than shown to the user.
_MESSAGES = (
    # torch's allocators, at the start of a message or of a line (TorchScript and DataParallel quote the inner error)
    r"^(?:[\w.]*(?:Error|Exception): )*(?:CUDA|HIP|XPU|NPU|MPS backend) out of memory",
    r"(?:CUDA|HIP) (?:driver )?error: out of memory",
    r"cuda runtime error \(2\) ?: out of memory",
    r"Triton Error \[(?:CUDA|HIP)\]: out of memory",
    # expandable segments under pressure: mapping memory fails in the driver, and the allocator trips over the rest
    r"CUDA driver error: device not ready",
    r"!handles_\.at\(i\)\s*INTERNAL ASSERT FAILED",
    # the allocator's message needs NVML, which fails in containers and on Jetson: only reached when memory is out
    r"NVML_SUCCESS == \S+\s*INTERNAL ASSERT FAILED at \"\S*CUDACachingAllocator\.cpp\"",
    # libraries that allocate their own workspaces or handles
    r"\b(?:CU(?:BLAS|DNN|SOLVER|SPARSE)|HIP(?:BLAS|SPARSE|SOLVER))_STATUS_ALLOC_FAILED\b",
    r"\bCUDNN_STATUS_INTERNAL_ERROR_(?:HOST|DEVICE)_ALLOCATION_FAILED\b",  # cuDNN 9
    r"\bCUFFT_ALLOC_FAILED\b",
    r"\bCUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate",
    r"\b(?:UR_RESULT|PI)_ERROR_OUT_OF_(?:DEVICE_MEMORY|HOST_MEMORY|RESOURCES)\b",
    r"^(?:[\w.]*(?:Error|Exception): )*Invalid buffer size: [\d.]+ ?(?:bytes|[KMGT]i?B)",
    # host memory
    r"DefaultCPUAllocator: (?:can't allocate memory|not enough memory)",
    r"unable to mmap \d+ bytes .*Cannot allocate memory \(12\)",
    r"\(os error (?:12|1455)\)",
    r"\bstd::bad_alloc\b",
    r"(?:^|: )bad allocation\b",  # the same, from Microsoft's library
    # ONNX Runtime
    r"Failed to allocate memory for requested buffer of size \d+",
    r"Available memory of \d+ is smaller than requested bytes of \d+",
)
_OUT_OF_MEMORY = re.compile("|".join(f"(?:{message})" for message in _MESSAGES), re.MULTILINE)
_WRAPPERS = ("torch.jit", "torch._dynamo", "torch._inductor")
# Windows: not enough memory, out of memory, the paging file is too small.
_WINDOWS_CODES = (8, 14, 1455)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether `error` says that memory of a device or of the machine ran out.

    By type where there is a type, else by the message of a RuntimeError. Other errors are not searched, and causes
    are only looked at behind torch's own wrappers: an error raised while handling an out-of-memory is another error.
    """
    for _ in range(8):  # a chain may be a ring
        if error is None or isinstance(error, MemsafeError):
            return False
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            return True
        if isinstance(error, OSError):
            return error.errno == errno.ENOMEM or getattr(error, "winerror", None) in _WINDOWS_CODES
        place = type(error).__module__
        # ONNX Runtime's and safetensors' errors derive from Exception alone.
        if not isinstance(error, RuntimeError) and not place.startswith(("onnxruntime", "safetensors")):
            return False
        message = str(error)
        if _OUT_OF_MEMORY.search(message):
            return True
        if not place.startswith(_WRAPPERS) and "failed in the TorchScript interpreter" not in message:
            return False
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False

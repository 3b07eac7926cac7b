"""machine/refusals.py: recorded messages that mean "out of memory", and recorded ones that do not."""

from __future__ import annotations

import errno
import warnings
from typing import NoReturn

import numpy as np
import pytest
import torch

from memsafe.errors import BusyError, ClosedError, InputError, InputTooLargeError
from memsafe.machine.refusals import is_out_of_memory

ACCELERATOR_ERROR: type[RuntimeError] = getattr(torch, "AcceleratorError", RuntimeError)  # torch >= 2.8

# Messages as torch 1.13 to 2.14 and its neighbours wrote them; where from, in the id or beside it.
RECORDED = {
    "cuda-allocator": "CUDA out of memory. Tried to allocate 1.49 GiB. GPU 0 has a total capacity of 14.58 GiB of which 597.62 "
    "MiB is free. Process 1 has 0 bytes memory in use. Of the allocated memory 3.94 GiB is allocated by PyTorch, and "
    "953.76 MiB is reserved by PyTorch but unallocated.",  # infinity#370
    "hip-allocator": "HIP out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.98 GiB",
    "xpu-allocator": "XPU out of memory. Tried to allocate 512.00 MiB. GPU 0 has a total capacity of 16.50 GiB.",
    "cuda-runtime": "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call, "
    "so the stacktrace below might be incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\n",
    "hip-runtime": "HIP error: out of memory\nHIP kernel errors might be asynchronously reported at some other API call",
    "cuda-runtime-old": "cuda runtime error (2) : out of memory at /pytorch/aten/src/THC/THCGeneral.cpp:405",
    "cuda-driver": "CUDA driver error: out of memory",
    "cuda-driver-not-ready": "CUDA driver error: device not ready",  # torch-max-mem#45
    "handles": '!handles_.at(i) INTERNAL ASSERT FAILED at "/pytorch/c10/cuda/CUDACachingAllocator.cpp":430, please report a '
    "bug to PyTorch. ",  # torch-max-mem#45
    "nvml": 'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "../c10/cuda/CUDACachingAllocator.cpp":838, please report a bug to '
    "PyTorch. ",  # pytorch#112377, #157535, #185240
    "nvml-init": "NVML_SUCCESS == DriverAPI::get()->nvmlInit_v2_() INTERNAL ASSERT FAILED at "
    '"../c10/cuda/CUDACachingAllocator.cpp":1123, please report a bug to PyTorch.',  # pytorch#112950
    "cublas-alloc": "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cublas-create": "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "cublas-gemm": "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasGemmEx( handle, opa, opb, m, n, k)`",
    "hipblas": "CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`",
    "cusolver": "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
    "cudnn": "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cudnn-9": "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "cufft": "cuFFT error: CUFFT_ALLOC_FAILED",
    "triton": "Triton Error [CUDA]: out of memory",
    "xpu-driver": "Native API failed. Native API returns: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)",
    "xpu-driver-old": "Native API failed. Native API returns: -5 (PI_ERROR_OUT_OF_RESOURCES) -5 (PI_ERROR_OUT_OF_RESOURCES)",
    "xpu-resources": "UR backend failed. UR backend returns:40 (UR_RESULT_ERROR_OUT_OF_RESOURCES)",
    "mps": "MPS backend out of memory (MPS allocated: 17.86 GB, other allocations: 218.91 MB, max allowed: 18.13 GB). Tried "
    "to allocate 256.00 MB on private pool. Use PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0 to disable upper limit for memory "
    "allocations (may cause system failure).",
    "mps-buffer": "Invalid buffer size: 19.45 GB",  # pytorch#141909
    "mps-buffer-2": "Invalid buffer size: 14.17 GiB",
    "cpu-linux": "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 281474976710656 bytes. Error code 12 (Cannot allocate memory)",
    "cpu-windows": "[enforce fail at ..\\c10\\core\\impl\\alloc_cpu.cpp:72] data. DefaultCPUAllocator: not enough memory: you "
    "tried to allocate 1048576000 bytes.",
    "cpu-mmap": "unable to mmap 17179869184 bytes from file </models/m.bin>: Cannot allocate memory (12)",
    "rust": "Error while deserializing: I/O error: Cannot allocate memory (os error 12)",
    "c++": "std::bad_alloc",
    "c++-microsoft": "bad allocation",
    "torchscript": "The following operation failed in the TorchScript interpreter.\nTraceback of TorchScript (most recent call "
    'last):\n  File "softmax.py", line 16, in scatter_softmax\n    x = scatter_max(src, index, dim=dim)[0]\n        '
    "~~~~~~~~~~~ <--- HERE\nRuntimeError: CUDA out of memory. Tried to allocate 2.37 GiB (GPU 0; 10.76 GiB total "
    "capacity)\n",  # pytorch#148642
    "data-parallel": "Caught OutOfMemoryError in replica 1 on device 1.\nOriginal Traceback (most recent call last):\n  File "
    '"parallel_apply.py", line 85, in _worker\ntorch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 20 MiB',
    "inductor": "backend='inductor' raised:\nOutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB",
}

ORT = (
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running Gemm node. Name:'/fc1/Gemm' "
    "Status Message: /onnxruntime_src/onnxruntime/core/framework/bfc_arena.cc:376 void* onnxruntime::BFCArena::"
    "AllocateRawInternal(size_t, bool, onnxruntime::Stream*) Failed to allocate memory for requested buffer of size 2830172160"
)  # onnxruntime#20038
ORT_ARENA = (
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : bfc_arena.cc:342 Available memory of 1048576 is smaller than requested "
    "bytes of 4194304"
)

NEAR_MISSES = {
    "shapes": "mat1 and mat2 shapes cannot be multiplied (3x4 and 6x5)",
    "expand": "The size of tensor a (514) must match the size of tensor b (512) at non-singleton dimension 1",
    "overflow": "Storage size calculation overflowed with sizes=[4611686018427387904]",
    "assert": "CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously reported",
    "illegal": "CUDA error: an illegal memory access was encountered",
    "misaligned": "CUDA error: misaligned address",
    "launch": "CUDA error: unspecified launch failure",
    "driver-missing": "Found no NVIDIA driver on your system.",
    "driver-invalid": "CUDA driver error: invalid argument",
    "no-kernel": "CUDA error: no kernel image is available for execution on the device",
    "cublas-execution": "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle, opa, opb, m, n, k)`",
    "cublas-invalid": "CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasGemmEx( handle, opa, opb)`",
    "cublas-not-initialized": "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasSgemm( handle )`",
    "cudnn-supported": "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input.",
    "cudnn-mapping": "cuDNN error: CUDNN_STATUS_MAPPING_ERROR",
    "nccl": "NCCL error in: ../torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:1269, unhandled system error, NCCL version "
    "2.14.3\nncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.",
    "other-assert": 'isDifferentiableType(variable.scalar_type()) INTERNAL ASSERT FAILED at "functions.cpp":149',
    "allocator-assert": '!block->expandable_segment_ INTERNAL ASSERT FAILED at "../c10/cuda/CUDACachingAllocator.cpp":2814',
    "nvml-elsewhere": 'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "../aten/src/ATen/cuda/Nvml.cpp":12',
    "triton-shared": "out of resource: shared memory, Required: 131072, Hardware limit: 101376. Reducing block sizes or "
    "`num_stages` may help.",
    "mps-placeholder": "Placeholder buffer size (14336) is not large enough to contain the Tensor storage of size 114688",
    "shm": "unable to write to file </torch_18_1>: No space left on device (28)",
    "pin": "cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned",
    "worker": "DataLoader worker (pid 1234) is killed by signal: Killed.",
    "talk": "the document 'CUDA out of memory, explained' was rejected by the tokenizer",
    "talk-2": "could not parse: my laptop ran out of memory",
    "cpp-other": "std::bad_cast",
    "torchscript": "The following operation failed in the TorchScript interpreter.\nTraceback of TorchScript (most recent call "
    "last):\n    # CUDA out of memory is handled below\n    ~~~ <--- HERE\nRuntimeError: mat1 and mat2 shapes cannot be "
    "multiplied (3x4 and 6x5)\n",
    "forked": "Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing, you must use 'spawn'",
    "empty": "",
}


@pytest.mark.parametrize("message", RECORDED.values(), ids=RECORDED)
def test_recorded_messages_are_recognised(message: str) -> None:
    """A RuntimeError with a message that means out of memory is one, and so is torch's own subclass of it."""
    assert is_out_of_memory(RuntimeError(message))
    assert is_out_of_memory(ACCELERATOR_ERROR(message))


@pytest.mark.parametrize("message", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_near_misses_are_not(message: str) -> None:
    """Errors of shape, of a broken context, of another library, or that merely talk about memory are left alone."""
    assert not is_out_of_memory(RuntimeError(message))
    assert not is_out_of_memory(ACCELERATOR_ERROR(message))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("anything"),
        torch.cuda.OutOfMemoryError(""),
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=["torch", "torch-cuda", "python", "mmap"],
)
def test_types_that_mean_it_need_no_message(error: BaseException) -> None:
    """torch's type, Python's, and the system's ENOMEM, whatever they say."""
    assert is_out_of_memory(error)


@pytest.mark.parametrize(("code", "means_it"), [(8, True), (14, True), (1455, True), (2, False), (126, False)])
def test_windows_codes(code: int, means_it: bool) -> None:
    """Windows: 1455 is "the paging file is too small", which loading weights raises; 126 is a missing library."""

    class WindowsError(OSError):
        winerror = code

    assert is_out_of_memory(WindowsError("the text is translated into the user's language")) is means_it


@pytest.mark.parametrize(
    "error",
    [
        KeyError("CUDA out of memory"),
        ValueError("CUDA out of memory. Tried to allocate 1 GiB"),
        IndexError("index out of range in self"),
        TypeError("out of memory"),
        OSError(errno.ENOSPC, "No space left on device"),
        ImportError("std::bad_alloc"),
        InputError("input 3 is about CUDA out of memory", index=3),
        InputTooLargeError("input 4 needs 9 GiB alone; CUDA out of memory", index=4),
        InputTooLargeError("CUDA out of memory", index=0, num_tokens=1, need_bytes=2, free_bytes=1),
        BusyError("CUDA out of memory"),
        ClosedError("CUDA out of memory"),
        KeyboardInterrupt(),
        None,
    ],
    ids=lambda error: type(error).__name__,
)
def test_other_types_are_not_searched(error: BaseException | None) -> None:
    """Only RuntimeErrors are judged by their message; our own errors have been judged already."""
    assert not is_out_of_memory(error)


@pytest.mark.parametrize("message", [ORT, ORT_ARENA])
def test_onnx_runtime(message: str) -> None:
    """ONNX Runtime's exceptions derive from Exception alone; a stranger's with the same text is not one of them."""
    theirs = type("RuntimeException", (Exception,), {"__module__": "onnxruntime.capi.onnxruntime_pybind11_state"})
    strangers = type("RuntimeException", (Exception,), {"__module__": "somewhere.else"})
    assert is_out_of_memory(theirs(message))
    assert not is_out_of_memory(strangers(message))
    assert not is_out_of_memory(theirs("[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Unexpected input data type"))


def _chained(outer: BaseException, inner: BaseException, *, explicit: bool) -> BaseException:
    def fail() -> NoReturn:
        try:
            raise inner
        except BaseException as error:
            if explicit:
                raise outer from error
            raise outer  # noqa: B904 - the implicit context is what is tested

    with pytest.raises(type(outer)) as caught:
        fail()
    return caught.value


@pytest.mark.parametrize("explicit", [True, False])
def test_causes_count_behind_wrappers_only(explicit: bool) -> None:
    """A TorchScript or compiler error passes its cause on; any other error raised from an out-of-memory is itself."""
    inner = torch.OutOfMemoryError("CUDA out of memory.")
    script = RuntimeError("The following operation failed in the TorchScript interpreter.\n(no details)")
    compiler = type("BackendCompilerFailed", (RuntimeError,), {"__module__": "torch._dynamo.exc"})("failed")
    assert is_out_of_memory(_chained(script, inner, explicit=explicit))
    assert is_out_of_memory(_chained(compiler, inner, explicit=explicit))
    assert not is_out_of_memory(_chained(RuntimeError("cleaning up failed"), inner, explicit=explicit))
    assert not is_out_of_memory(_chained(ValueError("bad"), inner, explicit=explicit))
    assert not is_out_of_memory(_chained(script, ValueError("shapes"), explicit=explicit))


def test_a_suppressed_context_is_not_followed() -> None:
    """``raise ... from None`` says that what came before does not matter."""
    wrapper = RuntimeError("The following operation failed in the TorchScript interpreter.")
    wrapper.__context__ = MemoryError()
    assert is_out_of_memory(wrapper)
    wrapper.__suppress_context__ = True
    assert not is_out_of_memory(wrapper)


def test_a_ring_of_causes_ends() -> None:
    """A wrapper that is its own cause does not hang."""
    wrapper = RuntimeError("The following operation failed in the TorchScript interpreter.")
    wrapper.__cause__ = wrapper
    assert not is_out_of_memory(wrapper)


def test_what_this_torch_really_raises() -> None:
    """Allocations that cannot succeed, on this machine: torch, a TorchScript function, numpy and Python itself."""
    with pytest.raises(RuntimeError) as eager:
        torch.empty(1 << 46)
    assert is_out_of_memory(eager.value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer torch calls TorchScript deprecated
        script = torch.jit.script(_allocate)
    with pytest.raises(RuntimeError) as scripted:
        script(1 << 46)
    assert is_out_of_memory(scripted.value)
    with pytest.raises(MemoryError) as array:
        np.empty(1 << 46)
    assert is_out_of_memory(array.value)
    with pytest.raises(MemoryError) as python:
        bytearray(1 << 60)
    assert is_out_of_memory(python.value)
    with pytest.raises(RuntimeError) as overflow:
        torch.empty(1 << 62)
    assert not is_out_of_memory(overflow.value)


def _allocate(n: int) -> torch.Tensor:
    return torch.empty([n])

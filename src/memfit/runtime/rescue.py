"""Tells an error that says that memory has run out from every other, and lets go of what it holds.

Note [Forms]
 1. Some errors say it by their type: ``torch.OutOfMemoryError`` (CUDA, HIP and XPU), ``MemoryError`` (Python,
    NumPy, and ``std::bad_alloc`` that came through pybind11), ``OSError`` with ``ENOMEM``.
 2. Others are a ``RuntimeError`` (``torch.AcceleratorError`` and ``DistBackendError`` are ones), and only
    their text says it. Looked for are the texts of the libraries as users report them, each with the
    name of the library or device in it: a user's own error that speaks of memory is not taken for one.
 3. An error raised while another was handled, or from it, counts if the other does.
 4. ``CUBLAS_STATUS_NOT_INITIALIZED`` and ``CUDNN_STATUS_NOT_SUPPORTED``, which other tools count, are not:
    they have other causes as well.
"""

from __future__ import annotations

import errno
import re
import traceback
from collections.abc import Iterator
from typing import Final

import torch

_TEXTS: Final = re.compile(
    "|".join(
        (
            r"\b(?:CUDA|HIP|XPU|NPU|MPS backend|C10) out of memory\b",
            r"\b(?:CUDA|HIP) (?:driver |runtime )?error(?: ?\(\d+\) ?)?: ?out of memory\b",
            r"\bTriton Error \[\w+\]: out of memory\b",
            r"\b(?:CUDA|HIP) failure (?:\d+ )?'out of memory'",  # the last error of NCCL and RCCL
            r"\bFailed to CUDA (?:m|c|host )alloc\b",
            r"\bCUDA_ERROR_OUT_OF_MEMORY\b|\bcudaErrorMemoryAllocation\b|\bhipErrorOutOfMemory\b",
            r"\b(?:CU|HIP)[A-Z]+_(?:STATUS_)?ALLOC_FAILED",  # cuBLAS, cuDNN, cuSOLVER, cuSPARSE, cuFFT
            r"\brocblas_status_memory_error\b|\bmiopenStatusAllocFailed\b",
            r"\bDefaultCPUAllocator: (?:can't allocate|not enough) memory\b",
            r"\bCannot allocate memory \(12\)",  # shared memory that cannot be mapped
            r"\bstd::bad_alloc\b",
            r"\bcould not create a memory(?! desc)\b",  # oneDNN
            r"\bCould not allocate memory (?:for|to change) Tensor SizesAndStrides\b",
        )
    ),
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that led to it, says that memory has run out. See Note [Forms]."""
    return any(_says_so(one) for one in _chain(error))


def let_go_of_frames(error: BaseException) -> None:
    """Empties the frames that an error has passed through: their variables hold the tensors of the step.

    The traceback keeps its lines. Frames that still run are left alone.
    """
    for one in _chain(error):
        traceback.clear_frames(one.__traceback__)


def _says_so(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _TEXTS.search(str(error)) is not None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and those that led to it, each once; ``raise ... from None`` ends the chain."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        one = pending.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            yield one
            pending += [one.__cause__, None if one.__suppress_context__ else one.__context__]

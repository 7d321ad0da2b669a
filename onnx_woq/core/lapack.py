"""Cholesky factor and triangular inverse in place, without Python's lock.

scipy's own wrappers hold the lock while LAPACK works: threads would factorize one after another, and nothing else could
begin meanwhile. The same routines, as scipy offers them to compiled code, are called through ctypes, which does not
(https://docs.scipy.org/doc/scipy/reference/linalg.cython_lapack.html).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray


def cholesky(a: NDArray[Any]) -> bool:
    """Replaces the lower triangle of `a [K, K]` by its Cholesky factor; what is above the diagonal means nothing.

    Args:
        a: float32 or float64, column order, symmetric.

    Returns:
        Whether `a` was positive definite; if not, its content is lost.
    """
    size, status = _int(len(a)), _int(0)
    _routine(f"{_letter(a)}potrf", 5)(b"L", size, _data(a), size, status)
    return status.contents.value == 0


def invert_lower(a: NDArray[Any]) -> bool:
    """Replaces the lower triangle of `a [K, K]` by its inverse; False if it is singular.

    Args:
        a: float32 or float64, column order.
    """
    size, status = _int(len(a)), _int(0)
    _routine(f"{_letter(a)}trtri", 6)(b"L", b"N", size, _data(a), size, status)
    return status.contents.value == 0


@cache
def _routine(name: str, arguments: int) -> Callable[..., None]:
    from scipy.linalg import cython_lapack

    get_name, get_pointer = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    get_name.restype, get_name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    routines: dict[str, Any] = dict(cython_lapack.__pyx_capi__)
    capsule = routines[name]
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * arguments)(get_pointer(capsule, get_name(capsule)))


def _letter(a: NDArray[Any]) -> str:
    if a.ndim != 2 or a.shape[0] != a.shape[1] or not a.flags.f_contiguous or a.dtype not in (np.float32, np.float64):
        raise ValueError("LAPACK works in place on a square float32 or float64 array in column order")
    return "s" if a.dtype == np.float32 else "d"


def _int(value: int) -> Any:
    return ctypes.pointer(ctypes.c_int(value))


def _data(a: NDArray[Any]) -> int:
    return int(a.ctypes.data)

"""LAPACK in place and without Python's lock: Cholesky factor, triangular inverse, leading eigenvectors.

SciPy's own wrappers hold the global interpreter lock while LAPACK works, so threads would factorize one after another.
Here the same routines, which SciPy offers to compiled code, are called through ctypes, which releases the lock
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
    """Replaces the lower triangle of `a [K, K]` by its Cholesky factor L, `a = L·Lᵀ` (LAPACK potrf).

    The upper triangle is neither read nor written.

    Args:
        a: float32 or float64, column order, symmetric.

    Returns:
        True if `a` was positive definite. If it was not, False, and its content is lost.

    Raises:
        ValueError: `a` is not a square array of such a type and order.
    """
    size, status = _int(len(a)), _int(0)
    _routine(f"{_letter(a)}potrf", 5)(b"L", size, _data(a), size, status)
    return status.contents.value == 0


def invert_lower(a: NDArray[Any]) -> bool:
    """Replaces the lower triangle of `a [K, K]` by the inverse of that triangle (LAPACK trtri).

    Args:
        a: float32 or float64, column order.

    Returns:
        True, or False if the triangle is singular.

    Raises:
        ValueError: `a` is not a square array of such a type and order.
    """
    size, status = _int(len(a)), _int(0)
    _routine(f"{_letter(a)}trtri", 6)(b"L", b"N", size, _data(a), size, status)
    return status.contents.value == 0


def leading_eigenvectors(a: NDArray[Any], count: int) -> NDArray[Any]:
    """Returns the eigenvectors of the `count` largest eigenvalues of `a [K, K]` (LAPACK syevr).

    Args:
        a: float32 or float64, column order, symmetric; only its lower triangle is read. Its content is lost.
        count: 1 to K.

    Returns:
        Orthonormal columns [K, count], that of the largest eigenvalue first.

    Raises:
        ArithmeticError: LAPACK gives up, as it does on numbers that are not finite.
        ValueError: `a` is not a square array of such a type and order.
    """
    k, dtype = len(a), a.dtype
    routine, size = _routine(f"{_letter(a)}syevr", 21), _int(k)
    values, vectors = np.empty(k, dtype), np.empty((k, count), dtype, order="F")
    pairs, found, status = np.empty(2 * k, np.intc), _int(0), _int(0)
    unused = np.zeros(1, dtype)
    first, last = _int(k - count + 1), _int(k)

    def call(work: NDArray[Any], integers: NDArray[np.intc], *, ask: bool = False) -> None:
        sizes = (_int(-1), _int(-1)) if ask else (_int(len(work)), _int(len(integers)))
        bounds = (_data(unused), _data(unused), first, last, _data(unused))
        result = (found, _data(values), _data(vectors), size, _data(pairs))
        space = (_data(work), sizes[0], _data(integers), sizes[1])
        routine(b"V", b"I", b"L", size, _data(a), size, *bounds, *result, *space, status)

    work, integers = np.empty(1, dtype), np.empty(1, np.intc)
    call(work, integers, ask=True)  # LAPACK first says how much working space it wants
    call(np.empty(int(work[0]), dtype), np.empty(int(integers[0]), np.intc))
    if status.contents.value or found.contents.value != count:
        raise ArithmeticError("no eigenvectors are found: the matrix holds numbers that are not finite")
    return vectors[:, ::-1]


@cache
def _routine(name: str, arguments: int) -> Callable[..., None]:
    """Returns the LAPACK routine `name` of SciPy as a function of `arguments` pointers."""
    from scipy.linalg import cython_lapack  # here, because importing SciPy takes long and not every command needs it

    get_name, get_pointer = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    get_name.restype, get_name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    routines: dict[str, Any] = dict(cython_lapack.__pyx_capi__)
    capsule = routines[name]
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * arguments)(get_pointer(capsule, get_name(capsule)))


def _letter(a: NDArray[Any]) -> str:
    """Returns the letter that LAPACK names begin with for the type of `a`: s for float32, d for float64."""
    if a.ndim != 2 or a.shape[0] != a.shape[1] or not a.flags.f_contiguous or a.dtype not in (np.float32, np.float64):
        raise ValueError("LAPACK works in place on a square float32 or float64 array in column order")
    return "s" if a.dtype == np.float32 else "d"


def _int(value: int) -> Any:
    """Returns a pointer to `value`: Fortran takes every argument by reference."""
    return ctypes.pointer(ctypes.c_int(value))


def _data(a: NDArray[Any]) -> int:
    """Returns the address of the first number of `a`."""
    return int(a.ctypes.data)

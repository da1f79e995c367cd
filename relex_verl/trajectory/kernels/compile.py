"""How the kernels are compiled: numba, without the interpreter's lock, kept on disk where a folder can be written to.

No fast mathematics: every kernel gives the bits of the torch code that it stands in for, so nothing may be reordered.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.errors import NumbaError
from numba.extending import intrinsic

__all__ = ["NumbaError", "address", "at", "float_of", "kernel", "lowest", "prefetch", "tree", "word_of"]


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function at its first call with arguments of some types."""
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor a cache of the user's can be written to
        return numba.njit(**options)(function)


@intrinsic
def at(typing_context: Any, address: Any) -> Any:
    """The pointer of an address, for `numba.carray`: what lies in many arrays is handed over as a table of addresses."""

    def lower(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), lower


@kernel
def address(array, position):  # type: ignore[no-untyped-def]
    """Of an element, within the array or beyond it."""
    return np.uint64(array.ctypes.data + position * array.itemsize)


@intrinsic
def float_of(typing_context: Any, word: Any) -> Any:
    """The float32 with the bits of a uint32."""

    def lower(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), lower


@intrinsic
def word_of(typing_context: Any, value: Any) -> Any:
    """The bits of a float32, as uint32."""

    def lower(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.uint32))

    return types.uint32(types.float32), lower


@intrinsic
def lowest(typing_context: Any, word: Any) -> Any:
    """The position of the lowest bit that is set in a uint64; of none, 64."""

    def lower(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], cgutils.false_bit)

    return types.int64(types.uint64), lower


@intrinsic
def prefetch(typing_context: Any, address: Any) -> Any:
    """Have the cache line of an address fetched; harmless where there is none."""

    def lower(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = ir.IntType(32)
        function = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, number, number, number])
        callee = cgutils.get_or_insert_function(builder.module, function, "llvm.prefetch.p0")
        pointer = builder.inttoptr(arguments[0], cgutils.voidptr_t)
        builder.call(callee, [pointer, number(0), number(3), number(1)])  # to be read, often, data
        return context.get_dummy_value()

    return types.void(address), lower


@kernel
def tree(values):  # type: ignore[no-untyped-def]
    """`maths.sums.tree` of 64 numbers, which are overwritten; the loops' lengths are written out, to be unrolled."""
    for i in range(32):
        values[i] += values[i + 32]
    for i in range(16):
        values[i] += values[i + 16]
    for i in range(8):
        values[i] += values[i + 8]
    for i in range(4):
        values[i] += values[i + 4]
    return (values[0] + values[2]) + (values[1] + values[3])

"""Triton's interpreter without what takes most of its time: preparing the language for each call, and memory value by value."""

import ctypes
from typing import Any

import numpy as np
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

Array = np.ndarray[Any, Any]
prepared: set[str] = set()


def call_helper(helper: Any, *args: Any, **kwargs: Any) -> Any:
    """What the interpreter does where a kernel calls a helper, less preparing the language again."""
    if helper.fn.__module__.startswith("triton.") and helper.fn.__module__ not in prepared:
        interpreter._patch_lang(helper.fn)
        prepared.add(helper.fn.__module__)
    return helper.rewrite()(*args, **kwargs)


def memory(addresses: Array, dtype: np.dtype[Any]) -> tuple[Array, Array]:
    """The values from the first to the last of these addresses, not copied, and the place of each address in them."""
    first = addresses.min()
    size = int(addresses.max() - first) + dtype.itemsize
    values = np.frombuffer((ctypes.c_char * size).from_address(int(first)), dtype)
    return values, (addresses - first) // np.uint64(dtype.itemsize)


def masked_load(builder: Any, pointers: Any, mask: Any, other: Any, *_: Any) -> TensorHandle:
    element = pointers.get_element_ty()
    dtype = interpreter._get_np_dtype(element)
    out = np.zeros(pointers.data.shape, dtype) if other is None else np.array(other.data, dtype)
    if mask.data.any():
        values, places = memory(pointers.data[mask.data], dtype)
        out[mask.data] = values[places]
    return TensorHandle(out, element)


def masked_store(builder: Any, pointers: Any, value: Any, mask: Any, *_: Any) -> None:
    if mask.data.any():
        values, places = memory(pointers.data[mask.data], value.data.dtype)
        values[places] = value.data[mask.data]


PATCHES: list[tuple[type, str, Any]] = [
    (InterpretedFunction, "__call__", call_helper),
    (InterpreterBuilder, "create_masked_load", masked_load),
    (InterpreterBuilder, "create_masked_store", masked_store),
]

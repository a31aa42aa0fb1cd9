"""What a MODEL carries beside its weights, moved from one network to another.

Other nodes leave functions, methods and compiled modules in a MODEL. Some of them hold on to the network they were made
for. After quantizing they would go on running its 16-bit weights. Everything carried over is therefore rebound: each
reference to a module of the old network becomes the module at the same path of the new one. What cannot be rebound is
an error.
"""

from __future__ import annotations

import functools
import gc
import sys
import types
import weakref
from collections.abc import Iterator
from typing import Any

import torch

MOST_OBJECTS = 500_000
"""Objects that are searched for a reference to the old network, per carried thing."""

_LEAVES = (str, bytes, int, float, complex, bool, type(None), type, types.ModuleType, types.BuiltinFunctionType)


class StillBound(Exception):
    """Something reaches a weight of the old network in a way that cannot be rebound."""


class Rebinder:
    """Rebinds what an old patcher carries to a new one of the same class."""

    def __init__(self, old_patcher: Any, new_patcher: Any):
        self._old_patcher, self._new_patcher = old_patcher, new_patcher
        old, new = old_patcher.model, new_patcher.model
        replacements = dict(new.named_modules(remove_duplicate=False))
        self._modules = {
            id(module): replacements.get(path) for path, module in old.named_modules(remove_duplicate=False)
        }
        self._weights = {key for tensor in (*old.parameters(), *old.buffers()) for key in _identities(tensor)}
        self._memo: dict[int, tuple[Any, Any]] = {}
        """id of a value -> the value, which keeps the id taken, and what became of it."""

    def rebind(self, value: Any) -> Any:
        """The value for the new network; itself where it does not reach the old one. Raises StillBound."""
        result = self._rebind(value)
        if self._reaches_old(result):
            raise StillBound
        return result

    def _rebind(self, value: Any) -> Any:
        if isinstance(value, _LEAVES) or torch.is_tensor(value):
            return value
        if id(value) in self._memo:
            return self._memo[id(value)][1]
        self._memo[id(value)] = value, value  # ends recursion where a value contains itself
        result = self._replaced(value)
        self._memo[id(value)] = value, result
        return result

    def _replaced(self, value: Any) -> Any:
        if id(value) in self._modules:
            return self._modules[id(value)] or value  # a module that the new network lacks is found to be still bound
        if _is_compiled(value):
            inner = self._rebind(value._orig_mod)
            return value if inner is value._orig_mod else type(value)(inner, value.dynamo_ctx)
        if self._is_old_patcher(value):
            return self._new_patcher
        if isinstance(value, types.MethodType):
            owner, function = self._rebind(value.__self__), self._rebind(value.__func__)
            same = owner is value.__self__ and function is value.__func__
            return value if same else types.MethodType(function, owner)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, functools.partial):
            parts = self._rebind([value.func, list(value.args), dict(value.keywords)])
            same = parts[0] is value.func and parts[1] == list(value.args) and parts[2] == value.keywords
            return value if same else functools.partial(parts[0], *parts[1], **parts[2])
        if type(value) is dict:
            rebound = {key: self._rebind(item) for key, item in value.items()}
            return value if all(rebound[key] is value[key] for key in value) else rebound
        if type(value) in (list, tuple, set):
            items = [self._rebind(item) for item in value]
            return value if all(a is b for a, b in zip(items, value, strict=True)) else type(value)(items)
        return value

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        """A function with other cells where one of them holds something of the old network."""
        cells = function.__closure__ or ()
        contents = [_cell_contents(cell) for cell in cells]
        parts = [contents, function.__defaults__, function.__kwdefaults__, function.__dict__]
        if not self._reaches_old(parts):
            return function
        closure = tuple(types.CellType() for _ in cells)
        result = types.FunctionType(function.__code__, function.__globals__, function.__name__, None, closure)
        self._memo[id(function)] = function, result  # a function can refer to itself
        for cell, content in zip(closure, contents, strict=True):
            cell.cell_contents = self._rebind(content)
        result.__defaults__ = self._rebind(function.__defaults__)
        result.__kwdefaults__ = self._rebind(function.__kwdefaults__)
        result.__dict__.update(self._rebind(dict(function.__dict__)))
        result.__qualname__ = function.__qualname__
        return result

    def _is_old_patcher(self, value: Any) -> bool:
        """The old patcher, or one that it was cloned from: they share one network."""
        return hasattr(type(value), "add_object_patch") and getattr(value, "model", None) is self._old_patcher.model

    def _reaches_old(self, value: Any) -> bool:
        """Whether a weight, a module or a patcher of the old network can be reached from a value."""
        waiting, seen = [value], {id(self._new_patcher), id(self._new_patcher.model)}
        seen |= {id(module) for module in self._new_patcher.model.modules()}
        while waiting and len(seen) < MOST_OBJECTS:
            x = waiting.pop()
            if id(x) in seen or isinstance(x, _LEAVES):
                continue
            seen.add(id(x))
            if id(x) in self._modules or self._is_old_patcher(x):
                return True
            if torch.is_tensor(x) and not self._weights.isdisjoint(_identities(x)):
                return True
            waiting += _parts(x)
        return bool(waiting)  # too large to be searched through


def _identities(tensor: torch.Tensor) -> Iterator[object]:
    """By what a tensor is known: itself, and the memory that views of it share."""
    yield id(tensor)
    if type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type != "meta" and tensor.numel():
        yield tensor.device, tensor.untyped_storage().data_ptr()


def _is_compiled(value: Any) -> bool:
    """Whether torch.compile made this module. (Importing torch._dynamo takes seconds; whoever compiles has done it.)"""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return dynamo is not None and isinstance(value, dynamo.OptimizedModule)


def _parts(x: Any) -> Iterator[Any]:
    """What an object refers to; of a function its cells and defaults, but not its module's globals."""
    if isinstance(x, types.FunctionType):
        yield from (_cell_contents(cell) for cell in x.__closure__ or ())
        yield from (x.__defaults__, x.__kwdefaults__, x.__dict__)
    elif torch.is_tensor(x):
        return
    elif isinstance(x, weakref.ReferenceType):
        yield x()
    else:
        yield from gc.get_referents(x)


def _cell_contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell
        return None

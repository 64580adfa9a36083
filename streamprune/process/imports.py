"""Imports torch and transformers in less time.

Their modules make objects by the hundred thousand, and the garbage collector looks through them again and again: a
fifth of the time, for nothing. And transformers imports torch's compiler, torch._dynamo with Triton and Inductor behind
it, to mark functions for it. This program compiles nothing, so `without_compiler` puts a stand-in there that takes the
marks, and that makes way for the compiler as soon as anything else of it is used.
"""

from __future__ import annotations

import gc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo"
_MARKS = ("allow_in_graph", "assume_constant_result", "disable", "forbid_in_graph", "graph_break")
"""Functions of it that tell it about another function, and return that."""

_EARLY = (f"{COMPILER}._trace_wrapped_higher_order_op",)
"""Its submodules that do without the rest of it."""


class _Process:
    """Whether this process runs the program and nothing else, so that what holds for all of it may be changed."""

    is_ours = False


def own_process() -> None:
    """Says that the process runs the program and nothing else."""
    _Process.is_ours = True
    without_compiler()


@contextmanager
def many_imports() -> Iterator[None]:
    """Within it, no garbage is collected. Not for work: what refers to itself stays in memory until it is left.

    In a process of our own, what has been imported is never looked at again.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if _Process.is_ours:
            gc.freeze()
        if collects:
            gc.enable()


def without_compiler(name: str = COMPILER, early: Collection[str] = _EARLY) -> None:
    """Lets a package's import wait until it is used for more than marks; for the whole process.

    `early` are submodules that may be imported before that.
    """
    if name not in sys.modules:
        sys.meta_path.insert(0, _Finder(name, early))


class _Finder(MetaPathFinder):
    """Finds the stand-in; it makes way before a submodule is imported that is not known to do without."""

    def __init__(self, name: str, early: Collection[str]) -> None:
        self._name, self._early = name, early
        self._stand_in: _StandIn | None = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """See MetaPathFinder."""
        if fullname == self._name and self._stand_in is None:
            real = importlib.machinery.PathFinder.find_spec(fullname, path)
            if real is None or real.loader is None:
                return real
            self._stand_in = _StandIn(fullname, real)
            spec = importlib.machinery.ModuleSpec(fullname, _Ready(self._stand_in), origin=real.origin, is_package=True)
            spec.submodule_search_locations = real.submodule_search_locations
            return spec
        standing = self._stand_in
        if standing is None or sys.modules.get(self._name) is not standing:
            return None
        if fullname.startswith(f"{self._name}.") and fullname not in self._early:
            standing.make_way()
            if (there := sys.modules.get(fullname)) is not None:
                return importlib.machinery.ModuleSpec(fullname, _Ready(there))
        return None


class _Ready(Loader):
    """Loads a module that is there already."""

    def __init__(self, module: ModuleType) -> None:
        self._module, self._spec = module, module.__spec__

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """See Loader."""
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        """See Loader."""
        module.__spec__ = self._spec or module.__spec__


class _StandIn(ModuleType):
    """A package that is imported when something of it is used."""

    def __init__(self, name: str, real: importlib.machinery.ModuleSpec) -> None:
        super().__init__(name)
        self.__dict__["_real"] = real

    def __getattr__(self, name: str) -> Any:
        if name in _MARKS and sys.modules.get(self.__name__) is self:
            return _mark
        if name.startswith("__"):  # what Python asks modules for
            raise AttributeError(name)
        return getattr(self.make_way(), name)

    def make_way(self) -> ModuleType:
        """The package itself, imported now if that has not been done."""
        there = sys.modules.get(self.__name__)
        if there is not None and there is not self:
            return there
        spec: importlib.machinery.ModuleSpec = self.__dict__["_real"]
        real = sys.modules[self.__name__] = importlib.util.module_from_spec(spec)
        parent, _, leaf = self.__name__.rpartition(".")
        if parent in sys.modules:
            setattr(sys.modules[parent], leaf, real)
        for name, module in list(sys.modules.items()):
            if name.startswith(f"{self.__name__}.") and "." not in (inner := name[len(self.__name__) + 1 :]):
                setattr(real, inner, module)
        try:
            assert spec.loader is not None
            spec.loader.exec_module(real)
        except BaseException:
            sys.modules[self.__name__] = self
            raise
        return real


def _mark(function: Any = None, *_: Any, **__: Any) -> Any:
    """A mark that is not made: as a decorator, with or without arguments."""
    return _mark if function is None else function

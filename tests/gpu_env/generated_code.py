"""Reads the wrapper code that Inductor writes: which kernels it launches, what it holds at its peak, what it moves.

In:   the code's text and the tensors that it names. Out: launches, bytes.
Never: torch: the text is read, not run. A statement that is not understood is a ValueError, never skipped.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

__all__ = ["GeneratedCode", "Launch", "TensorFacts"]

ITEM_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp8e4nv": 1, "i8": 1, "u8": 1, "i1": 1, "i32": 4, "i64": 8}
VIEWS = ("reinterpret_tensor", "copy_if_misaligned")


@dataclass(frozen=True)
class TensorFacts:
    """What Inductor knows of a name in its code. `storage`: bytes of its memory. `item_of`: the operator's result of
    which it is one item, in the operator's order; empty for a tensor of its own."""

    shape: tuple[int, ...]
    storage: int
    item_of: str = ""


@dataclass(frozen=True)
class Launch:
    """One call in the code's order: a Triton kernel or an operator, what it is given, and what it makes or fills."""

    name: str
    triton: bool
    given: tuple[str, ...]
    result: str = ""


@dataclass(frozen=True)
class GeneratedCode:
    """One graph's code. `tensors`: by name, inputs among them."""

    text: str
    tensors: Mapping[str, TensorFacts]

    @cached_property
    def _tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def call(self) -> ast.FunctionDef:
        """The function that runs the graph. ValueError unless there is exactly one."""
        found = [node for node in ast.walk(self._tree) if isinstance(node, ast.FunctionDef) and node.name == "call"]
        if len(found) != 1:
            raise ValueError(f"{len(found)} functions `call` in the code")
        return found[0]

    @cached_property
    def kernels(self) -> dict[str, str]:
        """Source text of each Triton kernel, by name."""
        found = {}
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "async_compile.triton":
                name, source = node.args[:2]
                found[ast.literal_eval(name)] = ast.literal_eval(source)
        return found

    @cached_property
    def launches(self) -> list[Launch]:
        """Triton kernels and operators, in order; views and allocations are none."""
        found = []
        for node in _statements(self.call.body):
            call = node.value if isinstance(node, ast.Assign | ast.Expr) else None
            if not isinstance(call, ast.Call):
                continue
            name = ast.unparse(call.func)
            if name.endswith(".run") and name.removesuffix(".run") in self.kernels:
                found.append(Launch(name.removesuffix(".run"), True, _tensors_in(call.args)))
            elif name.startswith(("torch.ops.", "extern_kernels.")):
                result = ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else ""
                out = [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == "out"]
                found.append(Launch(name, False, _tensors_in(call.args), result or (out[0] if out else "")))
        return found

    @property
    def triton_launches(self) -> list[Launch]:
        return [launch for launch in self.launches if launch.triton]

    def signature(self, kernel: str) -> dict[str, str]:
        """Argument → Triton's type, in order; constants left out."""
        for node in ast.walk(ast.parse(self.kernels[kernel])):
            if isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    if isinstance(key, ast.Constant) and key.value == "signature":
                        types: dict[str, str] = ast.literal_eval(value)
                        return {name: kind for name, kind in types.items() if kind != "constexpr"}
        raise ValueError(f"{kernel} has no signature")

    def traffic(self, launch: Launch) -> int:
        """Bytes that a Triton kernel reads and writes, each argument once: what a loop over one row reads again comes
        from the cache. An argument that is overwritten counts twice."""
        pointers = {name: kind for name, kind in self.signature(launch.name).items() if kind.startswith("*")}
        total = 0
        for (argument, kind), tensor in zip(pointers.items(), launch.given, strict=True):
            count = math.prod(self.tensors[tensor].shape) * ITEM_BYTES[kind.removeprefix("*")]
            total += count * (2 if argument.startswith("in_out_ptr") else 1)
        return total

    def writer(self, tensor: str, reader: Launch) -> Launch:
        """The last call before `reader` that makes or fills the memory of `tensor`. Views are followed.

        ValueError where there is none.
        """
        origin, found = self._origins[tensor], None
        for launch in self.launches[: self.launches.index(reader)]:
            names = [launch.result] if launch.result else []
            if launch.triton:
                pointers = [name for name, kind in self.signature(launch.name).items() if kind.startswith("*")]
                paired = zip(pointers, launch.given, strict=True)
                names = [given for pointer, given in paired if "out_ptr" in pointer]
            if any(self._origins.get(name, name) == origin for name in names):
                found = launch
        if found is None:
            raise ValueError(f"nothing writes {tensor} before {reader.name}")
        return found

    @cached_property
    def _origins(self) -> dict[str, str]:
        """Name → the name that its memory was made under."""
        found = {name: name for name in self.tensors}
        for node in _statements(self.call.body):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id
                source = _viewed(node.value)
                found[name] = found.get(source, source) if source else name
        return found

    @cached_property
    def peak(self) -> int:
        """The most bytes that are alive at once of all that the code allocates, operators' results included.

        Inputs and what operators allocate inside are not counted.
        """
        held: dict[str, frozenset[str]] = {}  # name → memories that it keeps alive
        sizes: dict[str, int] = {}
        most = 0
        for node in _statements(self.call.body):
            if isinstance(node, ast.Delete):
                for target in node.targets:
                    held.pop(ast.unparse(target), None)
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name, value = node.targets[0].id, node.value
                made = self._made_by(name, value)
                if made is None:
                    held[name] = self._kept_by(value, held)
                else:
                    sizes |= made
                    held[name] = frozenset(made)
                most = max(most, sum(sizes[memory] for memory in frozenset().union(*held.values())))
        return most

    def _made_by(self, name: str, value: ast.expr) -> dict[str, int] | None:
        """Memory → bytes, where the statement makes any; None where it makes none. ValueError for what is unknown."""
        if not isinstance(value, ast.Call):
            return None
        called = ast.unparse(value.func)
        if called == "get_raw_stream" or called in VIEWS:
            return None
        if called.startswith("empty_strided_"):
            return {name: self.tensors[name].storage}
        if called.startswith(("torch.ops.", "extern_kernels.")):
            items = {item: facts.storage for item, facts in self.tensors.items() if facts.item_of == name}
            return items or {name: self.tensors[name].storage}
        raise ValueError(f"line {value.lineno}: what does {called} allocate?")

    def _kept_by(self, value: ast.expr, held: Mapping[str, frozenset[str]]) -> frozenset[str]:
        if isinstance(value, ast.Subscript):
            kept = sorted(held.get(ast.unparse(value.value), ()), key=list(self.tensors).index)
            return frozenset(kept[ast.literal_eval(value.slice)] for _ in kept[:1])
        source = _viewed(value)
        return held.get(source, frozenset()) if source else frozenset()


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        if isinstance(node, ast.With):
            yield from _statements(node.body)
        elif isinstance(node, ast.Assign | ast.Expr | ast.Delete | ast.Return):
            yield node
        else:
            raise ValueError(f"line {node.lineno}: {type(node).__name__} in generated code")


def _viewed(value: ast.expr) -> str:
    """The tensor of which `value` is a view, an item or another name; empty for none."""
    if isinstance(value, ast.Name):
        return value.id
    if isinstance(value, ast.Subscript):
        return ast.unparse(value.value)
    if isinstance(value, ast.Call) and ast.unparse(value.func) in VIEWS:
        return ast.unparse(value.args[0])
    return ""


def _tensors_in(arguments: Sequence[ast.expr]) -> tuple[str, ...]:
    """Names of tensors, views reduced to what they view; numbers, texts, None left out. ValueError for other calls."""
    names = []
    for argument in arguments:
        name = _viewed(argument)
        if not name and isinstance(argument, ast.Call):
            raise ValueError(f"line {argument.lineno}: which tensor is {ast.unparse(argument)}?")
        names.append(name)
    return tuple(name for name in names if name)

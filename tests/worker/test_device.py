"""The engine's tensors and the device, by reading its source: what a CPU forgives does not pass.

On a CPU a tensor that was made on no particular device, or a look at a value in the middle of a
step, costs nothing. On a GPU the first is an error, and the second stops the host until all that
was asked of the device is done.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from test_layers import ENGINE, SOURCE, definitions, units, with_added

# Of torch's functions, those whose result is where their arguments are, or that make no tensor.
FOLLOW = {"torch.add", "torch.addcmul", "torch.cat", "torch.equal", "torch.log", "torch.stack",
          "torch.where", "F.linear", "F.pad", "F.scaled_dot_product_attention"}
NO_TENSOR = {"torch.inference_mode"}  # and all of torch.cuda

# Where the host may wait for the device, and why it has to.
WAITS = {
    "Batch.read": "the tokens of a burst decide who is through; one look for all slots",
    "Batch._check": "at the start, before anybody is served",
    "Codec._waves": "the samples are what is handed out",
    "Fine._decode": "after the samples, whose arrival has been waited for",
}
READS = {"item", "tolist", "cpu", "numpy", "nonzero", "masked_select", "unique", "synchronize"}
HOST_ATTRIBUTES = {"shape", "dtype", "device", "ndim", "itemsize"}
TO_HOST = {"bool", "int", "float", "range", "print", "str", "min", "max", "sum", "any", "all"}

Place = tuple[str, ast.AST]


def places(source: str) -> list[Place]:
    """The methods and functions of the engine, each with its name."""
    return [unit for title, node in definitions(source) if title in ENGINE
            for unit in units(node)]


def dotted(node: ast.AST) -> str:
    """`a.b.c` for such a chain of names; empty for anything else."""
    if isinstance(node, ast.Attribute):
        return f"{owner}.{node.attr}" if (owner := dotted(node.value)) else ""
    return node.id if isinstance(node, ast.Name) else ""


def calls(node: ast.AST) -> Iterator[ast.Call]:
    return (part for part in ast.walk(node) if isinstance(part, ast.Call))


def tensors_on_no_named_device(source: str) -> list[str]:
    """Calls that make a tensor without saying where."""
    wrong = []
    for name, place in places(source):
        moved = {id(call.func.value) for call in calls(place)  # torch.from_numpy(x).to(device)
                 if isinstance(call.func, ast.Attribute) and call.func.attr == "to"}
        for call in calls(place):
            made = dotted(call.func)
            if (made.startswith(("torch.", "F.")) and not made.startswith("torch.cuda.")
                    and made not in FOLLOW | NO_TENSOR and id(call) not in moved
                    and not any(word.arg == "device" for word in call.keywords)):
                wrong.append(f"{name}: {made} in line {call.lineno}")
    return wrong


class Tensors:
    """Which expressions of one function are tensors, or lists of them, as its own lines tell.

    `attributes` and `makers` are what is known of the whole engine: attributes that are tensors,
    and functions that return them.
    """

    def __init__(self, place: ast.AST, attributes: set[str], makers: set[str]):
        self.attributes, self.makers = attributes, makers
        self.names: set[str] = set()
        self.lists: set[str] = set()
        for part in ast.walk(place):
            if isinstance(part, ast.arg) and part.annotation:
                kind = ast.unparse(part.annotation)
                self.names |= {part.arg} if kind.startswith("torch.Tensor") else set()
                self.lists |= {part.arg} if kind == "list[torch.Tensor]" else set()
        for _ in range(3):  # a name may be assigned above what it is made of, in a loop
            for part in ast.walk(place):
                self._learn(part)

    def _learn(self, part: ast.AST) -> None:
        if isinstance(part, ast.Assign):
            stored = {leaf.id for target in part.targets for leaf in ast.walk(target)
                      if isinstance(leaf, ast.Name) and isinstance(leaf.ctx, ast.Store)}
            self.names |= stored if self.holds(part.value) else set()
            self.lists |= stored if self.holds_many(part.value) else set()
        elif isinstance(part, ast.For | ast.comprehension):
            rows = [part.iter]
            if isinstance(part.iter, ast.Call) and dotted(part.iter.func) == "zip":
                rows = part.iter.args
            targets = part.target.elts if isinstance(part.target, ast.Tuple) else [part.target]
            for target, row in zip(targets, rows, strict=False):
                if isinstance(target, ast.Name) and (self.holds_many(row) or self.holds(row)):
                    self.names.add(target.id)

    def holds_many(self, node: ast.AST) -> bool:
        if isinstance(node, ast.ListComp):
            return self.holds(node.elt)
        if isinstance(node, ast.Subscript):
            return self.holds_many(node.value)
        return isinstance(node, ast.Name) and node.id in self.lists

    def holds(self, node: ast.AST) -> bool:
        """Whether the expression's value is a tensor."""
        if isinstance(node, ast.Name):
            return node.id in self.names
        if isinstance(node, ast.Attribute):
            return node.attr not in HOST_ATTRIBUTES and (
                node.attr in self.attributes or self.holds(node.value))
        if isinstance(node, ast.Call):
            made = dotted(node.func)
            if made.startswith(("torch.", "F.")):
                return not made.startswith("torch.cuda.") and made not in NO_TENSOR
            return made.rpartition(".")[2] in self.makers or (
                isinstance(node.func, ast.Attribute) and node.func.attr not in READS
                and self.holds(node.func.value))
        if isinstance(node, ast.BinOp):
            return self.holds(node.left) or self.holds(node.right)
        if isinstance(node, ast.Compare):
            is_same = any(isinstance(op, ast.Is | ast.IsNot) for op in node.ops)
            return not is_same and any(map(self.holds, [node.left, *node.comparators]))
        if isinstance(node, ast.UnaryOp | ast.Subscript | ast.Starred):
            return self.holds(getattr(node, "operand", None) or node.value)
        return False

    def asked(self, place: ast.AST) -> Iterator[ast.AST]:
        """Tensors whose value the host has to know: whether they are true, or which number."""
        for part in ast.walk(place):
            if isinstance(part, ast.If | ast.While | ast.IfExp | ast.Assert):
                yield from self._truths(part.test)
            elif isinstance(part, ast.comprehension):
                for test in part.ifs:
                    yield from self._truths(test)
            elif isinstance(part, ast.BoolOp):
                yield from filter(self.holds, part.values)
            elif isinstance(part, ast.UnaryOp) and isinstance(part.op, ast.Not):
                yield from filter(self.holds, [part.operand])
            elif isinstance(part, ast.Call) and dotted(part.func) in TO_HOST:
                yield from filter(self.holds, part.args)
            elif isinstance(part, ast.For | ast.comprehension) and self.holds(part.iter):
                yield part.iter

    def _truths(self, test: ast.AST) -> Iterator[ast.AST]:
        return filter(self.holds, [test])


def tensor_makers(source: str) -> set[str]:
    """Functions and methods that return one tensor."""
    return {part.name for _, place in places(source) for part in ast.walk(place)
            if isinstance(part, ast.FunctionDef) and part.returns
            and ast.unparse(part.returns) == "torch.Tensor"}


def tensor_attributes(source: str, makers: set[str]) -> set[str]:
    """Names of attributes that somewhere in the engine are given a tensor."""
    found: set[str] = set()
    for _, place in places(source):
        local = Tensors(place, set(), makers)
        for part in ast.walk(place):
            if isinstance(part, ast.AnnAssign) and "torch.Tensor" in ast.unparse(part.annotation):
                targets = [part.target]
            elif isinstance(part, ast.Assign) and local.holds(part.value):
                targets = part.targets
            else:
                continue
            found |= {leaf.attr for target in targets for leaf in ast.walk(target)
                      if isinstance(leaf, ast.Attribute) and isinstance(leaf.ctx, ast.Store)}
    return found


def waits(source: str) -> list[str]:
    """Where the host waits for the device: the function, and what it asks."""
    found, makers = [], tensor_makers(source)
    attributes = tensor_attributes(source, makers)
    for name, place in places(source):
        for call in calls(place):
            read = isinstance(call.func, ast.Attribute) and call.func.attr in READS
            if read or dotted(call.func) == "torch.equal":
                found.append(f"{name}: {ast.unparse(call)}")
        tensors = Tensors(place, attributes, makers)
        found += [f"{name}: {ast.unparse(one)}" for one in tensors.asked(place)]
    return found


def test_every_tensor_that_the_engine_makes_is_on_a_named_device() -> None:
    assert tensors_on_no_named_device(SOURCE) == []


def test_the_host_waits_for_the_device_nowhere_but_where_it_has_to() -> None:
    found = waits(SOURCE)
    assert {one.partition(":")[0] for one in found} == WAITS.keys(), found


def planted(codes: tuple[str, ...], head: str) -> str:
    """The source with a function for each code in the engine, called planted_0 and so on."""
    return with_added(SOURCE, "Engine", "\n\n\n".join(
        f"def planted_{number}({head}) -> Any:\n    {code}" for number, code in enumerate(codes)))


MADE_NOWHERE = (
    "torch.zeros(3)", "torch.tensor([1])", "torch.from_numpy(y)", "torch.arange(len(x))",
    "x + torch.ones(3)", "torch.stack([torch.empty(1)])", "torch.some_new_function(x)",
    "torch.rand(3, generator=y)")
WAITING = (
    "return x.item()", "return y.tolist()", "return x.cpu()", "return bool(x.any())",
    "if x.sum() > 0:\n        pass", "if not x:\n        pass", "y = x * 2\n    return int(y)",
    "return 1 if x[0] else 2", "return [1 for _ in y if x]", "assert x.isfinite().all()",
    "while x < 1:\n        pass", "return x or y", "return [int(one) for one in x]",
    "for one in x:\n        pass", "return torch.equal(x, y)", "return y.recent.tolist()",
    "if y.recent[0] > 1:\n        pass", "return self.codes.any() and 1")
NOT_WAITING = (
    "return len(x) > 1 and x.shape[0] < 3", "return x is None or x.device.type == 'cuda'",
    "return torch.where(x > 0, x, -1)", "return [a for a in y if a]", "return x[: len(x)]")


@pytest.fixture(scope="module")
def found_nowhere() -> list[str]:
    return tensors_on_no_named_device(planted(
        tuple(f"return {code}" for code in MADE_NOWHERE), "x: torch.Tensor, y: Any"))


@pytest.fixture(scope="module")
def found_waits() -> list[str]:
    return waits(planted(WAITING, "self: Any, x: torch.Tensor, y: Any"))


@pytest.mark.parametrize("code", MADE_NOWHERE)
def test_a_tensor_on_no_named_device_is_noticed(found_nowhere: list[str], code: str) -> None:
    place = f"planted_{MADE_NOWHERE.index(code)}: torch."
    assert len([one for one in found_nowhere if one.startswith(place)]) == 1
    assert len(found_nowhere) == len(MADE_NOWHERE)


@pytest.mark.parametrize("code", WAITING)
def test_a_wait_for_the_device_is_noticed(found_waits: list[str], code: str) -> None:
    place = f"planted_{WAITING.index(code)}: "
    assert any(one.startswith(place) for one in found_waits)


def test_what_the_host_knows_is_no_wait() -> None:
    assert waits(planted(NOT_WAITING, "x: torch.Tensor, y: Any")) == waits(SOURCE)

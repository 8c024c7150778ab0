"""A network in two parts: its frozen prefix, which gives the same output for an image in every
epoch, and the suffix, which is trained or random.

The network is recorded with torch.fx in training and in evaluation mode. The prefix is what
`forward` does, in order, until a weight is trainable, the two modes differ, or a step, when tried
on noise, draws random numbers or changes a buffer; the suffix is the rest. The values that cross,
one or several tensors, are packed into a row of bytes per image. All parts share their modules with
the network, which keeps its own names of weights.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn import functional
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from hpo.training.tracing import (
    FEW,
    MODES,
    MORE,
    CannotPartition,
    RngState,
    Runner,
    Trace,
    Wrapper,
    asks_shape,
    error_line,
    restore_attributes,
    restore_buffers,
    tensors,
    trace,
)

ALIGNED = 16
"""Alignment in bytes of each of several tensors in a row."""
EXACT, TF32, ROUGH = 1e-3, 5e-3, 2e-2
"""Largest difference, relative to the largest value, that counts as rounding: in float32, in
float32 on an NVIDIA GPU, which may multiply in TF32, and in lower precision."""


class CannotPack(Exception):
    """Raised, with the reason in a few words, for values that cannot be stored per image."""


@dataclass(frozen=True)
class PackedTensor:
    """A tensor in the rows of B images, whose number is one of its dimensions."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    """Shape for one image."""
    images: int
    """Index of the dimension of the images."""
    order: tuple[int, ...]
    """All dimensions in their order in memory, so that the tensor is restored with the same
    layout."""

    @property
    def size(self) -> int:
        """Bytes in a row."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def _stored(self) -> list[int]:
        """All dimensions in their order in the rows."""
        return [self.images, *(dim for dim in self.order if dim != self.images)]

    def pack(self, value: Tensor) -> Tensor:
        """Return (B, size) uint8."""
        stored = value.permute(self._stored)
        return stored.reshape(len(stored), -1).contiguous().view(torch.uint8)

    def __call__(self, rows: Tensor) -> Tensor:
        """Return the tensor from the rows of B images."""
        own = rows[:, self.start : self.start + self.size].contiguous().view(self.dtype)
        sizes = [*self.shape[: self.images], len(rows), *self.shape[self.images :]]
        stored = own.view([sizes[dim] for dim in self._stored])
        ordered = stored.permute([self._stored.index(dim) for dim in self.order]).contiguous()
        return ordered.permute([self.order.index(dim) for dim in range(len(sizes))])


@dataclass(frozen=True)
class Constant:
    """A value that does not depend on the images."""

    value: Any

    def __call__(self, rows: Tensor) -> Any:
        """Return the value."""
        return self.value


@dataclass(frozen=True)
class BatchSize:
    """The number of images."""

    def __call__(self, rows: Tensor) -> int:
        """Return the number of rows."""
        return len(rows)


@dataclass(frozen=True)
class Shape:
    """The shape of a tensor."""

    sizes: tuple[Constant | BatchSize, ...]

    def __call__(self, rows: Tensor) -> torch.Size:
        """Return the shape for these rows."""
        return torch.Size([size(rows) for size in self.sizes])


Leaf = PackedTensor | Constant | BatchSize | Shape


@dataclass(frozen=True)
class Packing:
    """Layout of crossing values in rows of bytes."""

    leaves: tuple[Leaf, ...]
    size: int
    """Bytes of a row."""
    _tree: TreeSpec

    def pack(self, values: Sequence[Any]) -> Tensor:
        """Return (B, size) uint8."""
        packed = [
            functional.pad(rows, (0, _padded(leaf.size) - leaf.size)) if self._several else rows
            for leaf, value in zip(self.leaves, tree_flatten(tuple(values))[0], strict=True)
            if isinstance(leaf, PackedTensor)
            for rows in [leaf.pack(value)]
        ]
        return torch.cat(packed, 1) if self._several else packed[0]

    def unpack(self, rows: Tensor) -> Sequence[Any]:
        """Return the values for B images, from (B, size) uint8."""
        values: Sequence[Any] = tree_unflatten([leaf(rows) for leaf in self.leaves], self._tree)
        return values

    @property
    def _several(self) -> bool:
        return sum(isinstance(leaf, PackedTensor) for leaf in self.leaves) > 1


def plan_packing(few: Sequence[Any], more: Sequence[Any], counts: tuple[int, int]) -> Packing:
    """Return how to pack `few`, the values for some images; `more` are the same for these and
    further images, `counts` are the two numbers of images. Raises CannotPack."""
    flat, tree = tree_flatten(tuple(few))
    again, other = tree_flatten(tuple(more))
    if tree != other:
        raise CannotPack("the number of values depends on the images")
    stored = [one.untyped_storage().data_ptr() for one in flat if isinstance(one, Tensor)]
    if not stored:
        raise CannotPack("no tensor depends on the images")
    if len(stored) > len(set(stored)):
        raise CannotPack("two of its tensors share their memory")
    leaves: list[Leaf] = []
    size = 0
    for one, also in zip(flat, again, strict=True):
        leaf = _leaf(one, also, counts, size)
        leaves.append(leaf)
        size += _padded(leaf.size) if isinstance(leaf, PackedTensor) else 0
    packed = [leaf for leaf in leaves if isinstance(leaf, PackedTensor)]
    return Packing(tuple(leaves), packed[0].size if len(packed) == 1 else size, tree)


def _padded(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def _leaf(few: Any, more: Any, counts: tuple[int, int], start: int) -> Leaf:
    if isinstance(few, Tensor):
        return _piece(few, more, counts, start)
    if isinstance(few, torch.Size):
        return Shape(tuple(_number(one, also, counts) for one, also in zip(few, more, strict=True)))
    return _number(few, more, counts)


def _number(few: Any, more: Any, counts: tuple[int, int]) -> Constant | BatchSize:
    if (few, more) == counts:
        return BatchSize()
    if type(few) is not type(more) or few != more:
        raise CannotPack("a number depends on the batch size")
    return Constant(few)


def _piece(few: Tensor, more: Tensor, counts: tuple[int, int], start: int) -> PackedTensor:
    sizes = enumerate(zip(few.shape, more.shape, strict=False))
    differing = [dim for dim, (one, other) in sizes if one != other]
    if (
        few.ndim != more.ndim
        or len(differing) != 1
        or (few.shape[differing[0]], more.shape[differing[0]]) != counts
    ):
        raise CannotPack("the images are not a dimension of a tensor")
    (images,) = differing
    if few.layout != torch.strided or not equal_up_to_rounding(
        few, more.narrow(images, 0, counts[0])
    ):
        raise CannotPack("its output for an image depends on the rest of the batch")
    strides = few.stride()
    order = sorted(range(few.ndim), key=lambda dim: (-strides[dim], dim != images))
    shape = (*few.shape[:images], *few.shape[images + 1 :])
    return PackedTensor(start, few.dtype, shape, images, tuple(order))


def equal_up_to_rounding(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal except for rounding."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    exact = TF32 if one.is_cuda else EXACT
    part = exact if one.dtype in (torch.float32, torch.float64) else ROUGH
    one, other = one.float(), other.float()
    largest = other.nan_to_num(0.0, 0.0, 0.0).abs().max().item() if other.numel() else 0.0
    return torch.allclose(one, other, rtol=0.0, atol=part * largest, equal_nan=True)


Running = Callable[[], AbstractContextManager[object]]
"""Opens the context in which the network runs: mixed precision."""


@dataclass(frozen=True)
class Partition:
    """A network cut in two."""

    packing: Packing
    """Packing of the crossing values into a row of bytes per image."""
    obstacle: str | None
    """Reason why some of the frozen modules are in the suffix although they need not be."""
    digest: str
    """Digest of what the prefix does: its steps, and its output for some noise."""
    _training: Trace
    _evaluation: Trace
    _place: int
    _crossing: tuple[int, ...]

    def prefix(self, model: nn.Module) -> nn.Module:
        """Return the module that maps images (B, 3, S, S) to rows (B, bytes) uint8, as `model`
        computes them."""
        return _Prefix(self._part(self._training, model, behind=False), self.packing)

    def suffix(self, model: nn.Module) -> nn.Module:
        """Return the module that maps rows (B, bytes) uint8 to the output of `model`, the network
        or its average; it follows the mode of `model`, training or evaluation."""
        both = self._training, self._evaluation
        learning, fixed = (self._part(one, model, behind=True) for one in both)
        return _Suffix(model, learning, fixed, self.packing)

    def _part(self, trace: Trace, model: nn.Module, *, behind: bool) -> nn.Module:
        """Return what `trace` does before the cut, or `behind` it."""
        graph, nodes = fx.Graph(), trace.nodes
        crossing = [nodes[place] for place in self._crossing]
        copies: dict[fx.Node, fx.Node] = {}

        def copied(node: fx.Node) -> fx.Node:
            if node not in copies:  # a weight, or in the suffix what does not depend on images
                copies[node] = graph.node_copy(node, copied)
            return copies[node]

        if behind:
            copies |= {node: graph.placeholder(f"value{n}") for n, node in enumerate(crossing)}
        for node in nodes[self._place :] if behind else nodes[: self._place]:
            if node.op != "get_attr":
                copied(node)
        if not behind:
            graph.output(tuple(map(copied, crossing)))
        return trace.module(model, graph)


class _Prefix(nn.Module):
    def __init__(self, computed: nn.Module, packing: Packing) -> None:
        super().__init__()
        self.computed, self._packing = computed, packing

    def forward(self, images: Tensor) -> Tensor:
        return self._packing.pack(self.computed.forward(images))


class _Suffix(nn.Module):
    def __init__(
        self, network: nn.Module, learning: nn.Module, fixed: nn.Module, packing: Packing
    ) -> None:
        super().__init__()
        self.network = network
        self._parts = {True: learning, False: fixed}  # not submodules: theirs belong to the network
        self._packing = packing

    def forward(self, rows: Tensor) -> Any:
        return self._parts[self.network.training].forward(*self._packing.unpack(rows))


def partition(
    model: nn.Module,
    frozen: Sequence[nn.Module],
    images: Tensor,
    *,
    max_bytes: int,
    running: Running = nullcontext,
) -> Partition | None:
    """Cut `model`, whose modules `frozen` are in eval mode even in training, as late as possible
    such that at most `max_bytes` bytes per image cross; return None if nothing with weights can be
    separated. `images`: MORE different noise images, shaped like real ones.

    The attributes and buffers of `model` and all random states are preserved. Raises
    CannotPartition with the reason if frozen modules cannot be separated.
    """
    chance = RngState(images.device)
    try:
        with restore_attributes(model) as changed:
            cut = _partition(model, frozen, images, max_bytes, running)
        if cut and changed:
            raise CannotPartition(f"its forward changes {changed[0]}")
        return cut
    except (CannotPartition, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever code of the user's does here and not in training
        raise CannotPartition(error_line(error)) from error
    finally:
        chance.restore()


def _partition(
    model: nn.Module, frozen: Sequence[nn.Module], images: Tensor, max_bytes: int, running: Running
) -> Partition | None:
    model.eval()
    evaluation = trace(model, frozen, images)
    model.train()
    for module in frozen:
        module.eval()
    training = trace(model, frozen, images)
    with torch.no_grad(), running():
        cut = _Search(model, training, evaluation, images).cut(max_bytes)
        if cut is None:
            return None
        model.eval()
        prefix, suffix = cut.prefix(model), cut.suffix(model)
        with restore_buffers(model):
            whole = model(images[:FEW].clone())
        with restore_buffers(model):
            parts = suffix(prefix(images[:FEW].clone()))
    if not equal_up_to_rounding(parts, whole):
        raise CannotPartition("cut in two, its output differs")
    return cut


class _Search:
    """Searches for the latest point at which a network can be cut."""

    def __init__(
        self, model: nn.Module, training: Trace, evaluation: Trace, images: Tensor
    ) -> None:
        self._model, self._training, self._evaluation = model, training, evaluation
        self._nodes = training.nodes
        self._run = Runner(Wrapper(model, training.constants), training.graph)
        self._device = images.device
        self._of_images: set[fx.Node] = set()
        self._learning: set[fx.Node] = set()
        self._versions: dict[fx.Node, int] = {}
        """Versions of tensors that do not depend on the images."""
        self._stopped = ""
        """Reason why the prefix ended, unless a trainable weight did it."""
        self._unfit = ""
        """Reason why the prefix cannot be cut off at its end."""
        self._few: dict[fx.Node, Any] = {}
        self._more: dict[fx.Node, Any] = {}
        self._prefix = self._nodes[: self._try(images[:FEW].clone())]
        self._again(images.clone())

    def cut(self, max_bytes: int) -> Partition | None:
        """Return the partition; see `partition`."""
        weighted = [place for place, node in enumerate(self._prefix) if self._has_weights(node)]
        last = len(self._prefix)
        for first in reversed(weighted):
            # Between two steps with weights there is little to compute: the fewest bytes count.
            fit = [
                one for place in range(last, first, -1) if (one := self._fitting(place, max_bytes))
            ]
            if fit:
                return self._cut(*min(fit, key=lambda one: one[2].size))
            last = first
        obstacle = self._training.obstacle or (self._unfit if weighted else self._stopped)
        if obstacle:
            raise CannotPartition(obstacle)
        return None

    def _fitting(self, place: int, max_bytes: int) -> tuple[int, tuple[int, ...], Packing] | None:
        """Return what crosses at `place`, and how to pack it; None if it cannot be stored."""
        crossing = self._crossing(place)
        try:
            packed = self._packing(place, crossing)
        except CannotPack as unfit:
            self._unfit = self._unfit or str(unfit)
            return None
        if packed.size > max_bytes:
            self._unfit = self._unfit or (
                f"{packed.size:,} bytes for an image are too many to be worth caching"
            )
            return None
        return place, crossing, packed

    def _cut(self, place: int, crossing: tuple[int, ...], packed: Packing) -> Partition:
        hasher = hashlib.blake2b(digest_size=16)
        steps = [node.format_node() for node in self._nodes[:place]]
        hasher.update(f"{steps} {packed.leaves}".encode())
        rows = packed.pack([self._few[self._nodes[one]] for one in crossing])
        hasher.update(rows.cpu().numpy().tobytes())
        obstacle, digest = self._training.obstacle, hasher.hexdigest()
        return Partition(
            packed, obstacle, digest, self._training, self._evaluation, place, crossing
        )

    def _has_weights(self, node: fx.Node) -> bool:
        """Return whether `node` computes something from the images with weights."""
        if node not in self._of_images:
            return False
        module = self._module(node)
        if module is not None:
            return any(True for _ in module.parameters())
        return any(isinstance(self._more[one], nn.Parameter) for one in node.all_input_nodes)

    def _crossing(self, place: int) -> tuple[int, ...]:
        """Return the places before `place` whose values depend on the images and are used after
        it."""
        places = set()
        for nodes in (self._nodes, self._evaluation.nodes):
            at = {node: number for number, node in enumerate(nodes)}
            places |= {
                number
                for number, node in enumerate(nodes[:place])
                if self._nodes[number] in self._of_images
                and any(at[user] >= place for user in node.users)
            }
        return tuple(sorted(places))

    def _packing(self, place: int, crossing: tuple[int, ...]) -> Packing:
        for nodes in (self._nodes, self._evaluation.nodes):
            if any(node.meta[MODES] != nodes[0].meta[MODES] for node in nodes[place:]):
                raise CannotPack("torch.no_grad or autocast surrounds trainable layers")
        few, more = (
            [values[self._nodes[one]] for one in crossing] for values in (self._few, self._more)
        )
        return plan_packing(few, more, (FEW, MORE))

    # Where the prefix ends

    def _try(self, images: Tensor) -> int:
        """Return the number of nodes at the beginning that give the same output for the same image
        in every epoch."""
        twins: dict[fx.Node, fx.Node] = {}
        pairs = zip(self._nodes, self._evaluation.nodes, strict=False)
        self._run.env = self._few
        for place, (node, twin) in enumerate(pairs):
            if not self._same(node, twin, twins):
                self._stopped = f"{node.name} differs between training and evaluation"
                return place
            if node.op == "output" or self._learns(node):
                return place
            if node.op == "placeholder":
                self._few[node] = images
                self._of_images.add(node)
            elif node.op == "get_attr":
                self._take(node)
            elif why := self._obstacle(node):
                self._stopped = why
                return place
            twins[twin] = node
        return len(self._nodes)

    def _same(self, node: fx.Node, twin: fx.Node, twins: dict[fx.Node, fx.Node]) -> bool:
        """Return whether `node` does the same in training as `twin` in evaluation."""
        if node.op != twin.op or not all(one in twins for one in twin.all_input_nodes):
            return False
        one, other = self._training.constants, self._evaluation.constants
        if node.op == "get_attr" and node.target in one and twin.target in other:
            return torch.equal(one[str(node.target)], other[str(twin.target)])
        args, kwargs = (map_arg(part, twins.__getitem__) for part in (twin.args, twin.kwargs))
        return bool(node.target == twin.target and node.args == args and node.kwargs == kwargs)

    def _learns(self, node: fx.Node) -> bool:
        if any(one in self._learning for one in node.all_input_nodes):
            return True
        module = self._module(node)
        return module is not None and any(one.requires_grad for one in module.parameters())

    def _take(self, node: fx.Node) -> None:
        """Copy a weight or buffer, so that writing into it is noticed and does no harm."""
        value = self._run.run_node(node)
        if getattr(value, "requires_grad", False):
            self._learning.add(node)
        self._few[node] = _cloned(value)
        self._watch(node)

    def _watch(self, node: fx.Node) -> None:
        if isinstance(value := self._few[node], Tensor):
            self._versions[node] = value._version

    def _obstacle(self, node: fx.Node) -> str:
        """Run `node`; return the reason why it cannot be in the prefix, empty if it can."""
        if node.meta[MODES][1:] != self._nodes[0].meta[MODES][1:]:
            return "autocast surrounds frozen layers"
        module = self._module(node)
        fixed = None if module is None else self._in_evaluation(node, module)
        chance = RngState(self._device)
        with restore_buffers(module) as changed:
            value = self._few[node] = self._run.run_node(node)
        name = node.name if module is None else f"{node.target} ({type(module).__name__})"
        if chance.drawn():
            return f"{name} draws random numbers"
        written = (one for one, version in self._versions.items()
                   if self._few[one]._version != version)  # fmt: skip
        if changed or any(True for _ in written):
            return f"{name} changes a buffer"
        if fixed is not None and not _equal(fixed, value):
            return f"{name} differs between training and evaluation"
        if any(one in self._of_images for one in node.all_input_nodes):
            self._of_images.add(node)
            return "" if self._of_shape(node) else f"{name} computes a number from the images"
        self._watch(node)
        return ""

    def _of_shape(self, node: fx.Node) -> bool:
        """Return whether values of `node` other than tensors are independent of the contents of the
        images."""
        value = self._few[node]
        if value is None or tensors(value):
            return True
        if not any(tensors(self._few[one]) for one in node.all_input_nodes):
            return True
        return asks_shape(node)

    def _in_evaluation(self, node: fx.Node, module: nn.Module) -> Any:
        """Return the output of `module` in eval mode, if it is in training mode."""
        if not any(part.training for part in module.modules()):
            return None
        args, kwargs = self._run.fetch_args_kwargs_from_env(node)
        with restore_attributes(module):
            return module.eval()(*_cloned(args), **_cloned(kwargs))

    def _again(self, images: Tensor) -> None:
        """Run the prefix on more images."""
        self._run.env = self._more
        for node in self._prefix:
            self._more[node] = images if node.op == "placeholder" else self._run.run_node(node)

    def _module(self, node: fx.Node) -> nn.Module | None:
        """Return the module that `node` calls, if any."""
        if node.op != "call_module":
            return None
        return Wrapper(self._model).get_submodule(str(node.target))


def _cloned(values: Any) -> Any:
    return tree_map(lambda one: one.detach().clone() if isinstance(one, Tensor) else one, values)


def _equal(one: Any, other: Any) -> bool:
    pairs = zip(tree_flatten(one)[0], tree_flatten(other)[0], strict=False)
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)

"""Tracing of a network as a graph, opening modules only as far as necessary to separate frozen
layers."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, ItemsView, Iterable, Iterator, Mapping, ValuesView
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten

MODES = "ambient"
"""Key of a node's `meta`: the modes of torch under which it was recorded (see `torch_modes`)."""
_ATTRIBUTES = {"shape", "dtype", "device", "ndim", "layout", "is_cuda", "itemsize"}
_METHODS = {"size", "dim", "numel", "ndimension", "nelement", "is_floating_point", "get_device"}
"""Attributes and methods of a tensor that do not depend on its values."""
FEW, MORE = 2, 3
"""Numbers of noise images on which a network is tried, to reveal what depends on their number."""


@dataclass(frozen=True)
class Trace:
    """The computation of `forward` in one mode, node by node in order."""

    graph: fx.Graph
    constants: Mapping[str, Tensor]
    """Tensors that `forward` creates independently of the images, by the names that nodes have for
    them."""
    obstacle: str | None
    """Reason why a module with frozen layers could not be opened, if any."""

    @property
    def nodes(self) -> list[fx.Node]:
        """All nodes in order."""
        return list(self.graph.nodes)

    def module(self, model: nn.Module, part: fx.Graph) -> nn.Module:
        """Return a module that computes `part` of the graph with the modules of `model`."""
        return fx.GraphModule(Wrapper(model, self.constants), part)


class Wrapper(nn.Module):
    """A network one level down, so that its own hooks are recorded as well."""

    def __init__(self, network: nn.Module, constants: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.network = network
        for name, value in (constants or {}).items():
            setattr(self, name, value)

    def forward(self, images: Tensor) -> Any:
        """Run the network."""
        return self.network(images)


class CannotPartition(Exception):
    """Raised, with the reason in one line, for a network that cannot be cut."""


def trace(model: nn.Module, frozen: Iterable[nn.Module], images: Tensor) -> Trace:
    """Record what `model` does in the current modes of its modules.

    Modules that are entirely `frozen` stay whole, as does everything after the first trainable
    weight. If `forward` branches on a shape, it is that of `images`, MORE of them. Consumes no
    random numbers. Raises CannotPartition.
    """
    try:
        recorded = _recorded(model, _Tracer(frozen, images, numbers=False))
        if recorded.obstacle is None:
            return recorded
    except CannotPartition:
        pass  # what is given to torch.zeros, for one, has to be a number
    return _recorded(model, _Tracer(frozen, images, numbers=True))


def _recorded(model: nn.Module, tracer: _Tracer) -> Trace:
    root, chance = Wrapper(model), RngState(tracer.device)
    try:
        with torch.enable_grad():
            graph = tracer.trace(root)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever code of the user's makes of proxies
        raise CannotPartition(error_line(error)) from error
    finally:
        drawn = chance.drawn()
        chance.restore()
    if drawn:
        raise CannotPartition("it draws random numbers that do not depend on the images")
    constants = {
        name: value
        for name, value in vars(root).items()
        if isinstance(value, Tensor)  # kept as plain attributes
    } | dict(root.named_buffers(recurse=False))
    for node in list(graph.nodes):
        if asks_shape(node) and len(node.all_input_nodes) == 1:
            node.all_input_nodes[0].append(node)  # a shape alone does not need the tensor later
    return Trace(graph, constants, tracer.obstacle)


def asks_shape(node: fx.Node) -> bool:
    """Return whether `node` asks a tensor for something that does not depend on its values."""
    if node.target is getattr:
        return node.args[1] in _ATTRIBUTES
    return node.op == "call_method" and node.target in _METHODS


class _Tracer(fx.Tracer):
    """Records modules whole, except those that may contain the boundary of the frozen part. With
    `numbers`, sizes that do not depend on the number of images become numbers at once."""

    proxy_buffer_attributes = True
    trace_asserts = True

    def __init__(self, frozen: Iterable[nn.Module], images: Tensor, *, numbers: bool) -> None:
        super().__init__()
        self.device, self._numbers = images.device, numbers
        self._sizes: set[fx.Node] = set()
        self._frozen = {id(part) for module in frozen for part in module.modules()}
        self._past = False
        self._attributes: dict[str, fx.Proxy] = {}
        self._shapes = _Shapes(images)
        self.obstacle: str | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self._past or not self._opened(m)

    def _opened(self, module: nn.Module) -> bool:
        """Return whether `module` may contain the boundary."""
        parts = list(module.modules())
        builtin = type(module).__module__.startswith("torch.nn.")
        if builtin and not isinstance(module, nn.Sequential) and not self._mixed(module):
            return False
        return len(parts) > 1 and not all(id(part) in self._frozen for part in parts)

    def _mixed(self, module: nn.Module) -> bool:
        """Return whether a part of `module` is frozen and another is trainable."""
        learns = any(weight.requires_grad for weight in module.parameters())
        return learns and any(id(part) in self._frozen for part in module.modules())

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if self._shapes.busy:
            return forward(*args, **kwargs)
        nodes, stack = len(self.graph.nodes), dict(self.module_stack)
        name = self.path_of_module(m)
        learns = any(weight.requires_grad for weight in m.parameters())
        leaf = self.is_leaf_module(m, name)
        self._past |= leaf and learns
        try:
            if not leaf and (m._backward_hooks or m._backward_pre_hooks):
                raise CannotPartition(f"{type(m).__name__} has a hook on its gradients")
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:
            if leaf or name == "network":
                raise  # nothing around it to go on with
            if self._mixed(m):
                self.obstacle = f"{type(m).__name__} cannot be traced ({error_line(error)})"
            self._forget(nodes)
            self.module_stack.clear()
            self.module_stack.update(stack)
            self._past |= learns
            return self.create_proxy("call_module", name, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        if self._shapes.busy:
            return attr_val
        self._attributes = parameter_proxy_cache
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def create_proxy(self, *args: Any, **kwargs: Any) -> Any:
        proxy = super().create_proxy(*args, **kwargs)
        node, inputs = proxy.node, proxy.node.all_input_nodes
        if not self._numbers or not inputs:
            return proxy
        if not asks_shape(node) and not all(one in self._sizes for one in inputs):
            return proxy
        self._sizes.add(node)
        try:
            value = self.known(node)
        except CannotPartition:
            return proxy
        if isinstance(value, int | float):
            self.graph.erase_node(node)
            return value
        return proxy

    def known(self, node: fx.Node) -> Any:
        """Return the value of `node`, a shape or something computed from shapes. Raises
        CannotPartition for any other node, and if the value depends on the number of images."""
        return self._shapes.known(node, self.root)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(self.known(obj.node))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        length = self._shapes.length(obj.node, self.root)
        listed = self.create_proxy("call_function", list, (obj,), {})
        return iter([listed[place] for place in range(length)])

    def _forget(self, count: int) -> None:
        """Remove all nodes except the first `count`."""
        gone = list(self.graph.nodes)[count:]
        for node in reversed(gone):
            self.graph.erase_node(node)
        for name, proxy in list(self._attributes.items()):
            if proxy.node in gone:
                del self._attributes[name]

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta[MODES] = torch_modes()
        return node


class _Value(fx.Proxy):
    """A value in `forward`; a number computed from shapes can be used as one."""

    tracer: _Tracer

    def __getattr__(self, name: str) -> Any:
        if name in _ATTRIBUTES:  # at once: later the tensor itself may not be there
            return self.tracer.create_proxy("call_function", getattr, (self, name), {})
        return super().__getattr__(name)

    def __setitem__(self, place: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, place, value), {})

    def __index__(self) -> int:
        return int(self.tracer.known(self.node))

    __int__ = __index__

    def __float__(self) -> float:
        return float(self.tracer.known(self.node))

    def __len__(self) -> int:
        return self.tracer._shapes.length(self.node, self.tracer.root)


class Runner(fx.Interpreter):
    """Runs nodes one by one; their values are in `env`."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        super().__init__(root, garbage_collect_values=False, graph=graph)

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a node, in containers that it may change."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return tuple(map(_own, args)), {name: _own(value) for name, value in kwargs.items()}


def _own(value: Any) -> Any:
    """Return lists and dictionaries as `forward` makes them, which may be changed."""
    if isinstance(value, list):
        return [_own(one) for one in value]
    if isinstance(value, dict):
        return {name: _own(one) for name, one in value.items()}
    return tuple(map(_own, value)) if type(value) is tuple else value


class _Shapes:
    """Shapes of recorded values, for FEW and for MORE images."""

    def __init__(self, images: Tensor) -> None:
        self._images = images[:FEW], images
        self._values: tuple[dict[fx.Node, Any], ...] = {}, {}
        self.busy = False

    def known(self, node: fx.Node, root: nn.Module) -> Any:
        """See `_Tracer.known`."""
        few, more = self._run(node, root)
        for one in _ancestors(node):
            value = few[one]
            if isinstance(value, torch.Size) or tensors(value):
                continue
            of_tensor = any(tensors(few[argument]) for argument in one.all_input_nodes)
            if value != more[one] or (of_tensor and not asks_shape(one)):
                raise CannotPartition(NOT_KNOWN)
        if tensors(few[node]):
            raise CannotPartition(NOT_KNOWN)
        return few[node]

    def length(self, node: fx.Node, root: nn.Module) -> int:
        """Return the length of the value of `node`, which is not a tensor. Raises
        CannotPartition."""
        few, more = (values[node] for values in self._run(node, root))
        if isinstance(few, Tensor) or not hasattr(few, "__len__") or len(few) != len(more):
            raise CannotPartition(NOT_KNOWN)
        return len(few)

    def _run(self, node: fx.Node, root: nn.Module) -> tuple[dict[fx.Node, Any], ...]:
        """Return the values of `node` and of everything that it depends on."""
        wanted = _ancestors(node)
        chance = RngState(self._images[0].device)
        self.busy = True
        try:
            with torch.no_grad(), restore_buffers(root):
                for images, values in zip(self._images, self._values, strict=True):
                    runner = Runner(root, node.graph)
                    runner.env = values
                    for one in wanted:
                        if one.op == "placeholder":
                            values.setdefault(one, images.clone())
                        elif one not in values:
                            values[one] = runner.run_node(one)
        finally:
            self.busy = False
            chance.restore()
        return self._values


NOT_KNOWN = "its forward branches on the contents or the number of the images"


def _ancestors(node: fx.Node) -> list[fx.Node]:
    """Return `node` and everything that it depends on, in order."""
    ancestors, open_ = {node}, [node]
    while open_:
        new = [one for one in open_.pop().all_input_nodes if one not in ancestors]
        ancestors.update(new)
        open_ += new
    return [one for one in node.graph.nodes if one in ancestors]


def tensors(value: Any) -> list[Tensor]:
    """Return all tensors in a nested structure."""
    listed = list(value) if isinstance(value, ValuesView | ItemsView) else value
    return [one for one in tree_flatten(listed)[0] if isinstance(one, Tensor)]


def torch_modes() -> tuple[object, ...]:
    """Return the modes of torch that `forward` may change temporarily, which no graph records:
    whether gradients are recorded, then mixed precision by kind of device."""
    kinds = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
             for kind in ("cpu", "cuda")]  # fmt: skip
    return torch.is_grad_enabled(), *kinds


def error_line(error: Exception) -> str:
    """Return the reason in one line."""
    if isinstance(error, CannotPartition):
        return str(error)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class RngState:
    """The states of all random generators that a network may draw from."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._states = self._now()

    def _now(self) -> tuple[Any, ...]:
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        if self._device.type == "cuda":
            return *states, torch.cuda.get_rng_state(self._device)
        if self._device.type == "mps":
            return *states, torch.mps.get_rng_state()
        return states

    def drawn(self) -> bool:
        """Return whether anything was drawn since."""
        return _comparable(self._states) != _comparable(self._now())

    def restore(self) -> None:
        """Restore those states."""
        random.setstate(self._states[0])
        np.random.set_state(self._states[1])
        torch.set_rng_state(self._states[2])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(self._states[3], self._device)
        elif self._device.type == "mps":
            torch.mps.set_rng_state(self._states[3])


def _comparable(state: Any) -> object:
    if isinstance(state, tuple):
        return tuple(map(_comparable, state))
    return (
        state.tobytes()
        if isinstance(state, np.ndarray)
        else (state.numpy().tobytes() if isinstance(state, Tensor) else state)
    )


@contextmanager
def restore_attributes(model: nn.Module) -> Iterator[list[str]]:
    """Restore the attributes of all modules of `model`, their mode included, on exit; yield a list
    that then names the numbers and strings that changed, apart from the mode."""
    before = [(module, dict(vars(module))) for module in model.modules()]
    changed: list[str] = []
    try:
        yield changed
    finally:
        for module, attributes in before:
            after = vars(module)
            changed += [
                f"{type(module).__name__}.{name}"
                for name, value in attributes.items()
                if isinstance(value, int | float | str) and name != "training"
                if isinstance(new := after.get(name), int | float | str) and new != value
            ]
            after.clear()
            after.update(attributes)


@contextmanager
def restore_buffers(module: nn.Module | None) -> Iterator[list[str]]:
    """Restore the buffers of `module` on exit; yield a list that then names those that changed."""
    changed: list[str] = []
    before = {} if module is None else dict(module.named_buffers())
    copies = {name: value.clone() for name, value in before.items()}
    try:
        yield changed
    finally:
        for name, value in before.items():
            path, _, last = name.rpartition(".")
            owner = module.get_submodule(path) if module is not None else None
            assert owner is not None
            if owner._buffers.get(last) is not value or not torch.equal(value, copies[name]):
                changed.append(name)
                owner._buffers[last] = value.copy_(copies[name])

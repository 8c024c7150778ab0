"""The computation of a network as a graph, opened no further than its frozen part asks for."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

AMBIENT = "ambient"
"""Key of a node's `meta`: the modes of torch under which it was recorded (see `ambient`)."""
_OF_SHAPE = {
    *("shape", "dtype", "device", "ndim", "layout", "is_cuda", "itemsize"),
    *("size", "dim", "numel", "ndimension", "nelement", "is_floating_point", "get_device"),
}
"""Attributes and methods of a tensor that say nothing of its values."""


@dataclass(frozen=True)
class Trace:
    """What `forward` does in one mode, node by node in its order."""

    graph: fx.Graph
    constants: Mapping[str, Tensor]
    """Tensors that `forward` makes without its images, by the names that nodes have for them."""
    obstacle: str | None
    """Why a module with frozen layers was not opened, where one could not be."""

    @property
    def nodes(self) -> list[fx.Node]:
        return list(self.graph.nodes)

    def module(self, model: nn.Module, part: fx.Graph) -> nn.Module:
        """What computes `part` of the graph with the modules of `model`."""
        return fx.GraphModule(Whole(model, self.constants), part)


class Whole(nn.Module):
    """A network one level down, so that its own hooks are among what is recorded."""

    def __init__(self, network: nn.Module, constants: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.network = network
        for name, value in (constants or {}).items():
            setattr(self, name, value)

    def forward(self, images: Tensor) -> Any:
        return self.network(images)


class Uncut(Exception):
    """A network cannot be cut; the reason in a line."""


def trace(model: nn.Module, frozen: Iterable[nn.Module], device: torch.device) -> Trace:
    """Record what `model` does in the modes that its modules are in.

    Modules all of whose parts are `frozen` stay whole, and all that comes after the first weight
    that learns. Consumes no random numbers. Raises Uncut.
    """
    root, chance = Whole(model), Chance(device)
    tracer = _Tracer(frozen)
    try:
        with torch.enable_grad():
            graph = tracer.trace(root)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever code of the user's makes of proxies
        raise Uncut(told(error)) from error
    finally:
        drawn = chance.drawn()
        chance.restore()
    if drawn:
        raise Uncut("it draws random numbers that do not depend on the images")
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
    """Whether `node` asks a tensor for something that does not depend on its values."""
    return (node.args[1] if node.target is getattr else node.target) in _OF_SHAPE


class _Tracer(fx.Tracer):
    """Records modules whole, but for those through which the frontier may run."""

    proxy_buffer_attributes = True
    trace_asserts = True

    def __init__(self, frozen: Iterable[nn.Module]) -> None:
        super().__init__()
        self._frozen = {id(part) for module in frozen for part in module.modules()}
        self._past = False
        self.obstacle: str | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self._past or not self._opened(m)

    def _opened(self, module: nn.Module) -> bool:
        """Whether there is something to be found in `module`."""
        builtin = type(module).__module__.startswith("torch.nn.")
        if builtin and not isinstance(module, nn.Sequential):
            return False
        parts = list(module.modules())
        return len(parts) > 1 and not all(id(part) in self._frozen for part in parts)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        nodes, stack = len(self.graph.nodes), dict(self.module_stack)
        name = self.path_of_module(m)
        if self.is_leaf_module(m, name):
            self._past |= any(weight.requires_grad for weight in m.parameters())
        elif m._backward_hooks or m._backward_pre_hooks:
            raise Uncut(f"{type(m).__name__} has a hook on its gradients")
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:
            if name == "network" or self.is_leaf_module(m, name):
                raise  # nothing around it to go on with
            if any(id(part) in self._frozen for part in m.modules()):
                self.obstacle = f"{type(m).__name__} cannot be traced ({told(error)})"
            self._forget(nodes)
            self.module_stack.clear()
            self.module_stack.update(stack)
            self._past |= any(weight.requires_grad for weight in m.parameters())
            return self.create_proxy("call_module", name, args, kwargs)

    def _forget(self, count: int) -> None:
        """Remove all nodes but the first `count`."""
        for node in reversed(list(self.graph.nodes)[count:]):
            self.graph.erase_node(node)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta[AMBIENT] = ambient()
        return node


def ambient() -> tuple[object, ...]:
    """Modes of torch that `forward` may change for a while, which no graph records: whether
    gradients are recorded, then mixed precision by kind of device."""
    kinds = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
             for kind in ("cpu", "cuda")]  # fmt: skip
    return torch.is_grad_enabled(), *kinds


def told(error: Exception) -> str:
    """The reason in a line."""
    if isinstance(error, Uncut):
        return str(error)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class Chance:
    """The states of all generators that a network may draw from."""

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
        """Whether anything was drawn since."""
        return _comparable(self._states) != _comparable(self._now())

    def restore(self) -> None:
        """Go back to those states."""
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
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Every module of `model` leaves in the mode, training or evaluation, in which it came."""
    before = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in before:
            module.training = training

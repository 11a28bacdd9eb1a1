"""Backward pass in Python, because autograd's engine needs a CUDA driver for tensors on a GPU.

As in the engine, a node is called after all gradients of its outputs are computed. Of several such
nodes, leaves come first, then the node created last. A node's saved tensors are freed after the
call.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import GraphExecGroup


class Saved:
    """Reference to a tensor that a node saved for its backward pass."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor


@contextmanager
def freeable_graph() -> Iterator[list[Saved]]:
    """Save tensors of the block's graphs in :class:`Saved`, so that they can be freed one by one.

    Yields a list. When a node reads a saved tensor, its :class:`Saved` is added to this list.
    """
    read: list[Saved] = []

    def unpack(saved: Saved) -> Tensor:
        assert saved.tensor is not None, "a second backward pass through the same graph"
        read.append(saved)
        return saved.tensor

    with torch.autograd.graph.saved_tensors_hooks(Saved, unpack):
        yield read


def backward(loss: Tensor, gradient: Tensor | None, read: list[Saved]) -> None:
    """Add the gradients of ``loss`` to its leaves; free the graph's saved tensors.

    Args:
        loss: output of a graph that was built in :func:`freeable_graph`.
        gradient: gradient of ``loss``; None for a scalar.
        read: the list from :func:`freeable_graph`.
    """
    root = loss.grad_fn
    assert root is not None
    waiting = _uses(root)
    gradients: dict[Any, dict[int, Tensor]] = {
        root: {loss.output_nr: torch.ones_like(loss) if gradient is None else gradient}
    }
    ready = [(-root._sequence_nr(), 0, root)]  # type: ignore[attr-defined]
    order = 0
    with torch.no_grad(), GraphExecGroup():
        while ready:
            node = heapq.heappop(ready)[2]
            found = gradients.pop(node, {})
            if hasattr(node, "variable"):
                if found:
                    _accumulate(node.variable, found[0])
                continue
            outputs = [found.get(i) for i in range(len(node._input_metadata))]
            del found
            inputs = node(*outputs) if any(g is not None for g in outputs) else None
            del outputs
            for saved in read:
                saved.tensor = None
            read.clear()
            inputs = list(inputs) if isinstance(inputs, tuple) else [inputs]
            for (following, slot), found_gradient in zip(
                node.next_functions, inputs + [None] * len(node.next_functions), strict=False
            ):
                if following is None:
                    continue
                if found_gradient is not None:
                    known = gradients.setdefault(following, {})
                    fitted = _fitted(found_gradient, following._input_metadata[slot])
                    known[slot] = known[slot] + fitted if slot in known else fitted
                waiting[following] -= 1
                if not waiting[following]:
                    order += 1
                    # Leaves come first, as in the engine, so that their gradients are freed early.
                    leaf = hasattr(following, "variable")
                    rank = -(2**62) if leaf else -following._sequence_nr()
                    heapq.heappush(ready, (rank, order, following))
            del inputs, found_gradient


def _uses(root: Any) -> Counter[Any]:
    """Count how many edges pass a gradient to each node below ``root``."""
    uses: Counter[Any] = Counter()
    seen, stack = {root}, [root]
    while stack:
        for following, _ in stack.pop().next_functions:
            if following is not None:
                uses[following] += 1
                if following not in seen:
                    seen.add(following)
                    stack.append(following)
    return uses


def _fitted(gradient: Tensor, expected: Any) -> Tensor:
    """Sum a gradient over broadcast dimensions and convert its dtype, as the engine does."""
    if gradient.shape != expected.shape:
        gradient = gradient.sum_to_size(expected.shape)
    return gradient.to(expected.dtype)


def _accumulate(leaf: Tensor, gradient: Tensor) -> None:
    if leaf.grad is None:
        same = gradient.stride() == leaf.stride()
        leaf.grad = gradient.detach() if same else torch.empty_like(leaf).copy_(gradient)
    else:
        leaf.grad.add_(gradient)
    for hook in (leaf._post_accumulate_grad_hooks or {}).values():  # type: ignore[attr-defined]
        hook(leaf)

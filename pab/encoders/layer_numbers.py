"""Map parameter names to layers, and find parameters without weight decay.

Used for layer-wise decay of the learning rate, as in BEiT (arXiv 2106.08254). The names are those
of the transformer models of OpenCLIP, timm and transformers.

Convolutional image towers are not numbered by block. Beside a text tower of N blocks, a ResNet of
OpenCLIP has its ``conv1`` weights and its positional embedding in layer N, and all other parameters
in layer N + 1. A ConvNeXt of timm has one layer per stage, and its stem is in layer N + 1. With
layer-wise decay, the learning rates of a ResNet are therefore reduced once or not at all, and a
ConvNeXt's stem keeps the full learning rate.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from torch import Tensor

BLOCK = re.compile(r"\.(?:resblocks|blocks|layers?|stages)\.(\d+)\.")
BEFORE_BLOCKS = re.compile(r"embed|class_token|cls_token|conv1|ln_pre|norm_pre|patch")
EMBEDDINGS = re.compile(r"embed|query_tokens|class_token|cls_token")


def layer_in_tower(name: str, blocks: int) -> int:
    """Return a parameter's layer: 0 before the N ``blocks``, 1 to N in them, N + 1 after them."""
    found = BLOCK.search(name)
    if found:
        return int(found[1]) + 1
    return 0 if BEFORE_BLOCKS.search(name) else blocks + 1


def blocks_of(names: Iterable[str]) -> int:
    """Count the blocks of the tower with these parameters."""
    return max((int(found[1]) + 1 for name in names if (found := BLOCK.search(name))), default=0)


def two_tower_layers(
    names: Iterable[str], is_image: Callable[[str], bool]
) -> tuple[int, Callable[[str], int]]:
    """Number the layers of a two-tower model; align towers of different depth at the top.

    Args:
        names: names of all parameters.
        is_image: returns true for parameters of the image tower.

    Returns:
        Number of blocks of the deeper tower, and a function from a name to its layer, 0 to
        blocks + 1.
    """
    names = list(names)
    depth = {
        kind: blocks_of(name for name in names if is_image(name) == kind) for kind in (True, False)
    }
    deepest = max(depth.values())

    def layer_of(name: str) -> int:
        blocks = depth[is_image(name)]
        return deepest - blocks + layer_in_tower(name, blocks)

    return deepest, layer_of


def no_weight_decay(name: str, parameter: Tensor) -> bool:
    """Return true for biases, norms, temperatures and embeddings, which have no weight decay."""
    return parameter.ndim < 2 or bool(EMBEDDINGS.search(name))

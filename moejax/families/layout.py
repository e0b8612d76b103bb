"""The parameter tree of a model as files see it: its leaves and shapes, and where each layer lies in it.

The tree itself is declared by the modules of moejax/model; everything here is read off their shapes, so that there is no second list
of weights to keep in step. Weights are output-major ([out, in]), as PyTorch stores them, so that importing a checkpoint is a copy.
Layers are stacked by position in their period: with n = moe_every, layer p * n + j is slice p of `layers/block_{j}`; the layers that do
not fill a period lie unstacked in `layer_{l}`. Paths are the paths of a checkpoint on disk too.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from moejax.config import ModelConfig
from moejax.model import transformer

Shape = tuple[int, ...]
Path = tuple[str, ...]

ROUTER_BIAS = "moe/router/bias"  # there with config.router_bias; float32, whatever config.param_dtype says
EXPERT_LEAVES = ("moe/gate/kernel", "moe/up/kernel", "moe/down/kernel")


def abstract_parameters(config: ModelConfig) -> dict[str, Any]:
    """The whole tree as nested dicts of jax.ShapeDtypeStruct, of dtype config.param_dtype (but for ROUTER_BIAS); nothing is allocated.

    Always the stacked tree, which is the one on disk, whatever config.scan_layers says.
    """
    return transformer.abstract_parameters(dataclasses.replace(config, scan_layers=True))


def outer_leaves(config: ModelConfig) -> dict[str, Shape]:
    """Leaves outside the layers: name -> shape."""
    leaves = flatten_leaves(abstract_parameters(config))
    return {"/".join(path): leaf.shape for path, leaf in leaves.items() if not path[0].startswith("layer")}


def block_leaves(config: ModelConfig, layer: int) -> dict[str, Shape]:
    """Leaves of layer `layer` (0-based), relative to its block: name -> shape. Expert leaves have the experts first."""
    block, index = locate_layer(config, layer)
    tree = abstract_parameters(config)
    for name in block:
        tree = tree[name]
    return {"/".join(path): leaf.shape[len(index) :] for path, leaf in flatten_leaves(tree).items()}


def locate_layer(config: ModelConfig, layer: int) -> tuple[Path, Shape]:
    """Where layer `layer` (0-based) lies: the path of its block, and the index into the block's stacked arrays (empty: unstacked)."""
    period = config.moe_every
    if layer < config.num_layers // period * period:
        return ("layers", f"block_{layer % period}"), (layer // period,)
    return (f"layer_{layer}",), ()


def insert_leaf(tree: dict[str, Any], path: Path, value: Any) -> None:
    """Puts `value` at `path` of a nested dict, making the dicts on the way."""
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


def flatten_leaves(tree: dict[str, Any], prefix: Path = ()) -> dict[Path, Any]:
    """A nested dict as one dict from paths to leaves."""
    leaves: dict[Path, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            leaves |= flatten_leaves(value, (*prefix, name))
        else:
            leaves[(*prefix, name)] = value
    return leaves

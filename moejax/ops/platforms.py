"""What a program does on one kind of device, decided when it is lowered for that kind and not before.

A program for a CPU is traced together with its branches for other devices (`lax.platform_dependent`). What asks for a GPU that is
there, imports a package that only GPUs need, or refuses a shape must not run then: `trace_at_lowering` puts it off.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.core
from jax.extend import backend
from jax.extend.core import Primitive
from jax.interpreters import mlir

from moejax.checks import UserError

_late = Primitive("trace_at_lowering")
_late.multiple_results = True


def trace_at_lowering(function: Callable[..., Any], *args: Any, like: Any) -> Any:
    """`function(*args)`, traced only when the program around it is lowered; its result has the shapes and types of `like`.

    Has no derivative: use it inside both halves of a `jax.custom_vjp`.
    """
    flat, tree = jax.tree.flatten(args)
    shapes, result_tree = jax.tree.flatten(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), like))
    found = _late.bind(*flat, function=function, tree=tree, shapes=tuple((shape.shape, shape.dtype) for shape in shapes))
    return jax.tree.unflatten(result_tree, found)


def _run(*flat, function, tree, shapes):
    found = jax.tree.leaves(function(*jax.tree.unflatten(tree, flat)))
    if [(leaf.shape, leaf.dtype) for leaf in found] != list(shapes):
        raise TypeError(f"{function} gave {[(leaf.shape, leaf.dtype) for leaf in found]}, but was said to give {list(shapes)}")
    return found


_late.def_abstract_eval(lambda *_, shapes, **__: [jax.core.ShapedArray(*shape) for shape in shapes])
_late.def_impl(lambda *flat, **settings: jax.jit(functools.partial(_run, **settings))(*flat))
mlir.register_lowering(_late, mlir.lower_fun(_run, multiple_results=True))


def gpu_capability() -> float | None:
    """The compute capability of the GPU that programs run on by default, as 9.0 of an H100; None where that is no NVIDIA GPU."""
    device = backend.get_default_device()
    capability = getattr(device, "compute_capability", None) if device.platform == "gpu" else None
    try:
        return None if capability is None else float(capability)
    except ValueError:  # gfx942: AMD's
        return None


def import_tokamax(module: str, purpose: str) -> Any:
    """tokamax's kernels. Raises UserError naming the extra where the package is missing."""
    import importlib

    try:
        from absl import flags

        loaded = importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f'{purpose} needs tokamax, which is not installed or does not load ({error}); pip install "moejax[cuda]"'
        ) from error
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # tokamax would otherwise read our command line, and refuse it
    return loaded


@functools.cache
def say_once(message: str) -> None:
    """Says on stderr, once a process and for the first process alone, which way is taken."""
    if jax.process_index() == 0:
        print(message, file=sys.stderr)

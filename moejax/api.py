"""The public functions that stand on everything else: load, save, generate, load_tokenizer."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from jax import numpy as jnp
from jax.sharding import Mesh

from moejax.cache_config import CacheConfig
from moejax.config import ModelConfig, UserError
from moejax.families.layout import flatten_leaves
from moejax.generation_config import settings_per_row
from moejax.model.partition import parameter_shardings
from moejax.model.transformer import Transformer, stack_layers, unstack_layers
from moejax.serving.engine import Engine
from moejax.sharding import check_mesh


def load(
    path: str | Path,
    mesh: Mesh | None = None,
    dtype: Any = None,
    quantize: str | None = None,
    *,
    verify: bool = True,
    revision: str | None = None,
) -> tuple[Transformer, dict[str, Any], Any]:
    """Reads a checkpoint: (model, variables, tokenizer).

    path: a run directory of ours (its newest checkpoint), one checkpoint of ours, a Hugging Face directory of a Mixtral or
    an Arctic model (safetensors, one file or sharded), a Mixtral in Mistral's own layout (params.json and
    consolidated.*; .pth and .pt files need the `torch` extra), or an id of the Hugging Face Hub ("organisation/model"; `revision` is a
    branch, a tag or a commit), whose files are fetched once. mesh: from `make_mesh`; every weight goes straight to where it lies on it.
    dtype: of weights and compute, "float32", "bfloat16" or "float16"; None keeps the checkpoint's. With float32, matmuls run at full
    precision on every platform. The tokenizer is None where the directory has none. `model.config` is the ModelConfig;
    `model.apply(variables, tokens)` runs the model. verify: every file of a checkpoint of ours is first compared with the checksum it was
    written with, which reads it once more.

    Raises UserError, before a weight is read, for a path that holds no such checkpoint and for formats that are not read
    (by name), and for tensors that are missing, unexpected or of the wrong shape, and names a file that is damaged.
    `quantize` is not there yet and raises NotImplementedError.
    """
    from moejax.checkpoint import detect, hub, store
    from moejax.checkpoint.source import open_source, read_tree
    from moejax.data.text import find_tokenizer

    if quantize is not None:
        raise NotImplementedError(f"load(quantize={quantize!r}) is not implemented yet; leave quantize out")
    name = None if dtype is None else _dtype_name(dtype)
    path, _ = hub.locate(path, revision, lambda text: print(text, file=sys.stderr))
    kind, directory = detect.find_checkpoint(path)
    if kind != "moejax":
        with open_source(directory, name) as source:
            source.dtype = source.config.param_dtype  # one dtype for all, where the files have several
            config = source.config
            params = read_tree(source, _placer(config, mesh))
    else:
        if verify:
            store.verify(directory)
        config = store.read_metadata(directory).config
        config = config if name is None else replace(config, dtype=name, param_dtype=name)
        params = store.restore_params(directory, config, config.param_dtype, _shardings(config, mesh), verify=False)  # it is, by now
        params = params if mesh is not None else jax.tree.map(jnp.asarray, params)
    params = params if config.scan_layers else unstack_layers(params, config)
    tokenizer = find_tokenizer(directory) or find_tokenizer(Path(path))
    return Transformer(config, mesh), {"params": params}, tokenizer


def _shardings(config: ModelConfig, mesh: Mesh | None) -> dict[str, Any] | None:
    """Where each parameter of the stacked tree goes. Raises UserError for a mesh that cannot hold the model."""
    if mesh is None:
        return None
    check_mesh(config, mesh)
    return parameter_shardings(replace(config, scan_layers=True), mesh)


def _placer(config: ModelConfig, mesh: Mesh | None) -> Callable[[tuple[str, ...], Any], Any]:
    """(path, array) -> the array on the devices."""
    shardings = _shardings(config, mesh)
    if shardings is None:
        return lambda path, array: jnp.asarray(array)
    places = flatten_leaves(shardings)
    return lambda path, array: jax.device_put(array, places[path])


def _dtype_name(dtype: Any) -> str:
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in ("float32", "bfloat16", "float16"):
        raise UserError(f"load(dtype={dtype!r}): expected 'float32', 'bfloat16' or 'float16', or None to keep the checkpoint's")
    return name


def save(path: str | Path, model: Transformer, variables: dict[str, Any], tokenizer: Any = None) -> None:
    """Writes a checkpoint that `load` reads: weights, model config and tokenizer, complete or not at all.

    Raises UserError where `path` exists, where the disk is full, and for variables that are not this model's.
    """
    from moejax.checkpoint import store

    def write_tokenizer(directory: Path) -> None:
        if tokenizer is not None:
            tokenizer.save(directory)

    params = variables["params"]
    if not model.config.scan_layers:
        params = stack_layers(params, model.config)
    store.save(path, params, model.config, write_extra=write_tokenizer)


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer in a directory (run, checkpoint, Hugging Face) or file: .encode(text), .decode(ids), .chat(messages) -> ids."""
    from moejax.data import text

    return text.load_tokenizer(path)


def generate(
    model: Transformer,
    variables: dict[str, Any],
    tokenizer: Any,
    prompts: str | Sequence[Any],
    max_new_tokens: Any = 64,
    temperature: Any = 0.0,
    ignore_eos: Any = False,
    *,
    top_k: Any = 0,
    top_p: Any = 1.0,
    seed: Any = 0,
    return_details: bool = False,
    return_routing: bool = False,
    cache: CacheConfig = CacheConfig(),  # noqa: B008  # frozen
    **options: Any,
) -> Any:
    """Continues prompts: a text or a list of texts gives a text or a list of texts (the new part alone); a list of token ids,
    or a list of such lists, gives new token ids. EOS ends a row and is not returned, unless `ignore_eos`.

    temperature 0 is greedy; top_k 0 and top_p 1 are off. Further options: min_p, repetition_penalty, frequency_penalty,
    presence_penalty, logit_bias ({id: value}), stop (texts that end a row, and are not returned; its ids keep the tokens that spell
    them), stop_token_ids, logprobs and prompt_logprobs (how many most likely tokens beside the chosen one): the fields of
    `moejax.generation_config.GenerationSettings`. Each is one value for all prompts or a list with one per prompt; of one seed, row i
    draws with seed + i. A row's continuation does not depend on the rows beside it.

    return_details gives `moejax.serving.generation.Generation`s instead: .tokens, .text, .finish_reason ("stop" or "length"), .logprobs,
    .prompt_logprobs, and with return_routing .routing: experts and weights [tokens, MoE layers, A] of all tokens that the model read.
    cache: what is kept of the tokens read, as CacheConfig("sinks", sinks=4, window=1020); the default keeps all.

    For more than a call or two make a `moejax.serving.engine.Engine`, which prepares the weights once. Raises UserError, naming field and
    row, for options that make no sense, texts without a tokenizer, an empty prompt and a token outside the vocabulary.
    """
    single = isinstance(prompts, str) or (len(prompts) > 0 and not isinstance(prompts[0], str) and not hasattr(prompts[0], "__len__"))
    batch = [prompts] if single else list(prompts)
    named = {"max_new_tokens": max_new_tokens, "temperature": temperature, "ignore_eos": ignore_eos, "top_k": top_k, "top_p": top_p}
    settings = settings_per_row({**named, "seed": seed, **options}, len(batch))
    as_text = [isinstance(prompt, str) for prompt in batch]
    if any(as_text) and tokenizer is None:
        raise UserError("generate got text but no tokenizer; pass one (moejax.load_tokenizer), or give prompts as lists of token ids")
    asks_scores = [one.logprobs is not None or one.prompt_logprobs is not None for one in settings]
    if any(asks_scores) and not return_details:
        raise UserError("logprobs and prompt_logprobs are part of the details; add return_details=True")
    if return_routing and not return_details:
        raise UserError("return_routing=True is part of the details; add return_details=True")
    ids = [tokenizer.encode(p) if is_text else [int(t) for t in p] for p, is_text in zip(batch, as_text, strict=True)]
    generations = Engine(model, variables, tokenizer=tokenizer, cache=cache).complete(ids, settings, return_routing)
    plain = [made.text if is_text else made.tokens for made, is_text in zip(generations, as_text, strict=True)]
    results = generations if return_details else plain
    return results[0] if single else results

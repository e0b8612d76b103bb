"""Rows to other devices and back: a ragged all-to-all, for code that runs inside shard_map.

Every device of a mesh axis holds rows sorted by the device they go to, and sends each device its part, however long. On TPU and GPU that
is one `ragged_all_to_all`; XLA has none on CPU, where padded blocks take the same rows to the same places.
"""

import functools
from typing import NamedTuple

import jax
from jax import Array, lax
from jax import numpy as jnp
from jaxtyping import Float, Int

LANES, SUBLANES = 128, 8  # of a TPU's tile


class Exchange(NamedTuple):
    """Which rows this device sends to each of the P devices of the axis and gets from each. All int32 [P].

    `first_sent[d]` is where the rows for d begin here, `sent[d]` how many; `first_there[d]` where they go in d's buffer; `received[s]` how
    many come from s, `first_received[s]` where they lie here, `first_at_sender[s]` where they lay there.
    """

    first_sent: Int[Array, "P"]
    sent: Int[Array, "P"]
    first_there: Int[Array, "P"]
    first_received: Int[Array, "P"]
    received: Int[Array, "P"]
    first_at_sender: Int[Array, "P"]

    def reversed(self) -> "Exchange":
        """The exchange that takes every row back to where it came from."""
        return Exchange(self.first_received, self.received, self.first_at_sender, self.first_sent, self.sent, self.first_there)


def plan_exchange(wanted: Int[Array, "P P"], buffer_rows: int, axis: str) -> tuple[Exchange, Int[Array, "P P"]]:
    """(this device's Exchange, rows that really go): wanted[s, d] rows are to go from s to d, whose buffer takes `buffer_rows`.

    A buffer is filled in the order of the senders; what does not fit stays behind, the last rows of a sender's part.
    """
    before = jnp.cumsum(wanted, axis=0) - wanted  # rows for d from the senders before s
    moved = jnp.clip(buffer_rows - before, 0, wanted)
    me = lax.axis_index(axis)
    first_sent = jnp.cumsum(wanted, axis=1) - wanted
    first_received = jnp.cumsum(moved, axis=0) - moved
    exchange = Exchange(first_sent[me], moved[me], first_received[me], first_received[:, me], moved[:, me], first_sent[:, me])
    return Exchange(*(part.astype(jnp.int32) for part in exchange)), moved


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def exchange_rows(rows: Float[Array, "N D"], exchange: Exchange, buffer_rows: int, axis: str, has_ragged: bool) -> Float[Array, "R D"]:
    """The rows that the devices of `axis` send to this one, in a buffer of `buffer_rows`; zeros where none comes.

    `has_ragged`: whether the devices have a ragged all-to-all. Said here and not decided when the program is lowered: a branch, even of
    one side, has its own schedule, and what travels in it cannot be overlapped with the work outside.
    """
    return _exchange(rows, exchange, buffer_rows, axis, has_ragged)


def _exchange(rows: Array, exchange: Exchange, buffer_rows: int, axis: str, has_ragged: bool) -> Array:
    into = jnp.zeros((buffer_rows, rows.shape[1]), rows.dtype)
    if not has_ragged:
        return exchange_padded(rows, into, exchange, axis)
    # A row must lie in one piece to travel. Left to itself a TPU cuts it in two and keeps tiles of two lines; these are whole tiles.
    width = rows.shape[1]
    tiled = (width // LANES, LANES) if width % (LANES * SUBLANES) == 0 else (width,)
    out = lax.ragged_all_to_all(
        rows.reshape(-1, *tiled),
        into.reshape(-1, *tiled),
        exchange.first_sent,
        exchange.sent,
        exchange.first_there,
        exchange.received,
        axis_name=axis,
    )
    return out.reshape(into.shape)


def exchange_padded(rows: Float[Array, "N D"], into: Float[Array, "R D"], exchange: Exchange, axis: str) -> Float[Array, "R D"]:
    """The same by an all-to-all of blocks that hold all rows: P times the traffic and the memory, everywhere available.

    It reads the same six offsets as the ragged one, so that a test of it is a test of them.
    """
    num_rows = rows.shape[0]
    within = jnp.arange(num_rows, dtype=jnp.int32)[None, :]
    source = jnp.where(within < exchange.sent[:, None], exchange.first_sent[:, None] + within, num_rows)
    blocks = jnp.take(rows, source, axis=0, mode="fill", fill_value=0)  # [P, N, D]: block d goes to d
    blocks = lax.all_to_all(blocks, axis, 0, 0, tiled=True)
    first_here = lax.all_to_all(exchange.first_there, axis, 0, 0, tiled=True)  # where each sender says that its rows go
    place = jnp.arange(into.shape[0], dtype=jnp.int32)[:, None] - first_here[None, :]
    from_sender = (place >= 0) & (place < exchange.received[None, :])  # [R, P]
    sender = jnp.argmax(from_sender, axis=1)
    index = sender * num_rows + jnp.take_along_axis(place, sender[:, None], axis=1)[:, 0]
    blocks = blocks.reshape(-1, rows.shape[1])
    taken = jnp.take(blocks, jnp.where(jnp.any(from_sender, axis=1), index, blocks.shape[0]), axis=0, mode="fill", fill_value=0)
    return jnp.where(jnp.any(from_sender, axis=1)[:, None], taken, into)


def _forward(rows: Array, exchange: Exchange, buffer_rows: int, axis: str, has_ragged: bool):
    return _exchange(rows, exchange, buffer_rows, axis, has_ragged), (exchange, rows.shape[0])


def _backward(buffer_rows: int, axis: str, has_ragged: bool, saved, gradient: Array):
    exchange, num_rows = saved
    return _exchange(gradient, exchange.reversed(), num_rows, axis, has_ragged), None


exchange_rows.defvjp(_forward, _backward)

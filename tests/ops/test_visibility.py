"""Who sees whom: masks made whole, by hand."""

import numpy as np
from jax import numpy as jnp

from moejax.ops.visibility import Indices, describe_visibility, visible_keys


def seen_by_each(visibility):
    return [list(np.flatnonzero(row)) for row in np.asarray(visible_keys(visibility))[0]]


def test_window_counts_the_query_itself():
    places = Indices(jnp.arange(6)[None])
    assert seen_by_each(describe_visibility(places, places, window=2)) == [[0], [0, 1], [1, 2], [2, 3], [3, 4], [4, 5]]


def test_segments_do_not_see_each_other():
    places = Indices(jnp.arange(5)[None], segments=jnp.array([[1, 1, 2, 2, 0]]))
    assert seen_by_each(describe_visibility(places, places)) == [[0], [0, 1], [2], [2, 3], [4]]


def test_blind_queries_are_those_that_see_no_key():
    places = Indices(jnp.arange(6)[None])
    real = Indices(places.index, real=jnp.array([[True, True, True, False, False, False]]))
    assert describe_visibility(places, places, window=2).blind is None
    windowed = describe_visibility(places, real, window=2)
    assert seen_by_each(windowed) == [[0], [0, 1], [1, 2], [2], [], []]
    assert np.asarray(windowed.blind).tolist() == [[False, False, False, False, True, True]]

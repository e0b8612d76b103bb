"""The benchmark of decoding: figures that hang together, and experts counted as they were met."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from jax import numpy as jnp

from moejax.bench import decode
from moejax.bench.counts import count_decode_bytes
from moejax.config import UserError
from tests.bench.conftest import SMALL


@pytest.mark.slow
def test_its_figures_hang_together(run_benchmark):
    result = run_benchmark(decode, decode.Arguments(model=SMALL, batch_sizes=(3,), prompt_length=5, new_tokens=4, repeats=2))
    assert [row["name"] for row in result["rows"]] == ["batch 3"]
    for row in result["rows"]:
        batch = row["batch_size"]
        assert row["tokens_per_second"] * row["seconds"] == pytest.approx(batch)
        assert row["overall_tokens_per_second"] * row["seconds_whole_call"] == pytest.approx(4 * batch)
        assert 0 < row["seconds_to_first_token"] < row["seconds_whole_call"]
        assert 2 <= row["experts_touched"] <= min(8, 2 * batch)
        parts = count_decode_bytes(SMALL, batch, 7, row["experts_touched"])  # tokens seen by the steps: 6, 7 and 8
        assert row["bytes_per_step_by_part"] == pytest.approx(parts)
        assert row["bytes_per_step"] == pytest.approx(sum(parts.values()))
        assert row["limit_tokens_per_second"] * row["fraction_of_ceiling"] == pytest.approx(row["tokens_per_second"])
    assert result["tokens_per_second"] == result["rows"][0]["tokens_per_second"] and result["new_tokens"] == 4


def test_experts_touched_are_counted_as_routed():
    """Two layers, two rows, five tokens of which two are the prompt's; the last one is met by no step."""
    experts = np.array(
        [
            [[[0, 1], [0, 1], [2, 3], [2, 3]], [[0, 1], [0, 1], [2, 3], [4, 5]]],
            [[[7, 0], [7, 0], [7, 0], [1, 2]], [[7, 0], [7, 0], [0, 6], [2, 3]]],
        ]
    )

    class Model:
        config = dataclasses.replace(SMALL, num_layers=2)

        def apply(self, variables, tokens, **wanted):
            assert tokens.shape == (2, 4) and wanted["return_routing"]
            return SimpleNamespace(routing=SimpleNamespace(experts=jnp.asarray(experts)))

    assert decode.count_touched(Model(), {}, np.zeros((2, 5), np.int32), 2) == (2 + 4 + 3 + 3) / 4


@pytest.mark.parametrize("sizes", [{"new_tokens": 1}, {"batch_sizes": ()}, {"batch_sizes": (0,)}, {"prompt_length": 0}])
def test_sizes_that_cannot_be(sizes):
    with pytest.raises(UserError, match=next(iter(sizes))):
        decode.Arguments(**sizes)

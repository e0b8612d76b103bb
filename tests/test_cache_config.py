"""What generation keeps of the tokens it has read: sizes that make no cache are refused by name."""

import re

import pytest

from moejax.cache_config import CacheConfig
from moejax.checks import UserError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "ring"}, "cache.kind='ring' is unknown; expected one of full, window, sinks"),
        ({"dtype": "int4"}, "cache.dtype='int4' is unknown; expected one of model, int8"),
        ({"window": 8}, "cache.window=8 says nothing to cache.kind='full'"),
        ({"kind": "window", "window": 0}, "cache.window=0 make no cache"),
        ({"kind": "sinks", "sinks": -1}, "cache.sinks=-1"),
        ({"kind": "sinks", "sinks": 1.5}, "cache.sinks=1.5 is of type float"),
    ],
)
def test_what_makes_no_cache_is_refused(values, message):
    with pytest.raises(UserError, match=re.escape(message)):
        CacheConfig(**values)

"""What commands that measure print: tables, values with their unit, and the machine."""

from __future__ import annotations

import pytest

from moejax.results import describe_machine, format_value, markdown_table


def test_tables_are_markdown():
    rows = [{"name": "a", "seconds": 0.5, "fraction_of_ceiling": 0.123}, {"name": "long name", "seconds": 20.0}]
    assert markdown_table(rows, ("seconds", "nothing", "fraction_of_ceiling")) == [
        "| name      | seconds | fraction_of_ceiling |",
        "|-----------|---------|---------------------|",
        "| a         | 0.5     | 12.3%               |",
        "| long name | 20      |                     |",
    ]


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("ceiling_bytes_per_second", 2.1e10, "21 GB/s"),
        ("peak_resident_bytes", 1_500_000, "1.5 MB"),
        ("large_pages", True, "True"),
        ("tokens_per_second", 12345.6, "12,346"),
        ("seconds", 0.0123456, "0.01235"),
        ("repeats", 12345, "12345"),
    ],
)
def test_values_have_their_unit(key, value, text):
    assert format_value(key, value) == text


@pytest.mark.parametrize(
    ("tunables", "expected"),
    [
        ("", False),
        ("glibc.malloc.hugetlb=1", True),
        ("glibc.malloc.check=1:glibc.malloc.hugetlb=1", True),
        ("glibc.malloc.hugetlb=0", False),
    ],
)
def test_large_pages_are_told(monkeypatch, tunables, expected):
    monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    assert describe_machine("python -m x")["large_pages"] is expected

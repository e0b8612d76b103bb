"""Chips, by their makers' figures, and what is assumed of them. Nothing here was measured by us.

TPU figures: docs.cloud.google.com/tpu/docs, pages v4, v5e, v5p, v6e, tpu7x (read November 2026). HBM as those pages give it, in GiB
(v5e's 16 GB too: libtpu finds 15.75 GiB there). The bandwidth between chips is given there for both directions of all of a chip's
links together; a link carries half of that, divided by the number of links, each way: v5p 1,200 / 2 / 6 = 100 GB/s. "How to Scale
Your Model" (Austin et al. 2025, chapter "TPUs") reckons with what transfers reach of it, 90 GB/s; so does this table. It has no figure
for tpu7x, for which nine tenths are taken. Clocks follow from the peak: multiply-accumulate units of the matrix units times two times
the clock (v5p: 2 cores x 4 units x 128 x 128 x 2 x 1.75 GHz). The network's bandwidth of v4 is not published there; v5e's is taken.
"""

from dataclasses import dataclass

GIB = 2**30
HOP_SECONDS = 1e-6  # a message to the next chip, however short: "typically around 1us" (the same book, chapter "Sharded Matrices")


@dataclass(frozen=True)
class Chip:
    """One device as jax counts them: a chip, or half a tpu7x chip, which has two. Rates per second, of one device."""

    name: str
    hbm_bytes: float
    flops_per_second: float  # bfloat16
    hbm_bytes_per_second: float
    link_bytes_per_second: float  # one link, one way
    links: int  # of a device to its neighbours
    network_bytes_per_second: float  # to other slices, over the data centre's network
    clock: float  # Hz, of the compiler's estimates in cycles
    wraps_from: int  # a dimension of a multiple of so many chips is a ring
    devices_per_chip: int = 1


CHIPS = {
    "v4": Chip("v4", 32 * GIB, 275e12, 1.2e12, 45e9, 6, 3.1e9, 1.05e9, 4),
    "v5e": Chip("v5e", 16 * GIB, 197e12, 819e9, 45e9, 4, 3.1e9, 1.5e9, 16),
    "v5p": Chip("v5p", 95 * GIB, 459e12, 2765e9, 90e9, 6, 6.25e9, 1.75e9, 4),
    "v6e": Chip("v6e", 32 * GIB, 918e12, 1638e9, 90e9, 4, 12.5e9, 1.75e9, 16),
    "tpu7x": Chip("tpu7x", 96 * GIB, 1153.5e12, 3690e9, 90e9, 6, 6.25e9, 2.2e9, 4, devices_per_chip=2),
}

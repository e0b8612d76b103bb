"""Which way tokens take to experts on other devices, where the configuration leaves it open."""

from moejax.config import ModelConfig
from moejax.model.expert_dispatch import FEW_ROWS, _choose, choose_dispatch, has_ragged_exchange
from moejax.sharding import make_mesh


def test_auto_moves_the_fewest_bytes_that_the_devices_can():
    assert _choose(8, 4096, 2, 512, True) == "ragged"
    assert _choose(8, 4096, 2, 512, False) == "gather"  # a ragged exchange would be padded to its largest part
    assert _choose(2, 4096, 2, 512, True) == "gather"
    assert _choose(8, FEW_ROWS, 2, 512, True) == "gather"


def test_cpus_have_no_ragged_exchange():
    mesh = make_mesh(expert=4, fsdp=2)
    assert not has_ragged_exchange(mesh)
    assert choose_dispatch(ModelConfig(), mesh, (8, 64, 128)) == "gather"
    assert choose_dispatch(ModelConfig(dispatch="ragged"), mesh, (8, 64, 128)) == "ragged"
    assert choose_dispatch(ModelConfig(dispatch="ragged"), mesh, (3, 64, 128)) == "replicated"
    assert choose_dispatch(ModelConfig(), make_mesh(fsdp=8), (8, 64, 128)) == "sorted"

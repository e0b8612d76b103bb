"""What XLA is asked to do differently from its defaults, per platform; train.py's steps and their plans are compiled with it.

TPU: that links work while the cores do. By default an all-to-all stops the cores, and so does an all-gather of weights; with these both
have a start and an end with matmuls between them, and what is gathered is fetched piece by piece inside the matmul before. What each
option is worth in the compiler's schedules stands in docs/plans/README.md; none of them has been timed on a TPU by us. On chips other
than v5e libtpu logs that it does not recommend fusing all-gathers so; where a run fails, `--train.compiler-options default` leaves XLA
as it is.

GPU: likewise; NOT MEASURED on any GPU. XLA has had a defect of this kind (a backward pass corrupted by latency hiding): compare the first
losses with those of `--train.compiler-options default`.
"""

TPU: dict[str, bool | int | str] = {
    "xla_tpu_enable_async_all_to_all": True,
    "xla_tpu_enable_async_ragged_all_to_all": True,
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
}
GPU: dict[str, bool | int | str] = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_enable_pipelined_all_gather": True,
    "xla_gpu_enable_pipelined_reduce_scatter": True,
}


def options_for(platform: str, kind: str = "overlap") -> dict[str, bool | int | str]:
    """The options of a platform as jax names it; none for CPU, and none for kind `default`."""
    if kind == "default":
        return {}
    return dict({"tpu": TPU, "gpu": GPU, "cuda": GPU}.get(platform, {}))

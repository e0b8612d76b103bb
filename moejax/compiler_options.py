"""What XLA is asked to do differently from its defaults, per platform; train.py's steps and their plans are compiled with it.

TPU: that links work while the cores do. By default an all-to-all stops the cores, and off v5e so do all-gathers of weights and reductions
of gradients; with these an exchange has a start and an end with matmuls between them, and the chip's SparseCores run the rest (v5e has
none; its compiler gathers beside the matmuls by itself). What they are worth in the compiler's schedules stands in docs/plans/README.md;
none of them has been timed on a TPU by us. Where a run fails, `--train.compiler-options default` leaves XLA as it is. Left out: fusing
all-gathers with matmuls (`xla_tpu_enable_async_collective_fusion_fuse_all_gather`), which hides as much; libtpu 0.0.42 warns that results
may be wrong off v5e, libtpu 0.0.50 and 0.0.52 refuse it there.

GPU: likewise; NOT MEASURED on any GPU. XLA has had a defect of this kind (a backward pass corrupted by latency hiding): compare the first
losses with those of `--train.compiler-options default`.
"""

TPU: dict[str, bool | int | str] = {
    "xla_tpu_enable_async_all_to_all": True,
    "xla_tpu_enable_async_ragged_all_to_all": True,
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": True,
}
GPU: dict[str, bool | int | str] = {"xla_gpu_enable_latency_hiding_scheduler": True}  # of jax 0.10's options the one that 0.12 knows too


def options_for(platform: str, kind: str = "overlap") -> dict[str, bool | int | str]:
    """The options of a platform as jax names it; none for CPU, and none for kind `default`."""
    if kind == "default":
        return {}
    return dict({"tpu": TPU, "gpu": GPU, "cuda": GPU}.get(platform, {}))

"""Where a run's numbers go besides metrics.jsonl: TensorBoard's event files and Weights & Biases."""

import importlib.util
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from moejax.config import RunConfig, UserError, to_json


def require_wandb(config: RunConfig) -> None:
    """Raises UserError where the configuration wants Weights & Biases and the package is not installed."""
    if config.train.wandb is not None and not _is_installed("wandb"):
        raise UserError(
            f"train.wandb={config.train.wandb!r} sends metrics to Weights & Biases, but the package wandb is not installed; "
            "pip install wandb, or leave --train.wandb out"
        )


def open_trackers(config: RunConfig, start: int, log: Callable[[str], None]) -> list["TensorBoard | WeightsAndBiases"]:
    """The trackers that the configuration asks for, from step `start` on. Raises UserError where wandb is wanted and missing."""
    require_wandb(config)
    trackers: list[TensorBoard | WeightsAndBiases] = []
    if config.train.tensorboard:
        if _is_installed("tensorboardX"):
            trackers.append(TensorBoard(Path(config.directory) / "tensorboard", start))
        else:
            log("no TensorBoard files: the package tensorboardX is not installed (pip install tensorboardX, or --no-train.tensorboard)")
    if config.train.wandb is not None:
        trackers.append(WeightsAndBiases(config))
    return trackers


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # a module without a spec, as tests put there
        return True


def name_values(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a row of metrics.jsonl by name: one of a list `loads` is `loads/07`, an evaluation's are `code/eval_loss`."""
    prefix = f"{row['domain']}/" if "domain" in row else ""
    for name, value in row.items():
        if name == "step" or value is None or isinstance(value, str | bool):
            continue
        if isinstance(value, list):
            yield from ((f"{prefix}{name}/{index:02d}", item) for index, item in enumerate(value) if item is not None)
        else:
            yield f"{prefix}{name}", value


class TensorBoard:
    """One event file a start; TensorBoard shows none of an earlier start's events past the step that this one goes on from.

    The messages are tensorboardX's; they are written here, as records of TensorFlow, because its SummaryWriter hands them to another
    thread, which loses them in a kill and dies of a full disk unheard, and waits for the disk at every flush.
    """

    def __init__(self, directory: Path, start: int) -> None:
        from tensorboardX.proto import event_pb2, summary_pb2

        messages: Any = event_pb2  # whose classes are made when it is imported: no type checker knows them
        self.event, self.summary = messages.Event, cast(Any, summary_pb2).Summary
        directory.mkdir(parents=True, exist_ok=True)
        # As TensorBoard knows and orders them; the nanoseconds keep two files of one second apart.
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{time.time_ns()}"
        self.file = (directory / name).open("wb", buffering=0)
        self._write(self.event(wall_time=time.time(), file_version="brain.Event:2"))
        begins = messages.SessionLog(status=messages.SessionLog.START)
        self._write(self.event(wall_time=time.time(), step=start + 1, session_log=begins))

    def write(self, row: Mapping[str, Any]) -> None:
        """Writes every number of a row; it is in the file when this returns."""
        values = [self.summary.Value(tag=name, simple_value=value) for name, value in name_values(row)]
        self._write(self.event(wall_time=time.time(), step=row["step"], summary=self.summary(value=values)))

    def _write(self, event: Any) -> None:
        from tensorboardX.record_writer import masked_crc32c

        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        self.file.write(length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data)))

    def close(self) -> None:
        """Closes the file."""
        self.file.close()


class WeightsAndBiases:
    """The run at wandb.ai (or where wandb is told to send it): the same one after every start, by the id in the run's directory."""

    def __init__(self, config: RunConfig) -> None:
        import wandb

        directory = Path(config.directory)
        path = directory / "wandb_id"
        known = path.read_text().strip() if path.exists() else None
        self.run = wandb.init(
            project=config.train.wandb, name=config.name, id=known, resume="allow", dir=str(directory), config=to_json(config)
        )
        if known is None:
            directory.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{self.run.id}\n")
        # Steps done again after a kill come twice: by their own counter wandb would refuse them, by the metric `step` it takes them.
        self.run.define_metric("*", step_metric="step")

    def write(self, row: Mapping[str, Any]) -> None:
        """Sends every number of a row."""
        self.run.log({"step": row["step"], **dict(name_values(row))})

    def close(self) -> None:
        """Ends when everything is sent."""
        self.run.finish()

"""Streams of a CUDA device (see in_flight.py): copies from and to pinned memory run during the computation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hover_batch.model.in_flight import Streams


def cuda_streams(device: torch.device) -> Streams:
    """Return new streams of the CUDA device `device` for upload and download, and its default stream for computation.

    Networks compute in the default stream, and therefore share memory with other calls. Errors of CUDA propagate.
    """
    upload, download = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]  # untyped in torch
    return Streams(
        upload=CudaStream(upload),
        compute=CudaStream(torch.cuda.default_stream(device)),
        download=CudaStream(download),
        # torch reuses pinned memory only after the copies from and to it are done.
        empty=lambda shape: torch.empty(tuple(shape), dtype=torch.uint8, pin_memory=True),
    )


def _event() -> torch.cuda.Event:
    # A blocking wait leaves the CPU core to the readers.
    return torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]  # untyped in torch


@dataclass
class CudaStep:
    """Work queued in a CUDA stream, between two events. `error`: raised while it was queued."""

    started: torch.cuda.Event = field(default_factory=_event)
    ended: torch.cuda.Event = field(default_factory=_event)
    tensor: Tensor | None = None
    error: Exception | None = None

    @property
    def seconds(self) -> float:
        """Seconds that the device took, between the events `started` and `ended`; known only after `result`."""
        milliseconds: float = self.started.elapsed_time(self.ended)
        return milliseconds / 1000

    def queued(self) -> Tensor:
        """Return the tensor without waiting for the work; its content is valid only after the event `ended`.

        Errors that occurred while the work was queued propagate.
        """
        if self.error is not None:
            raise self.error
        assert self.tensor is not None
        return self.tensor

    def result(self) -> Tensor:
        """Wait for the work, and return the tensor that it returned. Errors of the work propagate."""
        tensor = self.queued()
        self.ended.synchronize()
        return tensor


class CudaStream:
    """One stream of a CUDA device."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def run(self, work: Callable[..., Tensor], *inputs: CudaStep) -> CudaStep:
        """Queue `work`, and return its step without waiting. `CudaStep.result` raises the errors of the work.

        `work`: called at once, in the calling thread and with this stream as the current one, with the tensors of
        `inputs`; returns a tensor. `inputs`: steps of this or of other streams. The device begins the work after they
        are done.
        """
        step = CudaStep()
        try:
            with torch.cuda.stream(self._stream):
                tensors = [self._taken(one) for one in inputs]
                step.started.record()
                step.tensor = work(*tensors)
                step.ended.record()
        except torch.OutOfMemoryError as error:
            step.error = error.with_traceback(None)  # it holds references to the memory
        except Exception as error:
            step.error = error
        return step

    def _taken(self, step: CudaStep) -> Tensor:
        """Return the tensor of another stream's step, for use in this stream after that step."""
        tensor = step.queued()
        self._stream.wait_event(step.ended)
        tensor.record_stream(self._stream)  # its memory is not reused before this stream is done with it
        return tensor

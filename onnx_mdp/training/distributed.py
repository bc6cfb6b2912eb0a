"""Several processes that train one model: the same command under `torchrun`, with gloo on CPUs and NCCL on
GPUs.

Each process takes its part of every batch and gradients are averaged, so that n processes do what one does
with the whole batch. This holds as far as samples do not see each other: batch norm in training sees the part
of its own process, and equals the single process only where its statistics are frozen (`--bn freeze`) or the
file has none.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn

from onnx_mdp.errors import MissingBackendError, UsageError
from onnx_mdp.training.batches import Share

__all__ = ["Group", "process_group"]


@dataclass(frozen=True, slots=True)
class Group:
    """This process among those that train together, and the device that it trains on."""

    share: Share
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.share.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.share.size > 1:
            distributed.all_reduce(values)
        return values

    def equalize(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its mean over the processes."""
        if self.share.size > 1:
            for tensor in tensors:
                distributed.all_reduce(tensor)
                tensor /= self.share.size

    def parallel(self, module: nn.Module) -> nn.Module:
        """The module with gradients that are averaged over the processes."""
        if self.share.size == 1:
            return module
        devices = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(module, device_ids=devices, broadcast_buffers=False)


@contextmanager
def process_group(device: str) -> Iterator[Group]:
    """Join the processes that torchrun started, or be the only one; ``device`` is auto, cpu or cuda.

    Raises:
        UsageError: the device is unknown, or the processes do not find each other.
        MissingBackendError: CUDA was asked for and is not there.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    chosen = _device(device)
    if size == 1:
        yield Group(Share(), chosen)
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    try:
        distributed.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"the {size} processes of torchrun do not find each other: {error}") from error
    try:
        yield Group(Share(rank, size), chosen)
    finally:
        distributed.destroy_process_group()


def _device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device {name!r} is unknown; choose auto, cpu or cuda")
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise MissingBackendError(
            "--device cuda: torch finds no GPU; install a torch with CUDA (https://pytorch.org), or use cpu"
        )
    if name == "cpu" or not there:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))

"""Data-parallel training on several processes, which torchrun starts.

Without torchrun there is one rank, and no operation here communicates.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from ltkd.errors import LtkdError, StoppedError, TrainingError

Value = TypeVar("Value")

# a rank that waits longer has lost another one; the time covers reading and checking the images
TIMEOUT = timedelta(hours=1)


@dataclass(frozen=True)
class Distributed:
    """This process's place among the processes that train one network, and the collective operations.

    Attributes:
        rank: Rank of this process; rank 0 writes and prints.
        size: Number of processes.
        local: Rank of this process on its machine.
    """

    rank: int = 0
    size: int = 1
    local: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def parallel(self, module: nn.Module, device: torch.device) -> nn.Module:
        """Wrap a module so that its gradients are the mean over the ranks.

        Running statistics are those of rank 0. On CUDA, batch norm is computed over the batches of all ranks.
        """
        if self.size == 1:
            return module
        if device.type == "cuda":
            module = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
        return nn.parallel.DistributedDataParallel(module)

    def scale_loss(self, loss: Tensor, num_images: int) -> Tensor:
        """Scale the loss so that its mean over the ranks is the mean over all images, even for an uneven last batch."""
        if self.size == 1:
            return loss
        total = torch.tensor(float(num_images), device=loss.device)
        dist.all_reduce(total)
        return loss * (num_images * self.size / total)

    def all_reduce_mean(self, value: Tensor) -> float:
        """The mean of a scalar over the ranks."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return float(value) / self.size

    def any_rank(self, value: bool) -> bool:
        """Whether the value is true on any rank."""
        if self.size == 1:
            return value
        flag = torch.tensor(float(value), device="cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(flag)
        return bool(flag)

    def all_gather(self, value: Value) -> list[Value]:
        """The values of all ranks, in the order of the ranks; tensors must be on the CPU."""
        if self.size == 1:
            return [value]
        values = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    def raise_on_all(self, error: LtkdError | None) -> None:
        """Raise one rank's error on every rank, so that no rank waits for one that has ended."""
        first = next((gathered for gathered in self.all_gather(error) if gathered is not None), None)
        if first is not None:
            raise first

    def broadcast_buffers(self, network: nn.Module) -> None:
        """Give every rank the running statistics of rank 0."""
        if self.size > 1:
            for buffer in network.buffers():
                dist.broadcast(buffer, src=0)

    def gather_interleaved(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """Gather an array of which rank r has every ``size``-th value, starting at r."""
        if self.size == 1:
            return values
        parts = self.all_gather(values)
        whole = np.empty(sum(len(part) for part in parts), dtype=values.dtype)
        for rank, part in enumerate(parts):
            whole[rank :: self.size] = part
        return whole

    def barrier(self) -> None:
        """Wait until every rank has called this method."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def init_distributed(device_type: str) -> Iterator[Distributed]:
    """Join the process group that torchrun started, until the context ends; without torchrun there is one rank.

    If an error ends several ranks, only the first rank to end reports it. The others exit without a message.

    Args:
        device_type: ``cuda`` uses the backend nccl, ``cpu`` uses gloo.

    Raises:
        TrainingError: The connection to another rank was lost.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Distributed()
        return
    distributed = Distributed(rank=int(os.environ["RANK"]), size=size, local=int(os.environ.get("LOCAL_RANK", "0")))
    if device_type == "cuda":
        torch.cuda.set_device(distributed.local)
    store, _, _ = next(rendezvous("env://"))
    dist.init_process_group(
        "nccl" if device_type == "cuda" else "gloo",
        store=store,
        rank=distributed.rank,
        world_size=size,
        timeout=TIMEOUT,
    )

    def is_first_to_end() -> bool:
        try:
            return bool(store.add("ended", 1) == 1)
        except RuntimeError:
            return False  # the store ended with the process that hosts it, so that process was the first

    try:
        yield distributed
    except LtkdError as error:
        if not is_first_to_end():
            sys.exit(128 + error.signal_number if isinstance(error, StoppedError) else 2)
        raise
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        if not is_first_to_end():
            sys.exit(2)
        raise TrainingError(
            f"rank {distributed.rank} of {size} lost the connection to another rank ({str(error).splitlines()[0]}); it "
            "may have been killed or have run out of memory. Run the same command again to resume from the last "
            "checkpoint."
        ) from None
    finally:
        dist.destroy_process_group()

"""The processes that share every batch of a training, started by torchrun.

Without torchrun there is one rank and everything here is the identity.
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

# A rank that waits longer for the others has lost one; reading and checking the images is part of the wait.
PATIENCE = timedelta(hours=1)


@dataclass(frozen=True)
class Distributed:
    """One of ``size`` processes that train one network.

    Attributes:
        rank: Which of them this is; rank 0 writes and prints.
        size: How many there are.
        local: Which of those on this machine it is.
    """

    rank: int = 0
    size: int = 1
    local: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def parallel(self, module: nn.Module, device: torch.device) -> nn.Module:
        """The module, or one whose gradients are the mean over the ranks.

        Running statistics are those of rank 0; on CUDA batch norm sees the batches of all ranks.
        """
        if self.size == 1:
            return module
        if device.type == "cuda":
            module = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
        return nn.parallel.DistributedDataParallel(module)

    def scale_loss(self, loss: Tensor, num_images: int) -> Tensor:
        """A loss whose mean over the ranks is the mean over all their images, though the last batch may be uneven."""
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
        """Whether it is true on any rank."""
        if self.size == 1:
            return value
        flag = torch.tensor(float(value), device="cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(flag)
        return bool(flag)

    def all_gather(self, value: Value) -> list[Value]:
        """The values of all ranks, in their order; tensors must be on the CPU."""
        if self.size == 1:
            return [value]
        values = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    def raise_on_all(self, error: LtkdError | None) -> None:
        """Raise on every rank what one of them found, so that none waits for another that has left."""
        first = next((found for found in self.all_gather(error) if found is not None), None)
        if first is not None:
            raise first

    def broadcast_buffers(self, network: nn.Module) -> None:
        """Give every rank the running statistics of rank 0."""
        if self.size > 1:
            for buffer in network.buffers():
                dist.broadcast(buffer, src=0)

    def interleaved(self, mine: NDArray[np.int64]) -> NDArray[np.int64]:
        """The values of all ranks, rank r having had every ``size``-th one from r on."""
        if self.size == 1:
            return mine
        parts = self.all_gather(mine)
        whole = np.empty(sum(len(part) for part in parts), dtype=mine.dtype)
        for rank, part in enumerate(parts):
            whole[rank :: self.size] = part
        return whole

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def init_distributed(device_type: str) -> Iterator[Distributed]:
    """Join the processes that torchrun started, for as long as the context lasts; one rank where it did not.

    Of an error that ends several ranks, the first one to have it says what it is; the others leave in silence.

    Args:
        device_type: ``cuda`` ranks talk by nccl, ``cpu`` ranks by gloo.

    Raises:
        TrainingError: Another rank is gone without a word.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Distributed()
        return
    ranks = Distributed(rank=int(os.environ["RANK"]), size=size, local=int(os.environ.get("LOCAL_RANK", "0")))
    if device_type == "cuda":
        torch.cuda.set_device(ranks.local)
    store, _, _ = next(rendezvous("env://"))
    dist.init_process_group(
        "nccl" if device_type == "cuda" else "gloo", store=store, rank=ranks.rank, world_size=size, timeout=PATIENCE
    )

    def first_to_end() -> bool:
        try:
            return bool(store.add("ended", 1) == 1)
        except RuntimeError:
            return False  # the store went with the process that held it, which was the first

    try:
        yield ranks
    except LtkdError as error:
        if not first_to_end():
            sys.exit(128 + error.signal_number if isinstance(error, StoppedError) else 2)
        raise
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        if not first_to_end():
            sys.exit(2)
        raise TrainingError(
            f"rank {ranks.rank} of {size} has lost another one ({str(error).splitlines()[0]}); was it killed, or out "
            "of memory? The same command goes on from the last checkpoint."
        ) from None
    finally:
        dist.destroy_process_group()

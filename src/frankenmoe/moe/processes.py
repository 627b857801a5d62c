"""The processes that torchrun started: who am I, split work, add up, gather. Without a launcher there is one process.

Every process runs the same program; the functions that talk to the others must be called by all of them, in the same
order. Does not import torch before that is needed, so that a command can ask for its rank early.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

from frankenmoe.errors import FrankenMoEError, PlanError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
R = TypeVar("R")
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR")  # what every launcher sets
PATIENCE = timedelta(days=7)  # a process waits for a slower one; the launcher ends all if one dies


def world() -> int:
    """The number of processes."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in LAUNCHED) else 1


def rank() -> int:
    """This process's number, from 0."""
    return int(os.environ["RANK"]) if world() > 1 else 0


def local_rank() -> int:
    """This process's number on its machine, which is also that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0")) if world() > 1 else 0


def neighbours() -> int:
    """The number of processes on this machine, this one included: they share its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world() > 1 else 1


def is_main() -> bool:
    """Whether this process prints and writes files."""
    return rank() == 0


def split(items: Sequence[T]) -> list[T]:
    """This process's share of `items`: every world-th one, so that sorted items give equal shares."""
    return list(items[rank() :: world()])


def gather(own: Sequence[T]) -> list[T]:
    """All processes' results, in the order that `split` took the items from. Each of `own` belongs to one item."""
    shares = _from_all(list(own))
    total = sum(map(len, shares))
    return [shares[at % len(shares)][at // len(shares)] for at in range(total)]


def share_out(items: Sequence[T], work: Callable[[list[T]], Sequence[R]]) -> list[R]:
    """The results of `work` for all items, in their order. Every process works on its share only.

    `work` gives one result per item. An error that one process meets is raised on all of them, so that none waits.
    """
    own: list[R] = []
    failed: FrankenMoEError | None = None
    try:
        own = list(work(split(items)))
    except FrankenMoEError as error:
        if world() == 1:
            raise
        failed = error
    errors = [error for error in _from_all(failed) if error is not None]
    if errors:
        raise errors[0]
    return gather(own)


def _from_all(value: T) -> list[T]:
    """Every process's value, in order of rank."""
    if world() == 1:
        return [value]
    found = [value] * world()
    with _talking() as dist:
        dist.all_gather_object(found, value)
    return found


def all_reduce(tensor: "torch.Tensor") -> "torch.Tensor":
    """`tensor`, replaced in place by its sum over the processes, which is the same on all of them."""
    if world() > 1:
        with _talking() as dist:
            dist.all_reduce(tensor)
    return tensor


def gather_rows(tensor: "torch.Tensor") -> "torch.Tensor":
    """All processes' rows, one process after another. Their numbers may differ, type and width may not."""
    if world() == 1:
        return tensor
    import torch

    with _talking() as dist:
        count = torch.tensor([len(tensor)], device=tensor.device)
        counts = [torch.zeros_like(count) for _ in range(world())]
        dist.all_gather(counts, count)
        sizes = [int(each) for each in counts]
        sent = tensor.new_zeros((max(sizes), *tensor.shape[1:]))
        sent[: len(tensor)] = tensor
        parts = [torch.empty_like(sent) for _ in sizes]
        dist.all_gather(parts, sent)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def from_main(value: T) -> T:
    """The main process's value, for what only it may decide or read."""
    if world() == 1:
        return value
    held = [value]
    with _talking() as dist:
        dist.broadcast_object_list(held)
    return held[0]


def once(work: Callable[[], T]) -> T:
    """What `work` gives to the main process, which alone does it. Its error is raised on all of them."""
    done: T | None = None
    failed: FrankenMoEError | None = None
    if is_main():
        try:
            done = work()
        except FrankenMoEError as error:
            if world() == 1:
                raise
            failed = error
    done, failed = from_main((done, failed))
    if failed is not None:
        raise failed
    return cast(T, done)


def wait() -> None:
    """Waits until all processes are here."""
    from_main(None)


@contextmanager
def main_first() -> Iterator[None]:
    """The main process runs the block first, the others after it: what the first one caches, they read."""
    if not is_main():
        wait()
    yield
    if is_main():
        wait()


@contextmanager
def _talking() -> Iterator[Any]:
    """torch.distributed, once this process has joined. PlanError if another process has ended meanwhile."""
    _join()
    import torch.distributed as dist

    try:
        yield dist
    except RuntimeError as error:
        raise PlanError(
            f"another of the launcher's {world()} processes ended, so this one cannot go on",
            hint="see what that process says",
        ) from error


def _join() -> None:
    """Joins the process group, once. Tensors on the CPU go through gloo, those on GPUs through NCCL."""
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=PATIENCE)
    else:
        dist.init_process_group("gloo", timeout=PATIENCE)

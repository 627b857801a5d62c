"""Plan -> the weights of a built artifact. Streams them, and resumes after the finished shards.

Does not import torch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from itertools import groupby
from pathlib import Path
from threading import Event

from frankenmoe.artifact.folder import ROUTERS, check_disk, write_json
from frankenmoe.checkpoint.jsonfile import small_bytes
from frankenmoe.checkpoint.tensors import TensorRef, TensorWrite
from frankenmoe.checkpoint.weights import INDEX
from frankenmoe.checkpoint.writer import write_atomic, write_shard
from frankenmoe.planning import Plan
from frankenmoe.planning.asadapter import copy_adapters

AT_ONCE = 2


def compose(plan: Plan, folder: Path, *, shard_size: int, on_bytes: Callable[[int], None]) -> None:
    """Writes the shards that are missing in `folder`, then config, index and the small files of the base.

    Calls `on_bytes` with the size of every piece, those of finished shards included. Raises ArtifactError before the
    first byte if the disk is too small.
    """
    shards = name_shards(split_shards(plan.groups, limit=shard_size))
    missing = (writes for name, writes in shards.items() if not (folder / name).exists())
    check_disk(
        folder,
        need=sum(map(_size, missing)),
        hint="choose a folder on another disk, or use --virtual (megabytes)",
    )
    _write_shards(shards, folder, on_bytes=on_bytes)
    write_json(folder / "config.json", plan.config)
    write_json(folder / INDEX, index(shards, routers=tuple(plan.routers)))
    copy_small_files(plan, folder)


def _write_shards(
    shards: Mapping[str, Sequence[TensorWrite]], folder: Path, *, on_bytes: Callable[[int], None]
) -> None:
    """Writes two shards at a time: one computes or reads while the other writes. The first error stops both."""
    scanned: set[TensorRef] = set()
    stopped = Event()

    def listen(amount: int) -> None:
        if stopped.is_set():
            raise CancelledError
        on_bytes(amount)

    def write(name: str) -> None:
        if (folder / name).exists():
            listen(_size(shards[name]))
        else:
            write_shard(folder / name, shards[name], metadata={"format": "pt"}, on_bytes=listen, scanned=scanned)

    with ThreadPoolExecutor(max_workers=AT_ONCE) as pool:
        running = [pool.submit(write, name) for name in shards]
        try:
            for future in as_completed(running):
                future.result()
        finally:
            stopped.set()
            pool.shutdown(cancel_futures=True)


def split_shards(groups: Sequence[Sequence[TensorWrite]], *, limit: int) -> list[list[TensorWrite]]:
    """Fills shards up to `limit` bytes, in order. A group that fits into one shard is not split.

    In a larger group, consecutive tensors of the same shape stay together if they fit.
    """
    shards: list[list[TensorWrite]] = [[]]
    filled = 0
    for chunk in _chunks(groups, limit):
        size = _size(chunk)
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].extend(chunk)
        filled += size
    return shards


def _chunks(groups: Sequence[Sequence[TensorWrite]], limit: int) -> Iterator[Sequence[TensorWrite]]:
    for group in groups:
        if _size(group) <= limit:
            yield group
            continue
        for _, same in groupby(group, key=lambda write: write.shape):  # gate and up of all experts, then down of all
            packed = tuple(same)
            yield from (packed,) if _size(packed) <= limit else ((write,) for write in packed)


def name_shards(shards: Sequence[list[TensorWrite]]) -> dict[str, list[TensorWrite]]:
    """Name -> shard: `model-00001-of-0000n.safetensors` and so on, also for a single shard.

    If transformers found a plain model.safetensors, it would ignore the index and with it the routers' file.
    """
    return {f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard for number, shard in enumerate(shards, 1)}


def index(shards: Mapping[str, Sequence[TensorWrite]], *, routers: Sequence[str]) -> dict[str, object]:
    """The content of model.safetensors.index.json: tensor -> file, routers included."""
    body = {write.name: name for name, writes in shards.items() for write in writes}
    total = sum(_size(writes) for writes in shards.values())
    return {"metadata": {"total_size": total}, "weight_map": body | dict.fromkeys(routers, ROUTERS)}


def copy_small_files(plan: Plan, folder: Path) -> None:
    """Copies tokenizer, chat template and generation settings unchanged, because re-saving them loses information.

    Copies adapters that were extracted from parents, too.
    """
    for file in plan.small_files:
        write_atomic(folder / file.name, small_bytes(file))
    copy_adapters(plan.extracted.values(), folder)


def _size(writes: Sequence[TensorWrite]) -> int:
    return sum(write.nbytes for write in writes)

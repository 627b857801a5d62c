"""Plan -> the body of a built artifact, streaming and resumable: finished shards are kept, the rest is written.

Knows nothing of torch, of how routers were made, or of what a tensor means.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from itertools import groupby
from pathlib import Path
from threading import Event

from frankenmoe.artifact.folder import INDEX, ROUTERS, check_disk, write_json
from frankenmoe.checkpoint.tensors import TensorRef, TensorWrite
from frankenmoe.checkpoint.writer import write_atomic, write_shard
from frankenmoe.planning import Plan

AT_ONCE = 2


def compose(plan: Plan, folder: Path, *, shard_size: int, on_bytes: Callable[[int], None]) -> None:
    """Writes every shard that `folder` does not hold yet, then config, index and the small files of the base.

    `on_bytes` hears every byte, those of finished shards too.
    Raises ArtifactError before the first byte when the disk is too small.
    """
    shards = name_shards(split_shards(plan.groups, limit=shard_size))
    missing = (writes for name, writes in shards.items() if not (folder / name).exists())
    check_disk(
        folder,
        need=sum(map(_size, missing)),
        hint="choose a folder on another disk, or keep the MoE virtual with --virtual (megabytes)",
    )
    _write_shards(shards, folder, on_bytes=on_bytes)
    write_json(folder / "config.json", plan.config)
    write_json(folder / INDEX, index(shards, routers=tuple(plan.routers)))
    copy_small_files(plan, folder)


def _write_shards(
    shards: Mapping[str, Sequence[TensorWrite]], folder: Path, *, on_bytes: Callable[[int], None]
) -> None:
    """Two shards at a time: one computes or waits for a source while the other writes. The first error stops both."""
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
    """Fills shards up to `limit` bytes in order; a group that fits into one shard is not cut by a border.

    Of one that does not, tensors of one shape that follow each other stay together if they fit.
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
        for _, same in groupby(group, key=lambda write: write.shape):  # gate and up of all experts, then their downs
            packed = tuple(same)
            yield from (packed,) if _size(packed) <= limit else ((write,) for write in packed)


def name_shards(shards: Sequence[list[TensorWrite]]) -> dict[str, list[TensorWrite]]:
    """`model-00001-of-0000n.safetensors` and on: numbered even when there is one, since transformers ignores the index
    (and with it the routers' file) where it finds a plain model.safetensors."""
    return {f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard for number, shard in enumerate(shards, 1)}


def index(shards: Mapping[str, Sequence[TensorWrite]], *, routers: Sequence[str]) -> dict[str, object]:
    """model.safetensors.index.json: which file holds which tensor, routers included."""
    body = {write.name: name for name, writes in shards.items() for write in writes}
    total = sum(_size(writes) for writes in shards.values())
    return {"metadata": {"total_size": total}, "weight_map": body | dict.fromkeys(routers, ROUTERS)}


def copy_small_files(plan: Plan, folder: Path) -> None:
    """Tokenizer, chat template and generation settings, byte for byte: re-saving them would lose what tools rely on."""
    for file in plan.small_files:
        write_atomic(folder / file.name, file.read_bytes())


def _size(writes: Sequence[TensorWrite]) -> int:
    return sum(write.nbytes for write in writes)

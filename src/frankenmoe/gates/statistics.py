"""What closed-form routers are computed from: counts, sums and second moments of the states of every text.

Shape suffixes: U texts, C classes (the experts a router chooses among), L layers, D hidden, P pairs of D (a triangle).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from frankenmoe.errors import ArtifactError
from frankenmoe.moe.device import in_float64
from frankenmoe.moe.processes import all_reduce

VERSION = 1


class Moments:
    """Count, sum and uncentred second moment of one text's states per layer, in float64, summed batch by batch."""

    def __init__(self, layers: int, hidden: int) -> None:
        self.count_L = torch.zeros(layers, dtype=torch.int64)
        self.sum_LD = torch.zeros(layers, hidden, dtype=torch.float64)
        self.second_LDD = torch.zeros(layers, hidden, hidden, dtype=torch.float64)

    def add(self, layer: int, states_ND: torch.Tensor) -> None:
        """Adds a batch of states, on any device. The split into batches makes no difference."""
        states_ND = in_float64(states_ND)
        self.count_L[layer] += len(states_ND)
        self.sum_LD[layer] += states_ND.sum(dim=0).cpu()
        self.second_LDD[layer] += (states_ND.T @ states_ND).cpu()

    def merge(self, other: "Moments | None") -> None:
        """Adds the moments of other blocks of the same text."""
        if other is not None:
            self.count_L += other.count_L
            self.sum_LD += other.sum_LD
            self.second_LDD += other.second_LDD

    def all_reduce(self) -> None:
        """Adds up the moments of all processes of a launcher; each of them calls this and gets the sum."""
        for tensor in (self.count_L, self.sum_LD, self.second_LDD):
            all_reduce(tensor)


@dataclass(frozen=True)
class RouterText:
    """One text for one router: its name, the target distribution over the router's experts, and its weight."""

    name: str
    target_C: tuple[float, ...]
    weight: float = 1.0


@dataclass(frozen=True)
class RouterStatistics:
    """What closed-form gates of one router need: the token count and mean state of each text, and the uncentred second
    moment per token, pooled over texts by their weights.

    Second moments are one sum per layer: no method needs more, and their D x D numbers are most of the file.
    """

    texts: tuple[RouterText, ...]
    count_U: torch.Tensor
    mean_ULD: torch.Tensor
    second_LDD: torch.Tensor

    def targets(self) -> torch.Tensor:
        """targets_UC: the target distribution of each text."""
        return torch.tensor([text.target_C for text in self.texts], dtype=torch.float64)

    def weights(self) -> torch.Tensor:
        """weights_U: the weight of each text."""
        return torch.tensor([text.weight for text in self.texts], dtype=torch.float64)


def start(*, layers: int, hidden: int) -> RouterStatistics:
    """Statistics without any text."""
    return RouterStatistics(
        (),
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(0, layers, hidden, dtype=torch.float64),
        torch.zeros(layers, hidden, hidden, dtype=torch.float64),
    )


def with_text(statistics: RouterStatistics, text: RouterText, moments: Moments) -> RouterStatistics:
    """The statistics with one more text. Earlier texts get a target of zero for experts that came later."""
    classes = len(text.target_C)
    known = tuple(
        replace(each, target_C=(*each.target_C, *[0.0] * (classes - len(each.target_C)))) for each in statistics.texts
    )
    count_L11 = moments.count_L.double()[:, None, None]
    return RouterStatistics(
        (*known, text),
        torch.cat([statistics.count_U, moments.count_L[:1]]),
        torch.cat([statistics.mean_ULD, (moments.sum_LD / count_L11[..., 0])[None]]),
        (moments.second_LDD / (count_L11 / text.weight)).add_(statistics.second_LDD),
    )


def without_texts(
    statistics: RouterStatistics, gone: Mapping[str, Moments], *, classes: Sequence[int]
) -> RouterStatistics:
    """The statistics without some texts, whose moments are given, and with these of the classes, in this order.

    It undoes `with_text`, up to rounding.
    """
    second_LDD = statistics.second_LDD.clone()
    for text in statistics.texts:
        if text.name in gone:
            moments = gone[text.name]
            second_LDD -= moments.second_LDD / (moments.count_L.double()[:, None, None] / text.weight)
    left = [index for index, text in enumerate(statistics.texts) if text.name not in gone]
    texts = (statistics.texts[index] for index in left)
    return RouterStatistics(
        tuple(replace(text, target_C=tuple(text.target_C[index] for index in classes)) for text in texts),
        statistics.count_U[left],
        statistics.mean_ULD[left],
        second_LDD,
    )


@dataclass(frozen=True)
class Fitted:
    """The content of the statistics file: one RouterStatistics per router, by path, and how gates were made from them.

    `facts` is plain data: method, scale, the origin of each expert's text, losses.
    """

    routers: Mapping[tuple[int, ...], RouterStatistics]
    facts: Mapping[str, object] = field(default_factory=dict)


def statistics_bytes(fitted: Fitted) -> bytes:
    """The statistics as the bytes of a safetensors file. Second moments are symmetric, so one triangle is stored."""
    tensors: dict[str, torch.Tensor] = {}
    about = []
    for path, router in fitted.routers.items():
        key = _key(path)
        tensors[f"{key}.count"] = router.count_U.clone()
        tensors[f"{key}.mean"] = router.mean_ULD.clone()
        rows, columns = torch.triu_indices(*router.second_LDD.shape[1:])
        tensors[f"{key}.second"] = router.second_LDD[:, rows, columns].contiguous()
        texts = [{"name": text.name, "target": text.target_C, "weight": text.weight} for text in router.texts]
        about.append({"path": path, "texts": texts})
    metadata = {
        "format": "pt",
        "version": str(VERSION),
        "routers": json.dumps(about),
        "facts": json.dumps(fitted.facts),
    }
    return bytes(save(tensors, metadata=metadata))


def load_statistics(file: Path) -> Fitted:
    """Reads a file of `statistics_bytes`. Raises ArtifactError if it is missing, damaged, or of another version."""
    if not file.is_file():
        raise ArtifactError(
            f"{file.parent} has no {file.name}, so its routers were not fitted",
            hint=f"fit them first: `frankenmoe fit {file.parent}`",
        )
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            if metadata.get("version") != str(VERSION):
                raise ArtifactError(
                    f"{file} has version {metadata.get('version')}, expected version {VERSION}",
                    hint="fit the routers again",
                )
            routers = {
                tuple(entry["path"]): _router(entry["texts"], opened.get_tensor, _key(entry["path"]))
                for entry in json.loads(metadata["routers"])
            }
            return Fitted(routers, json.loads(metadata["facts"]))
    except ArtifactError:
        raise
    except Exception as error:  # safetensors, json and torch each have their own
        raise ArtifactError(f"{file} is damaged: {error}", hint="fit the routers again") from error


def _router(texts: Sequence[Mapping[str, Any]], tensor: Callable[[str], torch.Tensor], key: str) -> RouterStatistics:
    mean_ULD = tensor(f"{key}.mean")
    layers, hidden = mean_ULD.shape[1:]
    rows, columns = torch.triu_indices(hidden, hidden)
    second_LDD = torch.zeros(layers, hidden, hidden, dtype=torch.float64)
    second_LDD[:, rows, columns] = second_LDD[:, columns, rows] = tensor(f"{key}.second")
    known = tuple(RouterText(each["name"], tuple(each["target"]), each["weight"]) for each in texts)
    return RouterStatistics(known, tensor(f"{key}.count"), mean_ULD, second_LDD)


def _key(path: Sequence[int]) -> str:
    return "router" + "".join(f".{index}" for index in path)

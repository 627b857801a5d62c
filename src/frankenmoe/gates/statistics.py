"""What closed-form routers are made of: counts, sums and second moments of the states of every text, which add up.

Does not know models or tokens' text, nor how a gate is computed from them.
Shape suffixes: U texts, C classes (the experts a router chooses among), L layers, D hidden, P pairs of D (a triangle).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from frankenmoe.checkpoint.writer import write_atomic
from frankenmoe.errors import ArtifactError

VERSION = 1


class Moments:
    """Count, sum and uncentred second moment of one text's states, layer by layer, in float64, as they stream by."""

    def __init__(self, *, layers: int, hidden: int) -> None:
        self.count_L = torch.zeros(layers, dtype=torch.int64)
        self.sum_LD = torch.zeros(layers, hidden, dtype=torch.float64)
        self.second_LDD = torch.zeros(layers, hidden, hidden, dtype=torch.float64)

    def add(self, layer: int, states_ND: torch.Tensor) -> None:
        """Adds a batch of states; in which batches they come makes no difference."""
        states_ND = states_ND.double()
        self.count_L[layer] += len(states_ND)
        self.sum_LD[layer] += states_ND.sum(dim=0)
        self.second_LDD[layer] += states_ND.T @ states_ND


@dataclass(frozen=True)
class Text:
    """One text as a router sees it: whose it is, which experts should get it (a distribution), how much it counts."""

    name: str
    target_C: tuple[float, ...]
    weight: float = 1.0


@dataclass(frozen=True)
class RouterStatistics:
    """All that closed-form gates of one router need: per text its token count and mean state, and pooled over texts,
    each by its weight and not by its length, the uncentred second moment per token.

    Second moments are kept as one sum because no method needs more, and D x D numbers per layer are the bulk of it.
    """

    texts: tuple[Text, ...]
    count_U: torch.Tensor
    mean_ULD: torch.Tensor
    second_LDD: torch.Tensor

    def targets(self) -> torch.Tensor:
        """[U, C]: which experts each text should go to."""
        return torch.tensor([text.target_C for text in self.texts], dtype=torch.float64)

    def weights(self) -> torch.Tensor:
        """[U]: how much each text counts."""
        return torch.tensor([text.weight for text in self.texts], dtype=torch.float64)

    @property
    def classes(self) -> int:
        """How many experts the router chooses among."""
        return len(self.texts[0].target_C)


def start(*, layers: int, hidden: int) -> RouterStatistics:
    """Statistics of no text yet."""
    return RouterStatistics(
        (),
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(0, layers, hidden, dtype=torch.float64),
        torch.zeros(layers, hidden, hidden, dtype=torch.float64),
    )


def with_text(statistics: RouterStatistics, text: Text, moments: Moments) -> RouterStatistics:
    """The statistics with one text more. Texts known before get no share in experts that came later."""
    classes = len(text.target_C)
    known = tuple(
        replace(each, target_C=(*each.target_C, *[0.0] * (classes - len(each.target_C)))) for each in statistics.texts
    )
    count_L11 = moments.count_L.double()[:, None, None]
    return RouterStatistics(
        (*known, text),
        torch.cat([statistics.count_U, moments.count_L[:1]]),
        torch.cat([statistics.mean_ULD, (moments.sum_LD / count_L11[..., 0])[None]]),
        statistics.second_LDD + text.weight * moments.second_LDD / count_L11,
    )


@dataclass(frozen=True)
class Fitted:
    """The statistics file: one RouterStatistics per router, by path, and how gates were made of them.

    `facts` is plain data: method, scale, where each expert's text came from, losses.
    """

    routers: Mapping[tuple[int, ...], RouterStatistics]
    facts: Mapping[str, object] = field(default_factory=dict)


def save_statistics(file: Path, fitted: Fitted) -> None:
    """Writes router-statistics.safetensors, whole or not at all."""
    write_atomic(file, statistics_bytes(fitted))


def statistics_bytes(fitted: Fitted) -> bytes:
    """The statistics as a safetensors file; of second moments, which are symmetric, one triangle."""
    tensors: dict[str, torch.Tensor] = {}
    about = []
    for path, router in fitted.routers.items():
        key = _key(path)
        tensors[f"{key}.count"] = router.count_U.clone()
        tensors[f"{key}.mean"] = router.mean_ULD.clone()
        rows, columns = _triangle(router.second_LDD.shape[-1])
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
    """What `save_statistics` wrote; ArtifactError for a file that is not there, damaged, or of another version."""
    if not file.is_file():
        raise ArtifactError(
            f"{file.parent} has no {file.name}, so its routers were not fitted here",
            hint=f"fit them first: `frankenmoe fit {file.parent}`",
        )
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            if metadata.get("version") != str(VERSION):
                raise ArtifactError(
                    f"{file} is of version {metadata.get('version')}, this frankenmoe reads version {VERSION}",
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


def _router(texts: Sequence[Mapping[str, object]], tensor: object, key: str) -> RouterStatistics:
    assert callable(tensor)
    mean_ULD = tensor(f"{key}.mean")
    layers, hidden = mean_ULD.shape[1:]
    rows, columns = _triangle(hidden)
    second_LDD = torch.zeros(layers, hidden, hidden, dtype=torch.float64)
    second_LDD[:, rows, columns] = second_LDD[:, columns, rows] = tensor(f"{key}.second")
    read = tuple(Text(str(each["name"]), tuple(each["target"]), float(each["weight"])) for each in texts)  # type: ignore[arg-type]
    return RouterStatistics(read, tensor(f"{key}.count"), mean_ULD, second_LDD)


def _triangle(hidden: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = torch.triu_indices(hidden, hidden)
    return rows, columns


def _key(path: Sequence[int]) -> str:
    return "router" + "".join(f".{index}" for index in path)

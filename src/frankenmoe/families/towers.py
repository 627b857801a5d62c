"""Parts of a model that read pictures and pass through into an MoE: names and shapes of their tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from frankenmoe.families.rows import rows
from frankenmoe.families.spec import Config, TensorSpec


@dataclass(frozen=True, slots=True)
class Tower:
    """A part whose config is the field `field` of the model's, and whose tensors begin with `prefix`.

    `groups` are rows by a size that says how many times they are there; `{layer}` in their names is the number.
    `sizes` gives these and the symbols of shapes, from the part's config with `defaults` in place of absent fields.
    """

    field: str
    prefix: str
    groups: Mapping[str, tuple[TensorSpec, ...]]
    sizes: Callable[[Config], Mapping[str, int]]
    defaults: Mapping[str, Any]

    def shapes(self, config: Config) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor, from the config of the whole model.

        Raises TypeError or ValueError for sizes that are no positive whole numbers.
        """
        own = config.get(self.field)
        if not isinstance(own, Mapping):
            raise TypeError(f"{self.field} {own!r:.40}, expected a mapping")
        sizes = self.sizes({**self.defaults, **{key: value for key, value in own.items() if value is not None}})
        return {
            self.prefix + row.name.format(layer=layer): tuple(sizes[symbol] for symbol in row.shape)
            for count, group in self.groups.items()
            for layer in range(sizes[count])
            for row in group
        }


MOST = 2**20  # of layers, of numbers in a row


def _count(config: Config, name: str) -> int:
    found = config[name]
    if type(found) is not int or not 1 <= found <= MOST:
        raise TypeError(f"{name} {found!r:.40}, expected a whole number from 1 to {MOST}")
    return found


def _qwen_sizes(config: Config) -> Mapping[str, int]:
    names = (
        *("depth", "hidden_size", "intermediate_size", "in_channels", "patch_size", "temporal_patch_size"),
        *("spatial_merge_size", "out_hidden_size", "num_position_embeddings", "num_heads"),
    )
    sizes = {name: _count(config, name) for name in names}
    hidden, heads = sizes["hidden_size"], sizes["num_heads"]
    if hidden % heads:
        raise ValueError(f"num_heads {heads} for a hidden size of {hidden}, expected a divisor")
    taken, depth = config["deepstack_visual_indexes"], sizes["depth"]
    if not isinstance(taken, list) or any(type(each) is not int or not 0 <= each < depth for each in taken):
        raise TypeError(f"deepstack_visual_indexes {taken!r:.40}, expected a list of layers from 0 to {depth - 1}")
    return sizes | {
        "once": 1,
        "qkv": 3 * sizes["hidden_size"],
        "merged": sizes["hidden_size"] * sizes["spatial_merge_size"] ** 2,
        "taken": len(taken),
    }


def _linear(name: str, out: str, inside: str) -> dict[str, tuple[str, ...]]:
    return {f"{name}.weight": (out, inside), f"{name}.bias": (out,)}


def _norm(name: str, size: str) -> dict[str, tuple[str, ...]]:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def _merger(norm: str) -> dict[str, tuple[str, ...]]:
    """Neighbouring patches become one token of text; before that each is normalised, or all together."""
    return (
        _norm("norm", norm)
        | _linear("linear_fc1", "merged", "merged")
        | _linear("linear_fc2", "out_hidden_size", "merged")
    )


PATCH = ("hidden_size", "in_channels", "temporal_patch_size", "patch_size", "patch_size")
QWEN3_VISION = Tower(
    field="vision_config",
    prefix="model.visual.",
    groups={
        "once": (
            *rows("patch_embed.proj.", {"weight": PATCH, "bias": ("hidden_size",)}),
            *rows("", {"pos_embed.weight": ("num_position_embeddings", "hidden_size")}),
            *rows("merger.", _merger("hidden_size")),
        ),
        "depth": rows(
            "blocks.{layer}.",
            _norm("norm1", "hidden_size")
            | _norm("norm2", "hidden_size")
            | _linear("attn.qkv", "qkv", "hidden_size")
            | _linear("attn.proj", "hidden_size", "hidden_size")
            | _linear("mlp.linear_fc1", "intermediate_size", "hidden_size")
            | _linear("mlp.linear_fc2", "hidden_size", "intermediate_size"),
        ),
        # what some layers see is added to the first layers of the language model
        "taken": rows("deepstack_merger_list.{layer}.", _merger("merged")),
    },
    sizes=_qwen_sizes,
    defaults={
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "in_channels": 3,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 3584,
        "num_position_embeddings": 2304,
        "num_heads": 16,
        "deepstack_visual_indexes": [8, 16, 24],
    },
)

"""Parents whose best backbone is known: their mean is the model that wrote the text."""

from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM

import tiny

BLOCK = 63  # characters that fill one block of 64 tokens, after BOS
FIRST, LAST = 3, 97  # the tokens of printable characters, without the space


def truth_and_parents(root: Path, *, noise: float = 0.05, seed: int = 0) -> tuple[Path, list[Path]]:
    """A base far from the truth and two parents, whose backbones are the truth plus and minus the same noise.

    Their FFNs are (almost) the truth's. `root`/a.txt and b.txt are sampled from the truth.
    """
    truth_folder = tiny.make_parent(root / "truth", "llama", seed=seed, initializer_range=0.5)
    truth = AutoModelForCausalLM.from_pretrained(truth_folder)
    torch.manual_seed(seed + 1)
    shifts = {
        name: torch.randn_like(tensor) * noise * tensor.std()
        for name, tensor in truth.state_dict().items()
        if ".mlp." not in name and tensor.dim() > 1
    }
    folders = [_shifted(truth_folder, root / name, shifts, sign) for name, sign in (("plus", 1), ("minus", -1))]
    far = {name: torch.randn_like(tensor) * 0.5 * tensor.std() for name, tensor in truth.state_dict().items()}
    base = _shifted(truth_folder, root / "base", {n: t for n, t in far.items() if n in shifts}, 1)
    for number, name in enumerate("ab"):
        (root / f"{name}.txt").write_text(_sampled(truth, blocks=96, seed=number))
    return base, folders


def recipe(root: Path, base: Path, parents: list[Path], **keys: object) -> Path:
    """A recipe with the sampled texts as data, default gate mode and backbone unless given."""
    table = {
        "base_model": str(base),
        "experts": [
            {"name": name, "source_model": str(folder), "data": [str(root / f"{name}.txt")]}
            for name, folder in zip("ab", parents, strict=True)
        ],
        "gate_mode": "centroid",
        **keys,
    }
    file = root / "recipe.yml"
    file.write_text(yaml.safe_dump({key: value for key, value in table.items() if value is not None}))
    return file


def _shifted(truth: Path, folder: Path, shifts: dict[str, torch.Tensor], sign: int) -> Path:
    model = AutoModelForCausalLM.from_pretrained(truth)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name in shifts:
                tensor.add_(shifts[name], alpha=sign)
            elif ".mlp." in name and sign < 0:  # else both experts were equal, and routers made no difference
                tensor.mul_(1.001)
    model.save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def _sampled(model: torch.nn.Module, *, blocks: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(blocks, 1, dtype=torch.long)
    for _ in range(BLOCK):
        logits = model(ids).logits[:, -1, FIRST:LAST]
        ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1, generator=generator) + FIRST], dim=1)
    return "".join(chr(32 + int(token) - 2) for token in ids[:, 1:].flatten())

"""The `train` section of a recipe: which parts to train, how long, and with which losses."""

from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from frankenmoe.recipe.fields import BlockLength, Count, HeldShare, Parts, Rate, Seed, Share, Steps
from frankenmoe.recipe.refusals import found, refusal
from frankenmoe.recipe.settings import NO_OPTION, Closed, Option


class TrainSettings(Closed):
    """How an MoE is trained. The loss is a weighted sum of terms; a weight of 0 leaves a term out."""

    what: Annotated[Parts, Option(listed=True, metavar="PART,...")] = Field(
        ("routers",), description="Parts to train; everything else stays frozen."
    )
    steps: Count = Field(200, description="Optimizer steps.")
    batch: Count = Field(8, description="Blocks per step, over all processes.")
    accumulate: Count = Field(1, description="Gradient accumulation: parts that a batch is computed in.")
    block: BlockLength = Field(128, description="Tokens per block.")
    router_rate: Rate = Field(0.01, description="Peak learning rate of the routers.")
    rate: Rate = Field(0.001, description="Peak learning rate of all other weights.")
    warmup: Steps = Field(10, description="Linear warm-up steps; cosine decay to a tenth follows.")
    weight_decay: Share = Field(0.0, description="AdamW weight decay of matrices other than gates.")
    rank: Count = Field(16, description="LoRA rank of new adapters.")
    experts_per_token: Annotated[Count | None, Option("--train-top-k")] = Field(
        None, description="Top-k during training; the MoE's own by default."
    )
    straight_through: bool = Field(False, description="Straight-through gradient for top-1 routing.")
    next_token: Share = Field(1.0, description="Weight of the next-token loss.")
    balance: Share = Field(0.0, description="Weight of the load-balancing loss (Switch), per layer.")
    z: Share = Field(0.0, description="Weight of the router z-loss (ST-MoE).")
    domain: Share = Field(0.0, description="Weight of the domain-classification loss.")
    distill: Share = Field(0.0, description="Weight of the KL to the parent that owns the text.")
    bias_balance: Annotated[Share, NO_OPTION] = Field(0.0, description="Must be 0: stock formats store no router bias.")
    noise: Share = Field(0.0, description="Standard deviation of the noise on gate logits.")
    jitter: Share = Field(0.0, description="Width of the uniform noise on router inputs.")
    capacity_factor: Rate | None = Field(None, description="Expert capacity during training; unlimited by default.")
    weights: Annotated[dict[str, Rate], Option(metavar="NAME=X")] = Field(
        default_factory=dict, description="Sampling weight of each domain, 1 by default."
    )
    hold_out: HeldShare = Field(0.1, description="Share of the text held out to measure on.")
    guard_blocks: Count = Field(32, description="Most held-out blocks measured per domain.")
    guard_every: Count | None = Field(
        None, description="Steps between measurements on held-out text; default steps / 10."
    )
    save_every: Count | None = Field(None, description="Steps between checkpoints; default guard_every.")
    seed: Seed = Field(0, description="Seed of text order, new adapters and noise.")

    @field_validator("straight_through", mode="before")
    @classmethod
    def _yes_or_no(cls, value: object) -> object:
        if not isinstance(value, bool):
            raise refusal(f"must be true or false, found {found(value)}", hint="write `straight_through: true`")
        return value

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        if self.bias_balance:
            raise refusal(
                f"must be 0, found {self.bias_balance}: loss-free balancing (arXiv 2408.15664) adds a bias to the "
                "router, and stock formats have no place for it, so the saved MoE would route differently",
                hint="use `balance: 0.01`, which changes the gate itself",
                at=("bias_balance",),
            )
        if not (self.next_token or self.distill or self.domain):
            raise refusal(
                "must leave something to learn from, found next_token, distill and domain all 0",
                hint="balance and z alone teach the routers nothing; give next_token a weight",
                at=("next_token",),
            )
        if self.batch % self.accumulate:
            raise refusal(
                f"must divide the batch of {self.batch}, found {self.accumulate}",
                hint=f"write `batch: {self.accumulate * -(-self.batch // self.accumulate)}`",
                at=("accumulate",),
            )
        return self

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.batch * self.block

    @property
    def guard_steps(self) -> int:
        """Steps between two measurements on held-out text."""
        return self.guard_every or max(1, self.steps // 10)

    @property
    def save_steps(self) -> int:
        """Steps between two checkpoints."""
        return self.save_every or self.guard_steps

"""The `train` section of a recipe: what is trained, on what, how long and by which losses; trains nothing itself."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from frankenmoe.recipefields import BlockLength, Count, HeldShare, LearningRate, Parts, Rate, Seed, Share, Steps
from frankenmoe.refusal import found, refusal, refuse_unknown_keys


class Train(BaseModel):
    """How an MoE is trained. The loss is the sum of the named terms, each times its coefficient; 0 leaves one out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    what: Parts = Field(("routers",), description="The parts that learn; everything else stays as it is.")
    steps: Count = Field(200, description="Optimizer steps.")
    batch: Count = Field(8, description="Blocks per step, over all processes together.")
    accumulate: Count = Field(1, description="Parts that a batch is computed in, to save memory.")
    block: BlockLength = Field(128, description="Tokens per block.")
    router_rate: LearningRate = Field(0.01, description="Peak learning rate of the routers.")
    rate: LearningRate = Field(0.001, description="Peak learning rate of everything else.")
    warmup: Steps = Field(
        10, description="Steps in which the rates rise to their peak; then they fall to a tenth as a cosine."
    )
    weight_decay: Share = Field(0.0, description="AdamW's weight decay, on matrices other than gates.")
    rank: Count = Field(16, description="Rank of new adapters, on experts and on attention.")
    experts_per_token: Count | None = Field(None, description="Top-k while training, where it differs from the MoE's.")
    straight_through: bool = Field(
        False, description="Whether the weight of a single expert, always 1, passes on the gradient of its probability."
    )
    next_token: Share = Field(1.0, description="Coefficient of the next-token cross-entropy.")
    balance: Share = Field(0.0, description="Coefficient of the Switch load balance, of each layer.")
    z: Share = Field(0.0, description="Coefficient of the router z-loss of ST-MoE.")
    domain: Share = Field(0.0, description="Coefficient of the cross-entropy of gate logits with the text's expert.")
    distill: Share = Field(0.0, description="Coefficient of KL to the parent that owns the text.")
    bias_balance: Share = Field(0.0, description="Must be 0: routers of stock formats have no bias to keep.")
    noise: Share = Field(0.0, description="Deviation of seeded Gaussian noise on gate logits while training.")
    jitter: Share = Field(0.0, description="Width of seeded uniform noise on what routers read while training.")
    capacity_factor: Rate | None = Field(
        None, description="Limit of tokens per expert while training; none by default."
    )
    weights: dict[str, Rate] = Field(
        default_factory=dict, description="How often each domain is drawn; 1 where a domain is not named."
    )
    hold_out: HeldShare = Field(0.1, description="Share of the text that is kept for the guard.")
    guard_blocks: Count = Field(32, description="Most held-out blocks per domain that the guard reads.")
    guard_every: Count | None = Field(
        None, description="Steps between two looks of the guard; a tenth of all by default."
    )
    save_every: Count | None = Field(
        None, description="Steps between two checkpoints; as often as the guard by default."
    )
    seed: Seed = Field(0, description="Where the order of the text, new adapters and noise start.")

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        refuse_unknown_keys(value, known=cls.model_fields)
        return {key: item for key, item in value.items() if item is not None}

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
                f"must be 0, found {self.bias_balance}: loss-free balancing (arXiv 2408.15664) steers by a bias that "
                "the routers of stock formats have no place for, so the trained MoE would route otherwise",
                hint="use `balance: 0.01`, which ends in the gate itself",
                at=("bias_balance",),
            )
        if not (self.next_token or self.distill or self.domain):
            raise refusal(
                "must leave something to learn from, found next_token, distill and domain all 0",
                hint="balance and z alone pull routers towards nothing; give next_token a coefficient",
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
        """Steps between two looks of the guard."""
        return self.guard_every or max(1, self.steps // 10)

    @property
    def save_steps(self) -> int:
        """Steps between two checkpoints."""
        return self.save_every or self.guard_steps

    def to_dict(self) -> dict[str, Any]:
        """Plain data without defaults."""
        plain: dict[str, Any] = self.model_dump(mode="json", exclude_defaults=True)
        return plain

"""The settings of a low-rank adapter made from the difference of two models."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from frankenmoe.recipe.fields import Count, Rate
from frankenmoe.recipe.refusals import found, refusal
from frankenmoe.recipe.settings import Closed

DEFAULT_RANK = 32

Energy = Annotated[Rate, Field(le=1)]


class AdapterSettings(Closed):
    """How large the adapter is: by its rank, or by what it must keep."""

    rank: Count | None = Field(None, description=f"Rank of every layer; default: {DEFAULT_RANK}.")
    energy: Energy | None = Field(
        None, description="The smallest rank per layer that keeps this share of the difference's squared norm."
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if self.rank is not None and self.energy is not None:
            raise refusal(
                f"must stand alone, found rank {found(self.rank)} beside it",
                hint="keep rank (the same for all layers) or energy (a rank for each)",
                at=("energy",),
            )
        return self

    @property
    def every_rank(self) -> int | None:
        """The rank of all layers; None if the energy decides."""
        return self.rank or (DEFAULT_RANK if self.energy is None else None)

"""Where a student is to live: the teacher's own space, a narrower one, or one of several teachers."""

from dataclasses import asdict, dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from distill.encoder import Encoder
from distill.joining import Several
from distill.store import Store


@dataclass(frozen=True)
class Kept:
    """What d of e directions keep of a teacher, without any student: the ceiling of one that lives in them.

    squared_length: of unit rows, their mean; cosine_error: mean |difference| of the cosines of all pairs; overlap: of the
    ten nearest other rows, the share that stays.
    """

    width: int
    of: int
    rows: int
    squared_length: float
    cosine_error: float
    overlap: float

    def __str__(self) -> str:
        return (
            f"{self.width} of {self.of} directions keep {self.squared_length:.1%} of the teacher's squared length; over {self.rows:,} "
            f"texts cosines are off by {self.cosine_error:.4f} on average, neighbour overlap@10 is {self.overlap:.3f}"
        )


@dataclass(frozen=True, eq=False)
class Space:
    """Where a student is to live: a teacher's space with its stored vectors; after `narrow`, d of its directions, (d, e).

    Of several teachers, `store` holds their joined vectors, and `own` those of `teacher` alone.
    """

    teacher: Encoder
    store: Store
    directions: Float[Tensor, "d e"] | None = None
    kept: Kept | None = None
    several: Several | None = None

    @property
    def own(self) -> Store:
        return self.store if self.several is None else Store.open(self.several.stores[0])

    def as_json(self) -> dict[str, Any] | None:
        if self.several is not None:
            return self.several.as_json()
        return None if self.kept is None else asdict(self.kept)

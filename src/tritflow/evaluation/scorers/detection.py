"""What a detector finds in a picture, and what any detector has to offer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""


@dataclass(frozen=True)
class Detection:
    """One object: its class, confidence in 0..1, box, and (where the detector segments) mask, bool [H, W]."""

    label: str
    score: float
    box: Box
    mask: NDArray[np.bool_] | None = field(default=None, repr=False, compare=False)


class Detector(Protocol):
    """Finds objects of known classes.

    Attributes:
        name: for results; says what it stands in for.
        classes: every label it can give; None when it looks for whatever it is asked (an open vocabulary).
    """

    name: str
    classes: tuple[str, ...] | None

    def detect(
        self, pictures: Sequence[NDArray[np.uint8]], wanted: Sequence[Sequence[str]], minimum: float
    ) -> list[list[Detection]]:
        """Objects of each uint8 [H, W, 3] picture with a score above `minimum`, best first.

        `wanted[i]` names the classes that matter in picture i; a closed detector may give others as well.
        """
        ...

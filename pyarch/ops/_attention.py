"""Checks of the options that every attention op has. Each raises TypeError or ValueError that names the argument."""

from __future__ import annotations

import math
from typing import Any


def window(value: Any, causal: bool = False) -> tuple[int, int]:
    """(left, right): keys that a row sees besides its own, -1 unbounded; causal narrows right to 0."""
    if value is None:
        left, right = -1, -1
    else:
        pair = isinstance(value, (tuple, list)) and len(value) == 2
        if not pair or not all(isinstance(side, int) and side >= -1 for side in value):
            raise ValueError(f"window: must be None or (left, right), each an int of at least -1, not {value!r}")
        left, right = value
    return left, 0 if causal else right


def scaling(softcap: float, scale: float | None) -> None:
    """Checks softcap and scale."""
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap: must be finite and at least 0 (0: none), not {softcap}")
    if scale is not None and not -math.inf < scale < math.inf:  # torch.compile cannot follow math.isfinite
        raise ValueError(f"scale: must be None or finite, not {scale}")

"""How many bytes the weight files of a checkpoint take, and what share of the targets fits into so many."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import ROUND_FLOOR, Context, Decimal
from fractions import Fraction
from typing import Final

from ranksearch.search.space import RankSpace
from ranksearch.search.spec import JobSpec
from ranksearch.search.targets import Target
from ranksearch.service.models import BYTES_PER_ELEMENT, Tensors

#: Significant digits of a `kept` that follows from bytes.
DIGITS: Final = 4

_WIDTH: Final = {"float32": 4, "bfloat16": 2, "float16": 2}
_INDEX_BYTES: Final = 4  # of each row of a target in form `pivoted`
_FILE_BYTES: Final = 64  # of a header that names no tensor
_PREFIX_BYTES: Final = 20  # that the names in a checkpoint may have more, as in `transformer.` and `left.bias`

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """Bytes of a checkpoint's safetensors files; never too few.

    Attributes:
        targets: Parameters of all targets, dense.
        width: Bytes of a parameter.
        dense: Bytes of the files when every target is dense.
        fixed: Bytes of all but the targets' matrices when none is dense: the other tensors, biases of metric `centred`,
            indices of form `pivoted`, headers.
    """

    targets: int
    width: int
    dense: int
    fixed: int

    @classmethod
    def of(cls, spec: JobSpec, space: RankSpace, tensors: Tensors) -> WeightFiles:
        """Those of a job whose model is stored as `tensors`."""
        width = _WIDTH.get(spec.export.dtype) or width_of(spec.model.dtype, tensors)
        model = sum(t.parameters * width if t.dtype in BYTES_PER_ELEMENT else t.size for t in tensors.values())
        free = space.low_ranks < space.full_ranks
        compressed = [target for target, is_free in zip(space.targets, free, strict=True) if is_free]
        whole = {name: tensor.shape for name, tensor in tensors.items()}
        parts = whole.copy()
        biases = indices = 0
        for target in compressed:
            rows = max(target.out_features, target.in_features)  # a file may hold a matrix turned
            parts.pop(f"{target.name}.weight", None)
            parts |= _parts(target, space)
            if spec.method.metric == "centred" and f"{target.name}.bias" not in tensors:
                parts[f"{target.name}.left.bias"] = (rows,)
                biases += rows
            if space.form == "pivoted":
                indices += _INDEX_BYTES * rows
        files = 1 + 2 * model // spec.export.max_shard_bytes  # two that follow each other hold more than one may
        return cls(
            targets=space.parameters,
            width=width,
            dense=model + _header_bytes(whole, model, files),
            fixed=model + width * (biases - space.parameters) + indices + _header_bytes(parts, model, files),
        )

    def bytes(self, kept: float) -> int:
        """The most that files of this budget take."""
        return self.dense if kept >= 1 else self.fixed + self.width * math.ceil(_exact(kept) * self.targets)

    def kept(self, most: int) -> float:
        """The largest budget of `DIGITS` digits whose files take no more; 1 where the dense model fits, or 0."""
        if most >= self.dense:
            return 1.0
        share = Fraction(max(most - self.fixed, 0) // self.width, self.targets)
        return float(Context(prec=DIGITS, rounding=ROUND_FLOOR).divide(share.numerator, Decimal(share.denominator)))


def width_of(dtype: str, tensors: Tensors) -> int:
    """Bytes of a parameter in this dtype; for `auto` in the widest that the model is stored in."""
    stored = (BYTES_PER_ELEMENT[t.dtype] for t in tensors.values() if t.dtype in BYTES_PER_ELEMENT)
    return _WIDTH.get(dtype) or max(stored, default=2)


def _exact(kept: float) -> Fraction:
    return Fraction(repr(float(kept)))


def _parts(target: Target, space: RankSpace) -> Shapes:
    """What a compressed target is stored as, with the most digits that its shapes may have."""
    name, m, n, r = target.name, target.out_features, target.in_features, target.full_rank
    if space.form == "pivoted":
        return {f"{name}.pivot.weight": (r, n), f"{name}.rest.weight": (m, r), f"{name}.order": (m,)}
    return {f"{name}.left.weight": (m, r), f"{name}.right.weight": (r, n)}


def _header_bytes(shapes: Shapes, total: int, files: int) -> int:
    return _FILE_BYTES * files + sum(_entry_bytes(name, shape, total) for name, shape in shapes.items())


def _entry_bytes(name: str, shape: Iterable[int], total: int) -> int:
    entry = {name: {"dtype": "BF16", "shape": list(shape), "data_offsets": [total, total]}}
    return _PREFIX_BYTES + len(json.dumps(entry, separators=(",", ":")))

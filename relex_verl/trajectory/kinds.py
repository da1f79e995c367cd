"""The kinds of trajectory: what is kept of the weights, how, what that costs, and what can be had from it again.

Most keep rows: one increment of every tensor for each observed step. A sketch keeps moments of the whole window.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from relex_verl.maths.extrapolators import METHODS, Prediction, increment_coefficients
from relex_verl.maths.sketch import SIZES, lift
from relex_verl.trajectory.encodings import moments, quantized, sparse
from relex_verl.trajectory.kernels import compiled

__all__ = ["KINDS", "QUANTIZATIONS", "TRAJECTORIES", "Kind", "RowCodec", "kind_of"]

# A dozen float32 rows predict as well as sixty (measured, recipes/study); 16 leave some for the diagnostics.
AUTO_ROWS = 16
TRAJECTORIES = ("fp32", "bf16", "sketch")
QUANTIZATIONS = ("int8", "int4", "none")


@dataclass(frozen=True, kw_only=True)
class RowCodec:
    """How single rows are kept: as increments from one row to the next. The state is the last row.

    Attributes:
        anchor_is_last: predictions start from the last row, with c_t = w_t - 1; else from theta_0, with c = a.
        encode: (state, new weights) -> increment; it has `changed`, the number of elements that changed.
        advance: (state, increment) -> None, in place.
        dots: (increments, numel, device) -> the new row of H, (t,).
        products: (increments, numel, numbers of some of them) -> the row of H of each of those, when all are there.
        take: (state, new weights, rows before, room) -> (increment, the new row of H, `changed`): the two at once.
        error_bound: (increment) -> how far an element of the state can be from the weights after it.
        sizes: (elements of each shard) -> elements of each field of their increments together and their type, where they
            are known; `take` then fills room of that size.
    """

    anchor_is_last: bool
    encode: Callable[..., Any]
    advance: Callable[..., None]
    dots: Callable[..., torch.Tensor]
    products: Callable[..., list[torch.Tensor]]
    take: Callable[..., tuple[Any, torch.Tensor, int]]
    error_bound: Callable[..., float]
    sizes: Callable[[Sequence[int]], dict[str, tuple[int, torch.dtype]]]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of trajectory: all that anything here knows of it.

    Attributes:
        name: as index.json says it ("encoding").
        trajectory, quantization: the settings that lead to it; no quantization where there is no choice.
        wants_master: it follows float32 master weights, where an engine hands them out.
        fallback: name of the kind that it becomes where there are none; None: it follows the bfloat16 weights then.
        auto_rows: rows that `observe_every=auto` aims at up to the cut; None: every step is observed.
        dtype: of the state and of the anchor.
        part: type of what is kept of a shard, several of them: increments or moments.
        coefficients: (a (L, T), steps) -> c (L, K), one for each part.
        accumulate: (anchor, parts, c, dtype) -> predicted weights.
        state_bytes: host memory a parameter for the state that the next step is compared with.
        row_bytes: bytes a parameter for each row, given the share of bf16 weights that change; 0 for moments.
        fixed_bytes: bytes a parameter that do not depend on the number of rows; 0 where rows are kept.
        add_row: (theta_0, new weights, moments, P_j of the row, change of basis) -> S S^T and |delta|^2, (r^2 + 1,).
        rows: how single rows are kept; None for a sketch, whose state and anchor are theta_0.
        size: r, moments kept (`maths.sketch`); 0 where rows are.
        own: tensor -> another kind in which it is kept, such as float32 router biases among bfloat16 weights.
    """

    name: str
    trajectory: str
    quantization: str | None = None
    wants_master: bool = True
    fallback: str | None = None
    auto_rows: int | None = None
    dtype: torch.dtype = torch.float32
    part: type
    coefficients: Callable[[torch.Tensor, Sequence[int]], torch.Tensor]
    accumulate: Callable[..., torch.Tensor]
    state_bytes: int = 4
    row_bytes: Callable[[float], float] = lambda change_rate: 0.0
    fixed_bytes: int = 0
    add_row: Callable[..., torch.Tensor] | None = None
    rows: RowCodec | None = None
    size: int = 0
    own: Mapping[str, "Kind"] = field(default_factory=dict, hash=False)

    def of(self, tensor: str) -> "Kind":
        """The kind in which a tensor is kept."""
        return self.own.get(tensor, self)

    def beside(self, encodings: Mapping[str, str]) -> "Kind":
        """The same with some tensors kept in other kinds, tensor -> name of a kind that keeps rows."""
        return replace(self, own={tensor: KINDS[name] for tensor, name in encodings.items()}) if encodings else self

    @property
    def encodings(self) -> dict[str, str]:
        """Tensor -> name of the kind, of those that are kept in another than this one."""
        return {tensor: kind.name for tensor, kind in self.own.items()}

    @property
    def ways(self) -> dict[str, type]:
        """Name of each kind in use -> the type of its parts."""
        return {kind.name: kind.part for kind in (self, *self.own.values())}

    def coefficients_of(
        self, names: Sequence[str], weights_LT: torch.Tensor, steps: Sequence[int]
    ) -> dict[str, list[float]]:
        """Tensor -> c of each of its parts, for a (L, T); tensors in kinds of their own have their own."""
        rows = {kind.name: kind.coefficients(weights_LT, steps).tolist() for kind in (self, *self.own.values())}
        return {name: rows[self.of(name).name][i] for i, name in enumerate(names)}

    @property
    def keeps_rows(self) -> bool:
        """Whether single rows can be had again; else they are in memory as moments, and saved with a host's checkpoint."""
        return self.rows is not None

    def spacing(self, t_cut: int) -> int:
        """Steps between two rows that `observe_every=auto` chooses for a window of so many steps."""
        return 1 if self.auto_rows is None else max(1, round(t_cut / self.auto_rows))

    @property
    def methods(self) -> list[str]:
        """Names of the methods that can be predicted from it."""
        return [
            name
            for name, method in METHODS.items()
            if self.keeps_rows or (method.degree is not None and method.degree < self.size)
        ]

    def check(self, prediction: Prediction, steps: Sequence[int]) -> None:
        """Refuse what a sketch cannot give: it knows the steps' polynomials, no single one of them.

        Args:
            prediction: what is wanted.
            steps: the observed steps.

        Raises:
            ValueError: with the cure.
        """
        if self.keeps_rows:
            return
        if prediction.method not in self.methods:
            raise ValueError(
                f"{prediction.method} cannot be predicted from a sketch of size {self.size}: use {', '.join(self.methods)}"
            )
        if prediction.rank > self.size:
            raise ValueError(f"rank {prediction.rank} is more than a sketch of size {self.size} holds")
        if prediction.fit_from > steps[0]:
            raise ValueError(
                f"fit_from {prediction.fit_from}: a sketch cannot leave out steps that it holds, the first is {steps[0]}"
            )


def _from_last(weights_LT: torch.Tensor, steps: Sequence[int]) -> torch.Tensor:
    return increment_coefficients(weights_LT)


def _from_origin(weights_LT: torch.Tensor, steps: Sequence[int]) -> torch.Tensor:
    return weights_LT


def _from_moments(weights_LT: torch.Tensor, steps: Sequence[int], size: int) -> torch.Tensor:
    return weights_LT @ lift(steps, size)


def _quantized(quantization: str) -> Kind:
    bits = {"int8": 8, "int4": 4, "none": 0}[quantization]
    row_bytes = bits / 8 + 4 / quantized.GROUP if bits else 4.0
    return Kind(
        name=f"fp32-{quantization}",
        trajectory="fp32",
        quantization=quantization,
        fallback="bf16",
        auto_rows=AUTO_ROWS,
        part=quantized.QuantizedIncrement,
        coefficients=_from_origin,
        accumulate=compiled(quantized.accumulate, "quantized"),
        row_bytes=lambda change_rate: row_bytes,
        rows=RowCodec(
            anchor_is_last=False,
            encode=partial(quantized.encode, bits=bits),
            advance=compiled(quantized.advance, "quantized"),
            dots=quantized.dots,
            products=quantized.products,
            take=compiled(quantized.take, "quantized", bits=bits),
            error_bound=quantized.error_bound,
            sizes=partial(quantized.sizes, bits=bits),
        ),
    )


def _sketch(size: int) -> Kind:
    return Kind(
        name=f"sketch-{size}",
        trajectory="sketch",
        part=moments.Moment,
        coefficients=partial(_from_moments, size=size),
        accumulate=compiled(moments.accumulate, "moments"),
        add_row=compiled(moments.add_row, "moments"),
        fixed_bytes=4 * size,
        size=size,
    )


_BF16 = Kind(
    name="bf16",
    trajectory="bf16",
    wants_master=False,
    dtype=torch.bfloat16,
    part=sparse.SparseIncrement,
    coefficients=_from_last,
    accumulate=compiled(sparse.accumulate, "sparse"),
    state_bytes=2,
    row_bytes=lambda change_rate: 4 * change_rate,
    rows=RowCodec(
        anchor_is_last=True,
        encode=sparse.encode,
        advance=compiled(sparse.advance, "sparse"),
        dots=sparse.dots,
        products=compiled(sparse.products, "entries"),
        take=compiled(sparse.take, "sparse"),
        error_bound=lambda increment: 0.0,
        sizes=lambda numels: {},  # known when the changes are
    ),
)
KINDS: dict[str, Kind] = {
    kind.name: kind for kind in (_BF16, *map(_quantized, QUANTIZATIONS), *(_sketch(size) for size in SIZES))
}


def kind_of(trajectory: str, quantization: str, sketch_size: int = 4) -> Kind:
    """The kind that `relex.trajectory`, `relex.quantization` and `relex.sketch_size` name."""
    return KINDS[{"bf16": "bf16", "fp32": f"fp32-{quantization}", "sketch": f"sketch-{int(sketch_size)}"}[trajectory]]

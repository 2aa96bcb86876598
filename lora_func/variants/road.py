"""RoAd: rotate and scale pairs of outputs.

    y' = R y,   (y_j, y_k) -> α (cos θ y_j - sin θ y_k, sin θ y_j + cos θ y_k),   b' = R b

In a group of g outputs, j is paired with k = j + g / 2. ``road1`` has one θ and α for each pair,
``road2`` one for each output, ``road4`` one for each of the four entries of a pair's matrix.

*Identity at the start because* θ = 0 and α = 1, and only R - I is applied.

Asks of W: ``linear`` only.

References:
    https://arxiv.org/abs/2409.00119, eq. 2-4 and table 1. Code: huggingface/peft
    ``tuners/road/layer.py``.

Deviations: the paper pairs neighbours, PEFT j with j + g / 2, a fixed permutation of the same; we
follow PEFT, and ``group_size=2`` gives the paper's. The bias is rotated with the output, as in
PEFT.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from lora_func.checks import check_choice, check_count
from lora_func.configs import LinearConfig
from lora_func.numerics import at_least_float32, is_eager
from lora_func.variant import PeftFormat, PeftLeaf, Trial, Variant, prepared
from lora_func.weights import Weight, dense, linear

_KINDS = (1, 2, 4)


@dataclass(frozen=True, kw_only=True)
class ROAD(LinearConfig):
    """2D rotary adaptation.

    Attributes:
        kind: 1, 2 or 4: how many times d_out / 2 there are of θ and α each.
        group_size: Outputs in a group; even, divides d_out.

    Examples:
        >>> import torch, lora_func as lf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8))
        >>> params = lf.init(model, lf.ROAD(kind=2, group_size=4))
        >>> {key: tuple(leaf.shape) for key, leaf in params.items()}
        {'0.road2.theta': (2, 4), '0.road2.alpha': (2, 4)}
    """

    kind: int = 1
    group_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("kind", self.kind, _KINDS)
        check_count("group_size", self.group_size, least=2)
        if self.group_size % 2:
            raise ValueError(f"group_size: got {self.group_size}, expected an even number")

    @property
    def variant(self) -> str:
        """The name that belongs to the kind."""
        return f"road{self.kind}"


def init(W: Weight, cfg: ROAD, generator: Generator, stats: None = None) -> dict[str, Tensor]:
    """Start without rotation or scaling.

    Returns:
        theta and alpha, shape (groups, g / 2), (groups, g) or (groups, 2, g).

    Raises:
        ValueError: If the group size does not divide d_out.
    """
    d_out, _ = W.shape
    if d_out % cfg.group_size:
        raise ValueError(
            f"group_size = {cfg.group_size} does not divide d_out = {d_out}; choose a divisor"
        )
    g = cfg.group_size
    shape = (d_out // g, *{1: (g // 2,), 2: (g,), 4: (2, g)}[cfg.kind])
    return {"theta": torch.zeros(shape), "alpha": torch.ones(shape)}


def _entries(kind: int, theta: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """The diagonal less one and the off-diagonal of each output, shape (..., groups, g)."""
    cos, sin = alpha * theta.cos() - 1, alpha * theta.sin()
    if kind == 1:
        return torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
    return (cos, sin) if kind == 2 else (cos[..., 0, :], sin[..., 1, :])


def _matrices(kind: int, params: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """What multiplies each half of a group, and what multiplies the other half."""
    theta, alpha = at_least_float32(params["theta"]), at_least_float32(params["alpha"])
    diagonal, across = _entries(kind, theta, alpha)
    half = across.shape[-1] // 2
    across = torch.cat([-across[..., :half], across[..., half:]], -1)
    halves = (*across.shape[:-1], 2, half)
    return {
        "diagonal": diagonal.reshape(halves).to(dtype),
        "across": across.reshape(halves).to(dtype),
    }


def _rotate(y: Tensor, matrices: Mapping[str, Tensor]) -> Tensor:
    diagonal, across = matrices["diagonal"].to(y.dtype), matrices["across"].to(y.dtype)
    halves = y.reshape(*y.shape[:-1], *diagonal.shape[-3:])
    if diagonal.ndim > 3:
        diagonal, across = diagonal[:, None], across[:, None]
    if is_eager(y):
        turned: Tensor = _Turned.apply(halves, diagonal, across)  # type: ignore[no-untyped-call]
        return turned.flatten(-3)
    turned = torch.addcmul(halves, halves, diagonal)
    return torch.addcmul(turned, halves.flip(-2), across).flatten(-3)


class _Turned(torch.autograd.Function):
    """``h + D h + C flip(h)`` of halves h, of which the backward pass needs h alone."""

    @staticmethod
    def forward(ctx: Any, halves: Tensor, diagonal: Tensor, across: Tensor) -> Tensor:
        ctx.save_for_backward(halves, diagonal, across)
        return _turned(halves, diagonal, *across.unbind(-2))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        halves, diagonal, across = ctx.saved_tensors
        if torch.is_grad_enabled():
            of_halves = torch.addcmul(gradient, gradient, diagonal) + (gradient * across).flip(-2)
        else:
            of_first, of_second = across.unbind(-2)
            of_halves = _turned(gradient, diagonal, of_second, of_first)
        of_diagonal = (gradient * halves).sum_to_size(diagonal.shape)
        of_across = (gradient * halves.flip(-2)).sum_to_size(across.shape)
        return of_halves, of_diagonal, of_across


def _turned(halves: Tensor, diagonal: Tensor, of_first: Tensor, of_second: Tensor) -> Tensor:
    turned = torch.addcmul(halves, halves, diagonal)
    first, second = halves.unbind(-2)
    turned[..., 0, :].addcmul_(second, of_first)
    turned[..., 1, :].addcmul_(first, of_second)
    return turned


def _peft_format(kind: int) -> PeftFormat:
    def settings(leaves: Mapping[str, Tensor], shape: tuple[int, int]) -> dict[str, Any]:
        return {"variant": f"road_{kind}", "group_size": shape[0] // leaves["theta"].shape[0]}

    def read(tensor: Tensor, config: Mapping[str, Any]) -> Tensor:
        g = config["group_size"]
        return tensor.reshape(-1, *{1: (g // 2,), 2: (g,), 4: (2, g)}[kind])

    names = ("theta", "alpha")
    return PeftFormat(
        "ROAD",
        leaves={leaf: PeftLeaf(f"road_{leaf}", torch.Tensor.flatten, read) for leaf in names},
        settings=settings,
        means=lambda config, path: config["variant"] == f"road_{kind}",
        defaults={"variant": "road_1", "group_size": 64},
    )


def _variant(kind: int) -> Variant:
    def prepare(
        params: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        return _matrices(kind, params, dtype)

    def apply(W: Weight, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        if "across" not in params:
            params = prepared(prepare, params, W, x.dtype)
        return _rotate(linear(x, W), params)

    def weight(W: Weight, params: Mapping[str, Tensor]) -> Tensor:
        return _rotate(dense(W).mT, _matrices(kind, params, W.dtype)).mT

    def bias(b: Tensor | None, params: Mapping[str, Tensor]) -> Tensor | None:
        return None if b is None else _rotate(b, _matrices(kind, params, b.dtype))

    shape = {1: "d_out/g g/2", 2: "d_out/g g", 4: "d_out/g 2 g"}[kind]
    return Variant(
        name=f"road{kind}",
        config=ROAD,
        family="orthogonal",
        init=init,
        apply=apply,
        prepare=prepare,
        leaves={"theta": shape, "alpha": shape},
        weight=weight,
        bias=bias,
        peft=(_peft_format(kind),),
        trials={
            f"road{kind}": Trial(
                {"kind": kind}, lr=1e-2, peft=("RoadConfig", {"variant": f"road_{kind}"})
            )
        },
        stacks=True,
        products_only=True,
    )


VARIANTS = tuple(_variant(kind) for kind in _KINDS)

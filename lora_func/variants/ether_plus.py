"""ETHER+: two trained directions for each block of the inputs, one added and one removed.

    W' = H_out W H_in,   H = I + v vᵀ / ‖v‖² - u uᵀ / ‖u‖²   in each block

*Identity at the start because* v = -u, whose projections are the same bits.

Asks of W: ``linear`` only.

References:
    https://arxiv.org/abs/2405.20271, eq. 7. Code: mwbini/ether ``etherplus``.

Deviations: with several blocks on the input side, the authors' code gives each group of *rows* of W
a block of its own; we follow the paper, where each block of the input has one. ETHER itself, a
single reflection, never starts as the base, and is not offered. ‖H - I‖ is at most √2 in each
block, at any learning rate; the authors use one of 1e-3 to 1e-2 and 1 to 32 blocks.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from einops import einsum
from torch import Generator, Tensor

from lora_func.checks import check_count, check_flag
from lora_func.configs import LinearConfig
from lora_func.numerics import at_least_float32, kaiming_uniform
from lora_func.variant import Trial, Variant, prepared
from lora_func.weights import Weight, bias_of, dense, linear


@dataclass(frozen=True, kw_only=True)
class ETHERPlus(LinearConfig):
    """Efficient transformation by hyperplane reflections, relaxed.

    Attributes:
        blocks: The number of blocks; divides d_in, and d_out if ``two_sided``.
        two_sided: Whether the output is transformed too.

    Example:
        >>> import torch, lora_func as lf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 6))
        >>> params = lf.init(model, lf.ETHERPlus(blocks=2))
        >>> {key.rpartition(".")[2]: tuple(leaf.shape) for key, leaf in params.items()}
        {'u': (2, 2), 'v': (2, 2), 'u_out': (2, 3), 'v_out': (2, 3)}
    """

    blocks: int = 1
    two_sided: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("blocks", self.blocks)
        check_flag("two_sided", self.two_sided)


def init(W: Weight, cfg: ETHERPlus, generator: Generator, stats: None = None) -> dict[str, Tensor]:
    """Draw u, and take -u for v.

    Returns:
        u and v (blocks, d_in / blocks); if two-sided, u_out and v_out (blocks, d_out / blocks).

    Raises:
        ValueError: If the number of blocks does not divide a width.
    """
    (d_out, d_in), n = W.shape, cfg.blocks
    leaves: dict[str, Tensor] = {}
    for name, end, width in (("d_in", "", d_in), ("d_out", "_out", d_out)):
        if end and not cfg.two_sided:
            continue
        if width % n:
            raise ValueError(f"blocks = {n} does not divide {name} = {width}; choose a divisor")
        u = kaiming_uniform(n, width // n, generator)
        leaves |= {f"u{end}": u, f"v{end}": -u}
    return leaves


def prepare(
    params: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Normalise the directions.

    Returns:
        added, removed, each (blocks, d_in / blocks); the same of the output, if two-sided.
    """
    names = {"v": "added", "u": "removed", "v_out": "added_out", "u_out": "removed_out"}
    return {names[leaf]: _unit(params[leaf]).to(dtype) for leaf in names if leaf in params}


def _unit(t: Tensor) -> Tensor:
    t = at_least_float32(t)
    squares = t.square().sum(-1, keepdim=True)
    return t * squares.clamp_min(torch.finfo(t.dtype).tiny).rsqrt()


def _change(x: Tensor, units: Mapping[str, Tensor], end: str = "") -> Tensor:
    """The projections on the added directions less those on the removed ones."""
    added, removed = (units[f"{name}{end}"].to(x.dtype) for name in ("added", "removed"))
    if added.ndim == 2:  # one adapter is a stack of one
        added, removed = added[None], removed[None]
    blocks = x.reshape(len(added), -1, *added.shape[-2:])
    return (_projected(blocks, added) - _projected(blocks, removed)).reshape(x.shape)


def _projected(blocks: Tensor, unit: Tensor) -> Tensor:
    along = einsum(blocks, unit, "K n i d, K i d -> K n i")
    return einsum(along, unit, "K n i, K i d -> K n i d")


def apply(W: Weight, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Transform the input, and the output before its bias.

    Returns:
        Shape (..., d_out).
    """
    if "added" not in params:
        params = prepared(prepare, params, W, x.dtype)
    y, b = linear(x + _change(x, params), W), bias_of(W)
    if "added_out" not in params:
        return y
    return y + _change(y if b is None else y - b.to(y.dtype), params, "_out")


def weight(W: Weight, params: Mapping[str, Tensor]) -> Tensor:
    """Compute ``H_out W H_in``.

    Returns:
        Shape (d_out, d_in).
    """
    W = dense(W)
    units = prepare(params, (0, 0), W.dtype)
    W = W.expand(*params["u"].shape[:-2], *W.shape)
    W = W + _change(W, units)
    if "added_out" not in units:
        return W
    return W + _change(W.mT.contiguous(), units, "_out").mT


VARIANT = Variant(
    name="ether_plus",
    config=ETHERPlus,
    family="multiplicative",
    init=init,
    apply=apply,
    prepare=prepare,
    weight=weight,
    leaves={
        "u": "blocks d_in/blocks",
        "v": "blocks d_in/blocks",
        "u_out?": "blocks d_out/blocks",
        "v_out?": "blocks d_out/blocks",
    },
    trials={
        "ether-plus": Trial(lr=1e-2),
        "ether-plus-blocks": Trial({"blocks": 4, "two_sided": False}, lr=1e-2),
    },
    stacks=True,
)

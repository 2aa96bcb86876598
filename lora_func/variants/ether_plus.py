"""ETHER+: two trained directions for each block of the inputs, one added and one removed.

    W' = H_out W H_in,   H = I + v vᵀ / ‖v‖² - u uᵀ / ‖u‖²   in each block

*Identity at the start because* v = -u, so that both projections cancel: exactly, as they are
computed from v + u.

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

    Examples:
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
    """Compute ``v vᵀ - u uᵀ = (s dᵀ + d sᵀ) / 2`` of unit vectors, with s = v + u and d = v - u.

    At the start s is exactly zero, and so is each product with it, however it is rounded.

    Returns:
        down, s and d (blocks, 2, d_in / blocks), and up, d / 2 and s / 2; down_out and up_out, if
        two-sided.
    """
    found = {}
    for end in ("", "_out"):
        if f"u{end}" in params:
            u, v = _unit(params[f"u{end}"]), _unit(params[f"v{end}"])
            found[f"down{end}"] = torch.stack([v + u, v - u], -2).to(dtype)
            found[f"up{end}"] = torch.stack([v - u, v + u], -2).to(dtype) / 2
    return found


def _unit(t: Tensor) -> Tensor:
    t = at_least_float32(t)
    squares = t.square().sum(-1, keepdim=True)
    return t * squares.clamp_min(torch.finfo(t.dtype).tiny).rsqrt()


def _change(x: Tensor, factors: Mapping[str, Tensor], end: str = "") -> Tensor:
    """Multiply the blocks of rows x (..., width) by ``(s dᵀ + d sᵀ) / 2``."""
    down, up = (factors[f"{name}{end}"].to(x.dtype) for name in ("down", "up"))
    if down.ndim == 3:  # one adapter is a stack of one
        down, up = down[None], up[None]
    blocks = x.reshape(len(down), -1, down.shape[1], down.shape[3])
    along = einsum(blocks, down, "K n i d, K i two d -> K n i two")
    return einsum(along, up, "K n i two, K i two d -> K n i d").reshape(x.shape)


def apply(W: Weight, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Transform the input, and the output before its bias.

    Returns:
        Shape (..., d_out).
    """
    if "down" not in params:
        params = prepared(prepare, params, W, x.dtype)
    y, b = linear(x + _change(x, params), W), bias_of(W)
    if "down_out" not in params:
        return y
    return y + _change(y if b is None else y - b.to(y.dtype), params, "_out")


def weight(W: Weight, params: Mapping[str, Tensor]) -> Tensor:
    """Compute ``H_out W H_in``.

    Returns:
        Shape (d_out, d_in).
    """
    W = dense(W)
    factors = prepare(params, (0, 0), W.dtype)
    W = W.expand(*params["u"].shape[:-2], *W.shape)
    W = W + _change(W, factors)
    return W if "down_out" not in factors else W + _change(W.mT, factors, "_out").mT


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

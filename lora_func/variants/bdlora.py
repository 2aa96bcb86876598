"""BD-LoRA: a LoRA one of whose factors is block-diagonal, for serving on several devices.

    W' = W + s B A,   s = alpha / r;   A or B consists of n blocks on the diagonal

With the side "A" block i of A reads part i of the input, for layers whose input is split over
devices; with "B" block i of B writes part i of the output, for layers whose output is split.

*Identity at the start because* B = 0, so the added term is exactly zero in every dtype.

Asks of W: ``linear`` only.

References:
    https://arxiv.org/abs/2510.23346, section 3. Code: huggingface/peft ``tuners/lora/variants.py``.

Deviations: none in the numbers. PEFT names the sides of its sites in one config; here each side has
a config of its own, and ``init`` takes both. Scale and learning rate are those of LoRA.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import einsum, rearrange
from torch import Generator, Tensor

from lora_func.checks import check_choice, check_count
from lora_func.configs import LowRankConfig
from lora_func.numerics import DROPOUT, dropout, dropout_leaf, low_rank_norm, scaled
from lora_func.variant import Trial, Variant, prepared
from lora_func.variants._low_rank import PEFT_LORA, is_block_diagonal, prepare
from lora_func.weights import Weight, dense, linear

Leaves = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class BDLoRA(LowRankConfig):
    """Block-diagonal LoRA.

    Attributes:
        side: The factor with blocks: "A" for layers that devices split along the input, such as
            ``o_proj`` and ``down_proj``; "B" for those that they split along the output.
        blocks: The number of blocks; divides r and the split width.

    Examples:
        >>> import torch, lora_func as lf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 6))
        >>> params = lf.init(model, lf.BDLoRA(r=2, side="B", blocks=2))
        >>> {key: tuple(leaf.shape) for key, leaf in params.items()}
        {'0.bdlora_b.A': (2, 4), '0.bdlora_b.B': (6, 1), '0.bdlora_b._scale': ()}
    """

    side: Literal["A", "B"] = "A"
    blocks: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("side", self.side, ("A", "B"))
        check_count("blocks", self.blocks)
        for r in self.ranks:
            if r % self.blocks:
                raise ValueError(f"blocks: got {self.blocks}, which does not divide r = {r}")

    @property
    def variant(self) -> str:
        """The name that belongs to the side."""
        return f"bdlora_{self.side.lower()}"


def init(W: Weight, cfg: BDLoRA, generator: Generator, stats: None = None) -> dict[str, Tensor]:
    """Draw A, leave B at zero.

    Returns:
        A (r, d_in / blocks) and B (d_out, r), or A (r, d_in) and B (d_out, r / blocks); _scale ();
        _dropout () if there is any.

    Raises:
        ValueError: If the number of blocks does not divide the width of the side.
    """
    (d_out, d_in), n = W.shape, cfg.blocks
    name, size = ("d_in", d_in) if cfg.side == "A" else ("d_out", d_out)
    if size % n:
        raise ValueError(f"blocks = {n} does not divide {name} = {size}; choose a divisor")
    columns, inner = (d_in // n, cfg.r) if cfg.side == "A" else (d_in, cfg.r // n)
    A = torch.empty(cfg.r, columns, dtype=torch.float32)
    bound = (6 / columns) ** 0.5  # torch's kaiming_uniform_ without the √5 of LoRA
    return {
        "A": A.uniform_(-bound, bound, generator=generator),
        "B": torch.zeros(d_out, inner),
        "_scale": torch.tensor(cfg.scale, dtype=torch.float64),
        **dropout_leaf(cfg.dropout),
    }


def apply(W: Weight, params: Leaves, x: Tensor) -> Tensor:
    """Compute ``linear(x, W) + s drop(x) Aᵀ Bᵀ`` with the blocks of A or B.

    Returns:
        Shape (..., d_out).
    """
    if "up" not in params:
        params = prepared(prepare, params, W, x.dtype)
    A, up, y = params["A"].to(x.dtype), params["up"].to(x.dtype), linear(x, W)
    if A.ndim == 2:  # one adapter is a stack of one
        A, up = A[None], up[None]
    rows = dropout(x, params.get(DROPOUT)).reshape(len(A), -1, x.shape[-1])
    return y + _product(_product(rows, A), up).reshape(y.shape).to(y.dtype)


def _product(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply x (K, n, width) by a factor (K, m, width / blocks) that has blocks in a diagonal."""
    blocks = x.shape[-1] // factor.shape[-1]
    product: Tensor = einsum(
        rearrange(x, "K n (i d) -> K n i d", i=blocks),
        rearrange(factor, "K (i m) d -> K i m d", i=blocks),
        "K n i d, K i m d -> K n i m",
    )
    return product.flatten(-2)


def _whole(factor: Tensor, blocks: int) -> Tensor:
    """Build the block-diagonal factor with its zeros."""
    eye = torch.eye(blocks, dtype=factor.dtype, device=factor.device)
    split = rearrange(factor, "... (i m) d -> ... i m d", i=blocks)
    whole: Tensor = einsum(split, eye, "... i m d, i j -> ... i m j d")
    return whole.flatten(-2).flatten(-3, -2)


def weight(W: Weight, params: Leaves) -> Tensor:
    """Compute ``W + s B A``.

    Returns:
        Shape (d_out, d_in).
    """
    W, A, B = dense(W), params["A"], scaled(params["B"], params["_scale"])
    A = _whole(A, W.shape[-1] // A.shape[-1])
    return W + (_whole(B, A.shape[-2] // B.shape[-1]) @ A).to(W.dtype)


def delta_norm(params: Leaves, shape: tuple[int, int] | None) -> Tensor | None:
    """Compute the norm of the change from its factors.

    Returns:
        Shape (); None without a shape.
    """
    if shape is None:
        return None
    A, B = params["A"], params["B"]
    A = _whole(A, shape[1] // A.shape[-1])
    return low_rank_norm(A, _whole(B, A.shape[-2] // B.shape[-1]), params["_scale"])


def _names(paths: Sequence[str]) -> list[str] | None:
    return sorted({path.rpartition(".")[2] for path in paths}) or None


def _variant(side: str) -> Variant:
    def settings(leaves: Leaves, shape: tuple[int, int]) -> dict[str, Any]:
        r = leaves["A"].shape[-2]
        whole, part = (shape[1], leaves["A"]) if side == "a" else (r, leaves["B"])
        blocks = {"use_bdlora.nblocks": whole // part.shape[-1]}
        return {**PEFT_LORA.settings(leaves, shape), **blocks, "use_bdlora.match_strict": False}

    axes = {
        "a": {"A": "r d_in/blocks", "B": "d_out r"},
        "b": {"A": "r d_in", "B": "d_out r/blocks"},
    }
    return Variant(
        name=f"bdlora_{side}",
        config=BDLoRA,
        family="low-rank",
        init=init,
        apply=apply,
        prepare=prepare,
        casts=("A",),
        weight=weight,
        delta_norm=delta_norm,
        leaves={**axes[side], "_scale": "", "_dropout?": ""},
        peft=(
            PEFT_LORA._replace(
                settings=settings,
                means=lambda config, path: is_block_diagonal(config, path, side),
                defaults={**PEFT_LORA.defaults, "use_bdlora.nblocks": 1},
                ignored=(*PEFT_LORA.ignored, "use_bdlora.match_strict"),
                listed=f"use_bdlora.target_modules_bd_{side}",
                lists=_names,
                layers=("Linear",),
            ),
        ),
        trials={f"bdlora-{side}": Trial({"side": side.upper()})},
        stacks=True,
    )


VARIANTS = tuple(map(_variant, "ab"))

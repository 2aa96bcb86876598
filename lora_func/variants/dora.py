"""DoRA: a trained magnitude for each output, and LoRA for the direction.

    W' = diag(m / n) (W + s B A),   n_i = ‖(W + s B A)_i‖, held constant by the derivative

*Identity at the start because* B = 0 and m is computed as n is, so that m / n = 1 exactly.

Asks of W: ``dense`` at init; after that ``linear``, once for the activations and once on the r rows
of A for the norm, so that no matrix of the size of W is built:

    n² = ‖W_i‖² + 2 s ⟨(W Aᵀ)_i, B_i⟩ + s² B_i (A Aᵀ) B_iᵀ

References:
    https://arxiv.org/abs/2402.09353, eq. 5 and section 4.3. Code: NVlabs/DoRA, huggingface/peft
    ``tuners/lora/dora.py``.

Deviations: the paper's "column-wise" norm is over the rows of a torch weight. The bias is not
scaled, as in both codes. PEFT builds B A through an identity matrix and takes the norm of the sum
in the weight's dtype, which in bfloat16 is off by up to 0.4 %; this one adds in float32 and rounds
only W Aᵀ, so that it is the better the less a row has moved, and is held above √eps ‖W_i‖.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.linalg import vecdot

from lora_func.configs import LowRankConfig
from lora_func.numerics import (
    DROPOUT,
    along_rows,
    at_least_float32,
    dropout,
    dropout_leaf,
    kaiming_uniform,
    scale_output,
    scaled,
    without_autocast,
)
from lora_func.variant import PeftFormat, PeftLeaf, Trial, Variant
from lora_func.variants._low_rank import LOW_RANK, PEFT_CONVOLUTION, PEFT_EMBEDDING, PEFT_LORA
from lora_func.variants._low_rank import apply as low_rank
from lora_func.weights import Affine, Weight, bias_of, dense, linear, matmul_weight


@dataclass(frozen=True, kw_only=True)
class DoRA(LowRankConfig):
    """Weight-decomposed low-rank adaptation.

    Example:
        >>> import torch, lora_func as lf
        >>> params = lf.init(torch.nn.Sequential(torch.nn.Linear(4, 3)), lf.DoRA(r=2))
        >>> {key: tuple(leaf.shape) for key, leaf in params.items() if leaf.requires_grad}
        {'0.dora.A': (2, 4), '0.dora.B': (3, 2), '0.dora.m': (3,)}
    """


def init(W: Weight, cfg: DoRA, generator: Generator, stats: None = None) -> dict[str, Tensor]:
    """Draw A, leave B at zero, and measure the rows of W.

    Returns:
        A (r, d_in), B (d_out, r), m and _w_sqnorm (d_out,), _scale (); _dropout () if there is any.
    """
    d_out, d_in = W.shape
    squares = squared_norms(W)
    return {
        "A": kaiming_uniform(cfg.r, d_in, generator),
        "B": torch.zeros(d_out, cfg.r),
        "m": squares.sqrt(),
        "_w_sqnorm": squares,
        "_scale": torch.tensor(cfg.scale, dtype=torch.float64),
        **dropout_leaf(cfg.dropout),
    }


def squared_norms(W: Weight) -> Tensor:
    """Measure the rows of W.

    Returns:
        Shape (d_out,), float32 or better.
    """
    return at_least_float32(dense(W)).square().sum(-1)


def _gain(W: Weight, params: Mapping[str, Tensor]) -> Tensor:
    """M / n; m for a row of zeros, where it does not matter."""
    m, squares, A = params["m"], params["_w_sqnorm"], at_least_float32(params["A"].detach())
    B = scaled(at_least_float32(params["B"].detach()), params["_scale"])
    with without_autocast(A):
        WA = matmul_weight(A, W).mT.to(A.dtype)
        added = vecdot(B @ (A @ A.mT) + 2 * WA, B)
    # what the sum of squares is precise to, where a row has all but vanished
    least = squares * torch.finfo(W.dtype).eps
    n = torch.maximum(squares + added.to(squares.dtype), least).sqrt().to(m.dtype)
    return m / torch.where(n > 0, n, 1)


def apply(W: Weight, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Compute ``g (y - b) + b`` with ``y`` as LoRA's and ``g = m / n``.

    With dropout, ``x`` is whole in ``linear(x, W)`` alone: the change ``g y - linear(x, W)`` is
    computed from the dropped x, as in both codes, with one more product with W.

    Returns:
        Shape (..., d_out).
    """
    rate, b = params.get(DROPOUT), bias_of(W)
    if rate is not None:
        frozen, kept = Affine(W.weight if isinstance(W, Affine) else W), dropout(x, rate)
        whole = {leaf: tensor for leaf, tensor in params.items() if leaf != DROPOUT}
        return linear(x, W) + apply(frozen, whole, kept) - linear(kept, frozen)
    y = low_rank(W, params, x)
    g = along_rows(_gain(W, params))
    y = scale_output(y, g)
    return y if b is None else y - (g - 1).to(y.dtype) * b.to(y.dtype)


def weight(W: Weight, params: Mapping[str, Tensor]) -> Tensor:
    """Compute ``diag(m / n) (W + s B A)``.

    Returns:
        Shape (d_out, d_in).
    """
    W = dense(W)
    g = _gain(W, params)[:, None]
    up = g * scaled(params["B"], params["_scale"])
    added = up @ params["A"].to(up.dtype)
    return W + (g - 1).to(W.dtype) * W + added.to(W.dtype)


def _peft(of_lora: PeftFormat, m: PeftLeaf) -> PeftFormat:
    return of_lora._replace(
        leaves={**of_lora.leaves, "m": m},
        settings=lambda leaves, shape: of_lora.settings(leaves, shape) | {"use_dora": True},
        constants=lambda config, leaves, W: {
            "_w_sqnorm": squared_norms(W),
            **of_lora.constants(config, leaves, W),
        },
        means=lambda config, path: (
            bool(config.get("use_dora")) and config.get("init_lora_weights") != "pissa"
        ),
    )


_M = PeftLeaf("lora_magnitude_vector")
_PEFT = (
    _peft(PEFT_LORA, _M),
    _peft(PEFT_EMBEDDING, _M),
    _peft(
        PEFT_CONVOLUTION,
        _M._replace(write=lambda m: m[None], read=lambda m, _: m.flatten(), layout="ones"),
    ),
)

VARIANT = Variant(
    name="dora",
    config=DoRA,
    init=init,
    apply=apply,
    weight=weight,
    leaves={**LOW_RANK, "m": "d_out", "_w_sqnorm": "d_out"},
    peft=_PEFT,
    trials={"dora": Trial(peft=("LoraConfig", {"r": 8, "use_dora": True}))},
    pads=True,
    stacks=True,
    products_only=True,
)

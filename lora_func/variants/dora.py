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
    add_scaled,
    along_rows,
    at_least_float32,
    dropout,
    dropout_leaf,
    kaiming_uniform,
    scaled,
    without_autocast,
)
from lora_func.variant import PeftFormat, PeftLeaf, Trial, Variant, prepared
from lora_func.variants import _low_rank as low_rank
from lora_func.variants._low_rank import LOW_RANK, PEFT_CONVOLUTION, PEFT_EMBEDDING, PEFT_LORA
from lora_func.weights import Affine, Weight, bias_of, dense, linear, matmul_weight


@dataclass(frozen=True, kw_only=True)
class DoRA(LowRankConfig):
    """Weight-decomposed low-rank adaptation.

    Examples:
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


def prepare(
    params: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Do what LoRA's ``prepare`` does, and compute all of n² that does not need W.

    Returns:
        A in the dtype of the activations, and up; for the norm doubled ``2 s B``, squares
        ``‖W_i‖² + s² B_i (A Aᵀ) B_iᵀ`` in the first of r columns, and least, a positive lower
        bound of n².
    """
    A, of_W = at_least_float32(params["A"].detach()), params["_w_sqnorm"]
    B = scaled(at_least_float32(params["B"].detach()), params["_scale"])
    with without_autocast(A):
        squares = of_W + vecdot(B @ (A @ A.mT), B).to(of_W.dtype)
    # what the sum of squares is precise to, where a row has all but vanished
    least = torch.where(squares > 0, of_W * torch.finfo(dtype).eps, 1)
    # with zeros beside it, one sum over the columns adds all terms of n²
    squares = torch.nn.functional.pad(squares[..., None], (0, B.shape[-1] - 1))
    norm = {"doubled": (2 * B).to(squares.dtype), "squares": squares, "least": least}
    return {"A": params["A"].to(dtype), **low_rank.prepare(params, shape, dtype), **norm}


def _more(W: Weight, ready: Mapping[str, Tensor]) -> Tensor:
    """``m / n - 1``; ``m - 1`` for a row of zeros, where it does not matter."""
    with without_autocast(ready["doubled"]):
        WA = matmul_weight(ready["A"].detach(), W).mT
    squares = torch.addcmul(ready["squares"], WA, ready["doubled"]).sum(-1)
    n = torch.maximum(squares, ready["least"]).sqrt()
    return ready["m"] / n.to(ready["m"].dtype) - 1


def apply(W: Weight, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Compute ``g (y - b) + b`` with ``y`` as LoRA's and ``g = m / n``.

    With dropout, ``x`` is whole in ``linear(x, W)`` alone: the change ``g y - linear(x, W)`` is
    computed from the dropped x, as in both codes, with one more product with W.

    Returns:
        Shape (..., d_out).
    """
    if "up" not in params:
        params = prepared(prepare, params, W, x.dtype)
    rate, b = params.get(DROPOUT), bias_of(W)
    if rate is not None:
        frozen, kept = Affine(W.weight if isinstance(W, Affine) else W), dropout(x, rate)
        whole = {leaf: tensor for leaf, tensor in params.items() if leaf != DROPOUT}
        return linear(x, W) + apply(frozen, whole, kept) - linear(kept, frozen)
    more = _more(W, params)
    y = add_scaled(low_rank.apply(W, params, x), more)
    return y if b is None else y - along_rows(more).to(y.dtype) * b.to(y.dtype)


def weight(W: Weight, params: Mapping[str, Tensor]) -> Tensor:
    """Compute ``diag(m / n) (W + s B A)``.

    Returns:
        Shape (d_out, d_in).
    """
    W = dense(W)
    more = _more(W, prepared(prepare, params, W, W.dtype))[:, None]
    up = (1 + more) * scaled(params["B"], params["_scale"])
    added = up @ params["A"].to(up.dtype)
    return W + more.to(W.dtype) * W + added.to(W.dtype)


def _peft(of_lora: PeftFormat, m: PeftLeaf) -> PeftFormat:
    return of_lora._replace(
        leaves={**of_lora.leaves, "m": m},
        settings=lambda leaves, shape: of_lora.settings(leaves, shape) | {"use_dora": True},
        constants=lambda config, leaves, W: {
            "_w_sqnorm": squared_norms(W),
            **of_lora.constants(config, leaves, W),
        },
        means=lambda config, path: bool(config.get("use_dora")),
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
    family="low-rank",
    init=init,
    apply=apply,
    prepare=prepare,
    weight=weight,
    leaves={**LOW_RANK, "m": "d_out", "_w_sqnorm": "d_out"},
    peft=_PEFT,
    trials={"dora": Trial(peft=("LoraConfig", {"r": 8, "use_dora": True}))},
    pads=True,
    stacks=True,
    products_only=True,
)

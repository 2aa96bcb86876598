"""HRA: a chain of trained Householder reflections on the input.

    W' = W H_1 ... H_r,   H_i = I - 2 u_i u_iᵀ / ‖u_i‖²

*Identity at the start, to rounding, because* the reflections start in equal pairs, and two equal
ones cancel: in exact arithmetic; in floating point to 8 eps of the input.

Asks of W: ``linear`` only.

The chain is applied in its compact WY form, ``H_1 ... H_r = I - Uᵀ M⁻¹ U`` with M the strict upper
triangle of ``U Uᵀ`` plus half its diagonal: one triangular solve with r x r, and no d_in x d_in.

References:
    https://arxiv.org/abs/2405.17484, eq. 1. Code: DaShenZi721/HRA, huggingface/peft
    ``tuners/hra/layer.py``.

Deviations: the authors' code for Llama reflects the output; we follow the paper, their code for
diffusion and PEFT, which reflect the input. PEFT draws an odd number of reflections without pairs,
and its Gram-Schmidt option breaks the pairs; neither starts as the base, and we offer neither.
A checkpoint with that option is read as the orthonormal vectors that act.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from lora_func.configs import RankConfig
from lora_func.numerics import at_least_float32, without_autocast
from lora_func.variant import PeftFormat, PeftLeaf, Trial, Variant, differs_on_convolution, prepared
from lora_func.weights import Weight, dense, linear


@dataclass(frozen=True, kw_only=True)
class HRA(RankConfig):
    """Householder reflection adaptation; r counts reflections and is even.

    Examples:
        >>> import torch, lora_func as lf
        >>> params = lf.init(torch.nn.Sequential(torch.nn.Linear(4, 3)), lf.HRA(r=2))
        >>> params["0.hra.U"].shape
        torch.Size([2, 4])
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        for r in self.ranks:
            if r % 2:
                raise ValueError(f"r: got {r}, expected an even number; reflections come in pairs")


def init(W: Weight, cfg: HRA, generator: Generator, stats: None = None) -> dict[str, Tensor]:
    """Draw r / 2 vectors from U(-√(2/r), √(2/r)), the references' distribution, each twice.

    Returns:
        U (r, d_in), the reflections in the order of the product.
    """
    _, d_in = W.shape
    bound = (2 / cfg.r) ** 0.5
    pairs = torch.empty(cfg.r // 2, d_in, dtype=torch.float32)
    return {"U": pairs.uniform_(-bound, bound, generator=generator).repeat_interleave(2, 0)}


def _factors(params: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """U and P = M⁻ᵀ U, with ``H_1 ... H_r = I - Pᵀ U``."""
    U = at_least_float32(params["U"])
    U = U.to(torch.promote_types(U.dtype, dtype))
    with without_autocast(U):
        gram = U @ U.mT
        half = gram.diagonal(dim1=-2, dim2=-1).clamp_min(torch.finfo(U.dtype).eps ** 2) / 2
        M = gram.triu(1) + torch.diag_embed(half)
        P = torch.linalg.solve_triangular(M.mT, U, upper=False)
    return U.to(dtype), P.to(dtype)


def prepare(
    params: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Solve for the factors of the chain.

    Returns:
        vectors U and P, with ``H_1 ... H_r = I - Pᵀ U``.
    """
    U, P = _factors(params, dtype)
    return {"vectors": U, "P": P}


def apply(W: Weight, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Reflect the input, the last reflection first.

    Returns:
        Shape (..., d_out).
    """
    if "P" not in params:
        params = prepared(prepare, params, W, x.dtype)
    U, P = params["vectors"].to(x.dtype), params["P"].to(x.dtype)
    return linear(x - (x @ U.mT) @ P, W)


def weight(W: Weight, params: Mapping[str, Tensor]) -> Tensor:
    """Compute ``W H_1 ... H_r``.

    Returns:
        Shape (d_out, d_in).
    """
    W = dense(W)
    U, P = _factors(params, W.dtype)
    return W - (W @ P.mT) @ U


def _peft_reflections(u: Tensor, config: Mapping[str, Any]) -> Tensor:
    """PEFT's vectors as they act: made orthonormal, one after another, with ``apply_GS``."""
    if not config["apply_GS"]:
        return u.t()
    Q, R = torch.linalg.qr(u.double())
    orthonormal: Tensor = (Q * R.diagonal().sign()).t().to(u.dtype)
    return orthonormal


def _differs_in_peft(module: Any) -> str | None:
    if not isinstance(module, nn.Conv2d):
        return None
    found: list[tuple[Any, ...]] = [module.kernel_size, module.stride, tuple(module.padding)]
    if module.dilation != (1, 1) or any(len({*sizes}) > 1 for sizes in found):
        return "PEFT reads one size for both axes, and no dilation"
    return differs_on_convolution(module)


VARIANT = Variant(
    name="hra",
    config=HRA,
    family="orthogonal",
    init=init,
    apply=apply,
    prepare=prepare,
    weight=weight,
    leaves={"U": "r d_in"},
    peft=(
        PeftFormat(
            "HRA",
            leaves={"U": PeftLeaf("hra_u", torch.t, _peft_reflections)},
            settings=lambda leaves, shape: {"r": leaves["U"].shape[-2]},
            defaults={"r": 8, "apply_GS": False},
            layers=("Linear", "Conv2d"),
            refuses=_differs_in_peft,
        ),
    ),
    trials={"hra": Trial(lr=3e-3, start="close", peft=("HRAConfig", {"r": 8}))},
    pads=True,
    stacks=True,
)

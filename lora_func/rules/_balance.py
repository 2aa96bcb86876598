"""Balanced factors of the same product."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lora_func.adapter import as_trainable
from lora_func.rules._leaves import pairs_of
from lora_func.variant import Params

_RANK_TOLERANCE = 1e-12
"""A singular value below this part of the largest counts as zero; in float32 its own rounding."""


def balance(params: Mapping[str, Tensor], *, aligned: bool = True) -> Params:
    """Give A and B the same Gram matrix, ``Bᵀ B = A Aᵀ``; the product ``B A`` stays.

    A and B are replaced by ``√Σ Vᵀ`` and ``U √Σ`` of the singular values of ``B A``. A pair whose
    product has a lower rank than its factors is left as it is: at a start with B = 0 both factors
    would be zero, and stay so.

    References:
        BaLoRA, https://arxiv.org/abs/2605.31484. The aligned form is the authors' best variant.

    Args:
        params: An adapter, or a stack; it does not change.
        aligned: Whether the balanced factors are turned to be the nearest ones to A and B, so that
            the moments of an optimizer still fit them.

    Returns:
        The adapter with balanced factors; the other leaves are the same tensors.

    Raises:
        ValueError: If no site has factors.

    Examples:
        >>> import torch, lora_func as lf
        >>> from lora_func import rules
        >>> params = lf.init(torch.nn.Linear(4, 3), lf.OLoRA(r=2))
        >>> balanced = rules.balance(params)
        >>> A, B = balanced[".olora.A"], balanced[".olora.B"]
        >>> torch.testing.assert_close(A @ A.mT, B.mT @ B)
    """
    made: Params = {}
    with torch.no_grad():
        for pair in pairs_of(params):
            A, B, _ = pair.factors(params)
            for key, factor in zip(pair[:2], _balanced(A, B, aligned), strict=True):
                made[key] = factor.to(params[key].dtype)
    return {**params, **as_trainable(made)}


def _balanced(A: Tensor, B: Tensor, aligned: bool) -> tuple[Tensor, Tensor]:
    if A.shape[-2] > min(A.shape[-1], B.shape[-2]):
        return A, B
    (Q_A, R_A), (Q_B, R_B) = torch.linalg.qr(A.mT), torch.linalg.qr(B)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT)
    root = S.sqrt()
    new_A, new_B = root[..., :, None] * Vh @ Q_A.mT, Q_B @ U * root[..., None, :]
    used = A.any(-1) | B.any(-2)  # padded ranks are zero in both
    if aligned:
        of_both = torch.linalg.svd(new_B.mT @ B + new_A @ A.mT)
        turn = of_both[0] @ of_both[2]
        new_A, new_B = turn.mT @ new_A, new_B @ turn
        new_A, new_B = new_A * used[..., :, None], new_B * used[..., None, :]
    tolerance = max(_RANK_TOLERANCE, 10 * torch.finfo(S.dtype).eps)
    rank = (tolerance * S[..., :1] < S).sum(-1)
    keeps = (rank == used.sum(-1))[..., None, None]
    return torch.where(keeps, new_A, A), torch.where(keeps, new_B, B)

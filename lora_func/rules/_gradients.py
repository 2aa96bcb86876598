"""Rules that change the gradients of the factors, without a state."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lora_func.checks import check_number
from lora_func.rules._leaves import Pair, pairs_of, wide
from lora_func.variant import Params


def _on_pairs(
    params: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    change: Callable[[Pair, Tensor | None, Tensor | None], Mapping[str, Tensor]],
) -> Params:
    """Replace the gradients of each pair by what a function makes of them."""
    found = dict(grads)
    with torch.no_grad():
        for pair in pairs_of(params):
            gA, gB = (None if key not in grads else wide(grads[key]) for key in pair[:2])
            made = change(pair, gA, gB)
            for key in pair[:2]:
                was = found.pop(key, None)
                if was is not None and key in made:
                    found[key] = made[key].to(was.dtype)
    return found


def _damped(gram: Tensor, damping: float | Tensor) -> Tensor:
    """Invert a Gram matrix (..., r, r) with damping on its diagonal."""
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    inverse: Tensor = torch.linalg.inv(gram + damping * eye)
    return inverse


def _inverse(gram: Tensor, delta: float, eps: float) -> Tensor:
    """Invert a Gram matrix with little damping; a direction that rounding alone spans counts as 0.

    A LoRA may have a rank above its widths, or dependent rows: the damping is then below what
    float32 resolves.

    Returns:
        Shape (..., r, r).
    """
    values, vectors = torch.linalg.eigh(gram)
    least = max((10 * eps) ** 2, 10 * gram.shape[-1] * torch.finfo(gram.dtype).eps)
    is_real = values > least * values[..., -1:].clamp_min(0)
    inverted = torch.where(is_real, 1 / (values.clamp_min(0) + delta), 0)
    inverse: Tensor = vectors * inverted[..., None, :] @ vectors.mT
    return inverse


def lora_fa(
    params: Mapping[str, Tensor], grads: Mapping[str, Tensor], *, delta: float = 1e-8
) -> Params:
    """LoRA-FA: A stays, and B's gradient is that of the closest change of the weight.

    ``g_B ← g_B (A Aᵀ + δ I)⁻¹ / s²``, A without a gradient.

    References:
        https://arxiv.org/abs/2308.03303. Code: huggingface/peft ``optimizers/lorafa.py``, which
        multiplies in bfloat16 where it can; here it is float32 or better.

    Args:
        params: An adapter, or a stack.
        grads: Its gradients.
        delta: The damping.

    Returns:
        The gradients, without those of A.

    Raises:
        ValueError: If no site has factors, or delta is not positive.
    """
    check_number("delta", delta, above=0)

    def change(pair: Pair, gA: Tensor | None, gB: Tensor | None) -> dict[str, Tensor]:
        if gB is None:
            return {}
        (A, _, s), eps = pair.factors(params), torch.finfo(gB.dtype).eps
        A = A.double()
        return {pair.B: gB.double() @ _inverse(A @ A.mT, delta, eps) / s**2}

    return _on_pairs(params, grads, change)


def riemannian(
    params: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    *,
    rho: float = 1e-2,
    relative: bool = False,
) -> Params:
    """Riemannian preconditioning: each factor's gradient is scaled by the other factor.

    ``g_A ← (Bᵀ B + ρ I)⁻¹ g_A``, ``g_B ← g_B (A Aᵀ + ρ I)⁻¹``, both with the factors before the
    step. With ρ = 0 a step would not depend on how the product is split into factors; right after
    the start ``Bᵀ B`` is far below PEFT's ρ = 0.01, so that this holds only later.

    References:
        https://arxiv.org/abs/2402.02347, eq. 3. Code: huggingface/peft
        ``optimizers/riemannian.py``. The authors' AdamW scales B's gradient with A after its step;
        paper and PEFT take A before it, as here.

    Args:
        params: An adapter, or a stack.
        grads: Its gradients.
        rho: The damping.
        relative: Whether rho is a part of the mean of the diagonal of ``A Aᵀ``, and of ``Bᵀ B``;
            1e-6 then is a good choice.

    Returns:
        The gradients.

    Raises:
        ValueError: If no site has factors, or rho is not positive.
    """
    check_number("rho", rho, above=0)

    def inverse(gram: Tensor) -> Tensor:
        diagonal = gram.diagonal(dim1=-2, dim2=-1)  # zero at padded ranks
        size = (diagonal.sum(-1) / diagonal.count_nonzero(-1).clamp_min(1))[..., None, None]
        tiny = torch.finfo(gram.dtype).tiny ** 0.5
        return _damped(gram, (rho * size).clamp_min(tiny) if relative else rho)

    def change(pair: Pair, gA: Tensor | None, gB: Tensor | None) -> dict[str, Tensor]:
        A, B, _ = pair.factors(params)
        made = {} if gA is None else {pair.A: inverse(B.mT @ B) @ gA}
        return made if gB is None else {**made, pair.B: gB @ inverse(A @ A.mT)}

    return _on_pairs(params, grads, change)


def lora_pro(
    params: Mapping[str, Tensor], grads: Mapping[str, Tensor], *, delta: float = 1e-8
) -> Params:
    """LoRA-Pro: gradients whose change of the weight is the closest to the full gradient.

    To first order the weight then changes by ``P_B G + (I - P_B) G P_A``, with the projections on
    the columns of B and the rows of A. This is the rule for gradients; any optimizer may follow.
    The authors run Adam on the change of the weight, with the memory of full fine-tuning.

    References:
        https://arxiv.org/abs/2407.18242, theorem 2.1 and 2.2. Code: mrflogs/LoRA-Pro.

    Args:
        params: An adapter, or a stack.
        grads: Its gradients; a pair changes if both are there.
        delta: The damping of the inverses.

    Returns:
        The gradients.

    Raises:
        ValueError: If no site has factors, or delta is not positive.
    """
    check_number("delta", delta, above=0)

    def change(pair: Pair, gA: Tensor | None, gB: Tensor | None) -> dict[str, Tensor]:
        if gA is None or gB is None:
            return {k: g for k, g in ((pair.A, gA), (pair.B, gB)) if g is not None}
        eps = torch.finfo(gB.dtype).eps
        A, B, s, gA, gB = (t.double() for t in (*pair.factors(params), gA, gB))
        of_A, of_B = A @ A.mT, B.mT @ B
        inverse_A, inverse_B = (_inverse(gram, delta, eps) for gram in (of_A, of_B))
        plain_A = inverse_B @ gA / s**2
        plain_B = (gB - B @ (inverse_B @ (B.mT @ gB))) @ inverse_A / s**2
        X = _sylvester(of_B, of_A, -plain_A @ A.mT, delta)
        return {pair.A: plain_A + X @ A, pair.B: plain_B - B @ X}

    return _on_pairs(params, grads, change)


def _sylvester(left: Tensor, right: Tensor, C: Tensor, delta: float) -> Tensor:
    """Solve ``left X + X right = C`` for positive semidefinite matrices, with damping."""
    (a, U), (b, V) = torch.linalg.eigh(left), torch.linalg.eigh(right)
    sums = a.clamp_min(0)[..., :, None] + b.clamp_min(0)[..., None, :] + delta
    X: Tensor = U @ ((U.mT @ C @ V) / sums) @ V.mT
    return X

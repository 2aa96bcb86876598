"""LoftQ: a quantised base and a LoRA that makes up for what quantisation takes away.

    W ≈ Q + s B A,   in turns: Q = quantise(W - s B A),   s B A = the r largest components of W - Q

References:
    https://arxiv.org/abs/2310.08659, alg. 1. Code: yxli2123/LoftQ, huggingface/peft
    ``utils/loftq_utils.py``.

Deviations: PEFT takes A and B from W - Q and multiplies them by s afterwards, so that its error is
smaller for s = 1 alone; here s is divided out.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lora_func.adapter import Key
from lora_func.checks import check_count
from lora_func.initialization._init import init
from lora_func.initialization._weights import frozen_weight
from lora_func.modules import find_site
from lora_func.numerics import at_least_float32, svd
from lora_func.targeting import find_targets
from lora_func.variant import Params
from lora_func.variants import LoRA
from lora_func.weights import dense, is_conv1d, is_linear, is_quantised

_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_BLOCK = 64


def nf4(W: Tensor) -> Tensor:
    """Round a weight to 4-bit normal floats and back, as bitsandbytes does.

    Blocks of 64 entries, row after row, are divided by their largest magnitude and rounded to the
    nearest of 16 values (QLoRA, https://arxiv.org/abs/2305.14314, appendix E). What is rounded once
    stays the same when it is rounded again. The magnitudes themselves are not quantised
    (``bnb_4bit_use_double_quant=False``).

    Args:
        W: Any shape, floating-point.

    Returns:
        The rounded weight, with the same shape and dtype.

    Raises:
        ValueError: If W is not floating-point, or not finite.
    """
    if not W.is_floating_point() or not W.isfinite().all():
        raise ValueError(f"W: got {W.dtype} or NaN or infinity, expected finite floats")
    flat = at_least_float32(W).flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % _BLOCK)).view(-1, _BLOCK)
    largest = blocks.abs().amax(1, keepdim=True)
    values = torch.tensor(_NF4, dtype=blocks.dtype, device=blocks.device)
    between = (values[1:] + values[:-1]) / 2
    found = torch.bucketize(blocks / largest.clamp_min(torch.finfo(blocks.dtype).tiny), between)
    return (values[found] * largest).flatten()[: len(flat)].view_as(W).to(W.dtype)


def loftq(
    model: nn.Module,
    cfg: LoRA,
    *,
    iters: int = 1,
    quantise: Callable[[Tensor], Tensor] = nf4,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[dict[str, Tensor], Params]:
    """Make a LoRA for a base that will be quantised, from the base before that.

    With ``iters=1`` the weights are those of the plain quantised model, and the adapter belongs to
    the model that bitsandbytes loads in 4 bits. With more the base changes too: load the weights
    into the model, then quantise it, which finds the same values again.

    Args:
        model: The model before quantisation; only read.
        cfg: A LoRA on linear layers.
        iters: How often base and adapter are found in turn; the paper takes 1 to 5.
        quantise: Rounds a weight (d_out, d_in), float32 or wider, and gives it back in its dtype.
        seed: As for ``init``.
        dtype: As for ``init``.

    Returns:
        (weights, params): the rounded weights, by the name of their parameter, and the adapter. At
        its start the model with these weights comes closer to the model before quantisation.

    Raises:
        TypeError: If cfg is no LoRA, or a site no linear layer with a weight that is not quantised.
        ValueError: If iters is below 1, or r exceeds a width.

    Examples:
        >>> import torch, lora_func as lf
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(64, 8)), torch.randn(4, 64)
        >>> weights, params = lf.loftq(model, lf.LoRA(r=4), iters=5)
        >>> y = model(x)
        >>> _ = model.load_state_dict(weights, strict=False)
        >>> bool((lf.fcall(model, params, x) - y).norm() < (model(x) - y).norm())
        True
    """
    if not isinstance(cfg, LoRA):
        raise TypeError(f"cfg: got {type(cfg).__name__}, expected a LoRA")
    check_count("iters", iters)
    params = init(model, cfg, seed=seed, dtype=dtype)
    weights: dict[str, Tensor] = {}
    for target in tqdm(find_targets(model, cfg).sites, "loftq", unit="site", disable=None):
        module, parameter = find_site(model, target.site)
        if parameter is not None or not is_linear(module) or is_quantised(module):
            raise TypeError(
                f"{target.site}: is a {type(module).__name__}; LoftQ takes linear layers before "
                "they are quantised; leave it out"
            )
        found = frozen_weight(model, target)
        W = at_least_float32(dense(found).detach())
        Q, A, B = _in_turns(W, cfg.at(target.site), iters, quantise)
        stored = Q.mT if is_conv1d(module) else Q
        name = f"{target.site}.weight" if target.site else "weight"
        weights[name] = stored.contiguous().to(dense(found).dtype)
        for leaf, factor in (("A", A), ("B", B)):
            key = str(Key(target.site, str(cfg.variant), leaf))
            params[key] = factor.contiguous().to(params[key]).requires_grad_()
    return weights, params


def _in_turns(
    W: Tensor, cfg: LoRA, iters: int, quantise: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Q, A and B of one weight."""
    change = torch.zeros_like(W)
    for _ in range(iters):
        Q = quantise(W - change)
        U, S, Vh = svd(W - Q, cfg.r)
        change = (U * S) @ Vh
    root = (S / cfg.scale).sqrt()
    return Q, root[:, None] * Vh, U * root

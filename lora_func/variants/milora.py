"""MiLoRA: LoRA that starts from the minor singular directions of the weight.

    W' = W + s (B A - B0 A0),   s B0 A0 = the r smallest singular components of W

*Identity at the start because* the difference is exactly zero at A0, B0 in every dtype.

Asks of W: ``dense`` at init, ``linear`` after that.

References:
    https://arxiv.org/abs/2406.09044, eq. 4-5. PEFT has no start of this name.

Deviations: the paper writes W - s B0 A0 into the base weight, which is then off by rounding; A0 and
B0 are constants here, and the base stays. S is divided by s before the factors are made, as for
PiSSA, so that the start does not depend on alpha. Components whose singular value is zero start at
zero, and stay there. The usual rank is 32, s = 2, the learning rate that of LoRA.
"""

from dataclasses import dataclass

from torch import Generator, Tensor

from lora_func.configs import LowRankConfig
from lora_func.numerics import check_rank, svd
from lora_func.variant import Trial
from lora_func.variants._difference import difference, leaves_at
from lora_func.weights import Weight, dense


@dataclass(frozen=True, kw_only=True)
class MiLoRA(LowRankConfig):
    """Minor singular component adaptation.

    Examples:
        >>> import torch, lora_func as lf
        >>> params = lf.init(torch.nn.Sequential(torch.nn.Linear(4, 3)), lf.MiLoRA(r=2))
        >>> [key for key, leaf in params.items() if leaf.requires_grad]
        ['0.milora.A', '0.milora.B']
    """


def init(W: Weight, cfg: MiLoRA, generator: Generator, stats: None = None) -> dict[str, Tensor]:
    """Split the minor part of W evenly between the factors.

    Returns:
        A and _A0 (r, d_in), B and _B0 (d_out, r), _scale (); _dropout () if there is any.
    """
    check_rank(cfg.r, W.shape)
    U, S, Vh = svd(dense(W), min(W.shape))
    root = (S[-cfg.r :] / cfg.scale).sqrt()
    return leaves_at(root[:, None] * Vh[-cfg.r :], U[:, -cfg.r :] * root, cfg)


VARIANT = difference(
    name="milora",
    config=MiLoRA,
    family="SVD",
    init=init,
    trials={"milora": Trial(lr=1e-3)},
)

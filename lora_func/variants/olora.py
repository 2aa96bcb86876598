"""OLoRA: LoRA that starts from the QR decomposition of the weight.

    W' = W + s (B A - B0 A0),   W = Q R,   B0 = the first r columns of Q, A0 = the first r rows of R

*Identity at the start because* the difference is exactly zero at A0, B0 in every dtype.

Asks of W: ``dense`` at init, ``linear`` after that.

References:
    https://arxiv.org/abs/2406.01775, alg. 1. Code: huggingface/peft ``tuners/lora/layer.py``
    (``olora_init``), by the author.

Deviations: paper and code write W - s B0 A0 into the base weight, which is then off by rounding;
A0 and B0 are constants here, and the base stays. As in the code, s is not divided out of the
factors, so that ``s B0 A0`` grows with alpha. PEFT takes fewer rows than r where W has fewer; that
is refused. The usual rank is 32 and s = 1 / 2; the learning rate is that of LoRA or lower.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lora_func.configs import LowRankConfig
from lora_func.numerics import at_least_float32, check_rank
from lora_func.variant import Trial
from lora_func.variants._difference import difference, leaves_at, peft_start
from lora_func.weights import Weight, dense


@dataclass(frozen=True, kw_only=True)
class OLoRA(LowRankConfig):
    """Orthonormal low-rank adaptation.

    Examples:
        >>> import torch, lora_func as lf
        >>> params = lf.init(torch.nn.Sequential(torch.nn.Linear(4, 3)), lf.OLoRA(r=2))
        >>> [key for key, leaf in params.items() if leaf.requires_grad]
        ['0.olora.A', '0.olora.B']
    """


def init(W: Weight, cfg: OLoRA, generator: Generator, stats: None = None) -> dict[str, Tensor]:
    """Take r columns of Q and r rows of R.

    Returns:
        A and _A0 (r, d_in), B and _B0 (d_out, r), _scale (); _dropout () if there is any.
    """
    return leaves_at(*_start(dense(W), cfg.r), cfg)


def _start(W: Tensor, r: int, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    check_rank(r, W.shape)
    Q, R = torch.linalg.qr(at_least_float32(W.detach()))
    return R[:r], Q[:, :r]


VARIANT = difference(
    peft_start("olora", _start),
    name="olora",
    config=OLoRA,
    family="low-rank",
    init=init,
    trials={"olora": Trial(lr=3e-4, peft=("LoraConfig", {"r": 8, "init_lora_weights": "olora"}))},
)

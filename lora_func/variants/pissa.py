"""PiSSA: LoRA that starts from the principal singular directions of the weight.

    W' = W + s (B A - B0 A0),   s B0 A0 = the r largest singular components of W

*Identity at the start because* the difference is taken as (B - B0) A + B0 (A - A0), both terms of
which are exactly zero at A0, B0 in every dtype.

Asks of W: ``dense`` at init, ``linear`` after that.

References:
    https://arxiv.org/abs/2404.02948, eq. 2-5. Code: MuLabPKU/PiSSA, huggingface/peft
    ``tuners/lora/layer.py`` (``pissa_init``).

Deviations: paper and codes write the residual W - s B0 A0 into the base weight, which is then off
by rounding; we keep A0 and B0 as constants and the base as it is. S is divided by s before the
factors are made, as in PEFT, so that the start does not depend on alpha. On a quantised base the
residual is not quantised again (no QPiSSA). Weight decay pulls W' towards W without its principal
part, as in PEFT. Dropout takes from the trained product alone, as in PEFT: in training mode the
start is then the base on average.
"""

from dataclasses import dataclass

from torch import Generator, Tensor

from lora_func.checks import check_count
from lora_func.configs import LowRankConfig
from lora_func.numerics import svd
from lora_func.variant import Trial
from lora_func.variants._difference import difference, leaves_at, peft_start
from lora_func.weights import Weight, dense


@dataclass(frozen=True, kw_only=True)
class PiSSA(LowRankConfig):
    """Principal singular values and vectors adaptation. The authors train with ``alpha = r``.

    Attributes:
        niter: None for the exact singular value decomposition; an integer for the randomised one
            with that many power iterations, much faster on wide layers.

    Examples:
        >>> import torch, lora_func as lf
        >>> params = lf.init(torch.nn.Sequential(torch.nn.Linear(4, 3)), lf.PiSSA(r=2))
        >>> [key for key, leaf in params.items() if leaf.requires_grad]
        ['0.pissa.A', '0.pissa.B']
    """

    niter: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.niter is not None:
            check_count("niter", self.niter, least=0)


def init(W: Weight, cfg: PiSSA, generator: Generator, stats: None = None) -> dict[str, Tensor]:
    """Split the principal part of W evenly between the factors.

    Returns:
        A and _A0 (r, d_in), B and _B0 (d_out, r), _scale (); _dropout () if there is any.
    """
    return leaves_at(*_start(dense(W), cfg.r, cfg.scale, cfg.niter, generator), cfg)


def _start(
    W: Tensor,
    r: int,
    scale: Tensor | float,
    niter: int | None = None,
    generator: Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """A and B of the r largest singular components of W / s."""
    U, S, Vh = svd(W, r, niter, generator)
    root = (S / scale).sqrt()
    return root[:, None] * Vh, U * root


VARIANT = difference(
    peft_start("pissa", _start),
    name="pissa",
    config=PiSSA,
    family="SVD",
    init=init,
    trials={
        "pissa": Trial(lr=3e-4, peft=("LoraConfig", {"r": 8, "init_lora_weights": "pissa"})),
        "pissa-fast": Trial(
            {"niter": 4},
            lr=3e-4,
            peft=("LoraConfig", {"r": 8, "init_lora_weights": "pissa_niter_4"}),
        ),
    },
)

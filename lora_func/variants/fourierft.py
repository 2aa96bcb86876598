"""FourierFT: a few trained frequencies of the change of the weight.

    W' = W + s Re(ifft2(S)),   S has n trained entries, the others are zero

*Identity at the start because* the trained entries are zero.

Asks of W: ``linear`` only. The change has full rank and is made as a matrix of the size of W.

References:
    https://arxiv.org/abs/2405.03003, eq. 2-4. Code: huggingface/peft ``tuners/fourierft/layer.py``.

Deviations: the paper and PEFT start from N(0, 1), which changes the outputs of a layer by about a
quarter; ``sigma=1`` gives that. The inverse transform is made from one half of the spectrum, which
is half the work. Two entries at (u, v) and (-u, -v) have the same effect, as in both. The places
are kept as a constant. The usual numbers are n = 1000 and s = 150 (300 on small models); the
learning rate is about 3e-3 to 5e-2, far above that of LoRA.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_func.numerics import at_least_float32, scaled
from lora_func.variant import PeftFormat, PeftLeaf, Trial, Variant
from lora_func.variants import _locations as located


@dataclass(frozen=True, kw_only=True)
class FourierFT(located.LocatedConfig):
    """Fourier transform fine-tuning.

    Examples:
        >>> import torch, lora_func as lf
        >>> cfg = lf.FourierFT(n_frequency=5)
        >>> params = lf.init(torch.nn.Sequential(torch.nn.Linear(4, 3)), cfg)
        >>> {key: tuple(leaf.shape) for key, leaf in lf.partition(params)[0].items()}
        {'0.fourierft.spectrum': (5,)}
    """

    scaling: float = 150.0


def _half(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], shape[1] // 2 + 1


def prepare(
    params: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Place half of each entry at its frequency, and half at the opposite one.

    The half spectrum of a real matrix keeps the columns up to d_in / 2; what falls outside of them
    is the conjugate of what falls inside.

    Returns:
        values and places in the half spectrum, shape (2 n,); the places are integers.
    """
    d_out, d_in = shape
    half = _half(shape)[1]
    row, column = params["_indices"].long().unbind(-2)
    row, column = torch.cat([row, -row % d_out], -1), torch.cat([column, -column % d_in], -1)
    kept = column < half
    c = scaled(at_least_float32(params["spectrum"]).unsqueeze(-1), params["_scale"] / 2)
    return {
        "values": c.squeeze(-1).repeat(*[1] * (c.ndim - 2), 2) * kept,
        "places": (row * half + column) * kept,
    }


def _change(params: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    d_out, d_in = shape
    spectrum = located.scattered(params["values"], params["places"], _half(shape))
    change: Tensor = torch.fft.irfft2(spectrum, s=(d_out, d_in))
    return change


VARIANT = Variant(
    name="fourierft",
    config=FourierFT,
    init=located.init,
    leaves=located.LOCATED,
    peft=(
        PeftFormat(
            "FOURIERFT",
            leaves={"spectrum": PeftLeaf("fourierft_spectrum")},
            settings=located.peft_settings,
            constants=located.peft_constants,
            patterns={"n_frequency": "n_frequency_pattern"},
            defaults={"n_frequency": 1000, "scaling": 150.0, "random_loc_seed": 777},
            ignored=("init_weights",),
            layers=("Linear", "Conv1D"),
        ),
    ),
    trials={
        "fourierft": Trial(
            {"n_frequency": 1000},
            lr=5e-2,
            peft=("FourierFTConfig", {"n_frequency": 1000, "init_weights": True}),
        )
    },
    **located.views_of(prepare, _change),
)

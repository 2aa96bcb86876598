"""WaveFT: a few trained wavelet coefficients of the change of the weight.

    W' = W + s L_out C L_inᵀ,   C has n trained entries; L are one level of wavelet synthesis

*Identity at the start because* the trained entries are zero.

Asks of W: ``linear`` only. The change has full rank and is made as a matrix of the size of W.

References:
    https://arxiv.org/abs/2505.12532, section 3. Code: huggingface/peft
    ``tuners/waveft/{layer,waverec2d}.py``.

Deviations: none in the numbers. PEFT gives its bands in another order than the usual reading: the
columns decide about the filter of the rows, and the reverse; so do we, since checkpoints need it.
Each coefficient reaches a patch of the filter's size, whose places are all that is calculated; PEFT
transforms the whole matrix. The filter is kept as a constant. The usual numbers are n = 2592,
s = 25 and "db1"; the learning rate is about 1e-3 to 2e-2.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from lora_func.numerics import at_least_float32, scaled
from lora_func.variant import PeftFormat, PeftLeaf, Trial, Variant
from lora_func.variants import _locations as located
from lora_func.weights import Affine, Weight

WAVELETS = (
    *(f"db{i}" for i in range(1, 11)),
    *(f"sym{i}" for i in range(2, 11)),
    *(f"coif{i}" for i in range(1, 6)),
)
PEFT_WAVELETS = tuple(name for name in WAVELETS if name not in ("coif4", "coif5"))
"""Those for which PEFT, to 0.21, has the filters; its "coif4" and "coif5" are no wavelets."""


@dataclass(frozen=True, kw_only=True)
class WaveFT(located.LocatedConfig):
    """Wavelet fine-tuning.

    Attributes:
        wavelet: "db1" (Haar); others up to "db10", "sym2" to "sym10" and "coif1" to "coif5" want
            the package PyWavelets at ``init``. None trains the entries of W themselves.

    Examples:
        >>> import torch, lora_func as lf
        >>> params = lf.init(torch.nn.Sequential(torch.nn.Linear(4, 3)), lf.WaveFT(n_frequency=5))
        >>> {key: tuple(leaf.shape) for key, leaf in lf.partition(params)[0].items()}
        {'0.waveft.spectrum': (5,)}
    """

    n_frequency: int = 2592
    scaling: float = 25.0
    wavelet: str | None = "db1"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.wavelet not in (None, *WAVELETS):
            raise ValueError(
                f"wavelet: got {self.wavelet!r}, expected None or one of {', '.join(WAVELETS)}"
            )


def init(W: Weight, cfg: WaveFT, generator: Generator, stats: None = None) -> dict[str, Tensor]:
    """Draw the places, and look up the filter.

    Returns:
        spectrum (n,), _indices (2, n), _seed (), _scale (); _filter (taps,) with a wavelet.

    Raises:
        ValueError: If there are more coefficients than entries of W.
        ImportError: If the wavelet wants PyWavelets, which is not installed.
    """
    return {**located.init(W, cfg, generator), **_filter_leaf(cfg.wavelet)}


def _filter_leaf(wavelet: str | None) -> dict[str, Tensor]:
    return {} if wavelet is None else {"_filter": _low_pass(wavelet)}


def _low_pass(wavelet: str) -> Tensor:
    """The low-pass filter of the synthesis, shape (taps,), float64."""
    if wavelet == "db1":
        return torch.full((2,), 0.5, dtype=torch.float64).sqrt()
    try:
        import pywt
    except ImportError as error:
        raise ImportError(
            f"wavelet={wavelet!r} needs PyWavelets: pip install 'lora_func[wavelets]'"
        ) from error
    return torch.tensor(pywt.Wavelet(wavelet).rec_lo, dtype=torch.float64)


def _axis(index: Tensor, high: Tensor, low_pass: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Where coefficients reach along one axis of the weight, and how strongly.

    Args:
        index: Of each coefficient, shape (..., n), among those of both bands.
        high: Whether each takes the high-pass filter.
        low_pass: Shape (..., taps).
        size: Of the axis.

    Returns:
        Places and strengths, shapes (..., n, taps); strength 0 at place 0 for outside.
    """
    taps = low_pass.shape[-1]
    signs = torch.tensor([(-1.0) ** i for i in range(taps)], device=low_pass.device)
    high_pass = low_pass.flip(-1) * signs.to(low_pass.dtype)
    strengths = torch.where(high[..., None], high_pass[..., None, :], low_pass[..., None, :])
    half = _padded(size, taps) // 2
    crop = (2 * taps - 3) // 2
    crop += (2 * (half - 1) + taps - 2 * crop - size) // 2
    place = 2 * (index % half)[..., None] + torch.arange(taps, device=index.device) - crop
    inside = (place >= 0) & (place < size)
    return place * inside, strengths * inside


def _padded(size: int, taps: int) -> int:
    """The number of coefficients along an axis: even, with a margin for the filter."""
    return (size + taps - 1) // 2 * 2


def _bands(indices: Tensor, shape: tuple[int, int], taps: int) -> tuple[Tensor, ...]:
    """Rows and columns among the coefficients, and whether each lies in the second band."""
    sizes = [_padded(size, taps) for size in shape]
    row, column = (
        index + (padded - size) // 2
        for index, padded, size in zip(indices.long().unbind(-2), sizes, shape, strict=True)
    )
    return row, column, row >= sizes[0] // 2, column >= sizes[1] // 2


def prepare(
    params: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Find the patch of each coefficient.

    Returns:
        places of rows, and columns (n, taps), integers that add up to places in the flattened
        matrix; by_row and by_column (n, taps), whose products are the values.
    """
    c = scaled(at_least_float32(params["spectrum"]).unsqueeze(-1), params["_scale"])
    if "_filter" not in params:
        row, column = params["_indices"].long().unsqueeze(-1).unbind(-3)
        ones = torch.ones_like(c)
        return {"places": row * shape[1], "columns": column, "by_row": c, "by_column": ones}
    low_pass = params["_filter"].to(c.dtype)
    row, column, low, right = _bands(params["_indices"], shape, low_pass.shape[-1])
    rows, by_row = _axis(row, right, low_pass, shape[0])
    columns, by_column = _axis(column, low, low_pass, shape[1])
    return {
        "places": rows * shape[1],
        "columns": columns,
        "by_row": by_row * c,
        "by_column": by_column,
    }


def _change(params: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    d_out, d_in = shape
    places = params["places"].unsqueeze(-1) + params["columns"].unsqueeze(-2)
    values = params["by_row"].unsqueeze(-1) * params["by_column"].unsqueeze(-2)
    return located.scattered(values.flatten(-3), places.flatten(-3), (d_out, d_in))


def _peft_settings(leaves: Mapping[str, Tensor], shape: tuple[int, int]) -> dict[str, Any]:
    settings = located.peft_settings(leaves, shape)
    if "_filter" not in leaves:
        return {**settings, "use_idwt": False}
    own = leaves["_filter"].double().cpu()
    same = [w for w in PEFT_WAVELETS if _taps(w) == len(own) and torch.allclose(_low_pass(w), own)]
    if not same:
        raise ValueError(f"_filter: its {len(own)} taps are those of no wavelet of PEFT")
    return {**settings, "use_idwt": True, "wavelet_family": frozenset(same)}


def _taps(wavelet: str) -> int:
    order = int(re.sub(r"\D", "", wavelet))
    return order * (6 if wavelet.startswith("coif") else 2)


def _peft_constants(
    config: Mapping[str, Any], leaves: Mapping[str, Tensor], W: Affine
) -> dict[str, Tensor]:
    constants = located.peft_constants(config, leaves, W)
    return {**constants, **_filter_leaf(config["wavelet_family"] if config["use_idwt"] else None)}


VARIANT = Variant(
    name="waveft",
    config=WaveFT,
    init=init,
    leaves={**located.LOCATED, "_filter?": "taps"},
    peft=(
        PeftFormat(
            "WAVEFT",
            leaves={"spectrum": PeftLeaf("waveft_spectrum")},
            settings=_peft_settings,
            constants=_peft_constants,
            patterns={"n_frequency": "n_frequency_pattern"},
            defaults={
                "n_frequency": 2592,
                "scaling": 25.0,
                "random_loc_seed": 777,
                "use_idwt": True,
                "wavelet_family": "db1",
            },
            inert={"wavelet_family": (None, *PEFT_WAVELETS)},
            ignored=("init_weights", "proportional_parameters"),
            layers=("Linear", "Conv1D"),
        ),
    ),
    trials={"waveft": Trial(lr=2e-3, peft=("WaveFTConfig", {}))},
    **located.views_of(prepare, _change),
)

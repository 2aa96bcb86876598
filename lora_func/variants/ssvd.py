"""SSVD: rotate and scale the top singular directions on the input side.

    W' = W + U [(S + δ) (G - I) Vᵀ + δ Vᵀ],   K skew-symmetric
    approx: G = I - 2 K      strict: G = (I - K) (I + K)⁻¹

*Identity at the start because* K = 0 and δ = 0, and only G - I and δ are applied.

Asks of W: ``dense`` at init, ``linear`` after that.

References:
    https://arxiv.org/abs/2509.02830, eq. 8-13. Code: espnet ``espnet2/layers/lora/layers.py``;
    the strict form is PEFT's ``psoft`` without magnitudes, with K negated.

Deviations: we follow the paper. ESPnet's code starts δ at random, has a trained gate, takes the
SVD of Wᵀ where d_out < d_in, which rotates the outputs, and knows the approximate form alone.
``G Gᵀ = I`` in the strict form, ``I + 4 K Kᵀ`` in the approximate one, the paper's default.
An unconstrained G is not offered.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lora_func.checks import check_choice, check_count, check_number
from lora_func.configs import LinearConfig
from lora_func.numerics import SINGULAR, add_low_rank, at_least_float32, cayley, skew, svd
from lora_func.variant import Trial, Variant, prepared
from lora_func.weights import Weight, dense


@dataclass(frozen=True, kw_only=True)
class SSVD(LinearConfig):
    """Structured SVD-guided adaptation; give either r or rotation_ratio.

    Attributes:
        r: How many singular directions take part, k.
        rotation_ratio: The same as a fraction of min(d_out, d_in), in (0, 1], rounded; the paper
            has 0.17 to 0.8.
        orthogonality: "approx" or "strict".

    Examples:
        >>> import torch, lora_func as lf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> params = lf.init(model, lf.SSVD(r=2))
        >>> [key for key, leaf in params.items() if leaf.requires_grad]
        ['0.ssvd.K', '0.ssvd.delta_s']
    """

    r: int | None = None
    rotation_ratio: float | None = None
    orthogonality: str = "approx"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("orthogonality", self.orthogonality, ("approx", "strict"))
        if (self.r is None) == (self.rotation_ratio is None):
            raise ValueError(
                f"r: got {self.r!r}, rotation_ratio: got {self.rotation_ratio!r}; give one of them"
            )
        if self.r is not None:
            check_count("r", self.r)
        if self.rotation_ratio is not None:
            check_number("rotation_ratio", self.rotation_ratio, above=0)
            if self.rotation_ratio > 1:
                raise ValueError(f"rotation_ratio: got {self.rotation_ratio!r}, expected at most 1")


def init(W: Weight, cfg: SSVD, generator: Generator, stats: None = None) -> dict[str, Tensor]:
    """Take the k largest singular directions.

    Returns:
        K or K_strict (k (k - 1) / 2,), delta_s and _S (k,), _U (d_out, k), _Vh (k, d_in).

    Raises:
        ValueError: If the ratio leaves no direction.
    """
    k = cfg.r or round((cfg.rotation_ratio or 0) * min(W.shape))
    if k < 1:
        raise ValueError(
            f"rotation_ratio = {cfg.rotation_ratio} of min(d_out, d_in) = {min(W.shape)} leaves no "
            "direction; raise it"
        )
    U, S, Vh = svd(dense(W), k)
    K = "K_strict" if cfg.orthogonality == "strict" else "K"
    return {
        K: torch.zeros(k * (k - 1) // 2),
        "delta_s": torch.zeros(k),
        "_U": U,
        "_S": S,
        "_Vh": Vh,
    }


def rotation(params: Mapping[str, Tensor]) -> Tensor:
    """Compute G - I.

    Returns:
        Shape (..., k, k), float32 or better.
    """
    name = "K_strict" if "K_strict" in params else "K"
    K = skew(at_least_float32(params[name]))
    return cayley(-K) if name == "K_strict" else -2 * K


def _core(params: Mapping[str, Tensor]) -> Tensor:
    """The change in singular coordinates, ``diag(δ) + (G - I)ᵀ diag(S + δ)``, shape (..., k, k)."""
    E = rotation(params)
    delta, S = params["delta_s"].to(E.dtype), params["_S"].to(E.dtype)
    return torch.diag_embed(delta) + E.mT * (S + delta)[..., None, :]


def prepare(
    params: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Compute the change in singular coordinates.

    Returns:
        core (k, k).
    """
    return {"core": _core(params).to(dtype)}


def apply(W: Weight, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Turn and scale the activation between the singular vectors.

    Returns:
        Shape (..., d_out).
    """
    if "core" not in params:
        params = prepared(prepare, params, W, x.dtype)
    core = params["core"]
    return add_low_rank(
        x, W, params["_Vh"], params["_U"], bottleneck=lambda h: h @ core.to(h.dtype)
    )


def weight(W: Weight, params: Mapping[str, Tensor]) -> Tensor:
    """Compute ``W'``.

    Returns:
        Shape (d_out, d_in).
    """
    W, Vh = dense(W), params["_Vh"]
    core = _core(params)
    return W + (params["_U"].to(core.dtype) @ core.mT @ Vh.to(core.dtype)).to(W.dtype)


VARIANT = Variant(
    name="ssvd",
    config=SSVD,
    family="SVD",
    init=init,
    apply=apply,
    prepare=prepare,
    casts=("_U", "_Vh"),
    weight=weight,
    leaves={"K?": "pairs", "K_strict?": "pairs", "delta_s": "r", **SINGULAR},
    trials={
        "ssvd": Trial({"rotation_ratio": 0.25}),
        "ssvd-strict": Trial({"rotation_ratio": 0.25, "orthogonality": "strict"}),
    },
    stacks=True,
    products_only=True,
)

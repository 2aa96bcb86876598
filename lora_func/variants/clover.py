"""CLOVER: a trained square core for each head of a query, key or value projection.

    y_h = (x, 1) Q_h (R_h + D_h),   (W_h, b_h)ᵀ = Q_h R_h by QR for each head h of the output

*Identity at the start because* D = 0, and what is added is y_h R_h⁻¹ D_h, exactly zero.

Asks of W: the dense weight at init; ``linear`` only afterwards. The whole output of the layer is
transformed, its bias too.

References:
    https://arxiv.org/abs/2411.17426, section 3. Code: the authors' conversion script, which writes
    Q into the layer and trains R.

Deviations: the code replaces the weight by Q, which is the base up to rounding alone; here the base
stays, R⁻¹ is a constant and D the trained difference. The form that joins the value and the output
projection of a head reads a second weight, and is not offered. A core with ``core="free"`` trains
R⁻¹ D itself: the same set of functions, without the constant. There is no scale; the learning rate
is that of LoRA.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lora_func.checks import check_choice, check_count
from lora_func.configs import LinearConfig
from lora_func.numerics import at_least_float32, rotate_blocks, without_autocast
from lora_func.variant import Trial, Variant, prepared
from lora_func.weights import Weight, bias_of, dense, linear


@dataclass(frozen=True, kw_only=True)
class CLOVER(LinearConfig):
    """Cross-layer orthogonal vectors: a full matrix on the output of each head.

    Attributes:
        head_dim: The width of a head, which divides d_out.
        core: "qr" trains in the coordinates of R; "free" without them.

    Examples:
        >>> import torch, lora_func as lf
        >>> cfg = lf.CLOVER(head_dim=3)
        >>> params = lf.init(torch.nn.Sequential(torch.nn.Linear(8, 6)), cfg)
        >>> {key: tuple(leaf.shape) for key, leaf in params.items()}
        {'0.clover.D': (2, 3, 3), '0.clover._R_inverse': (2, 3, 3)}
    """

    head_dim: int = 64
    core: str = "qr"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("head_dim", self.head_dim)
        check_choice("core", self.core, ("qr", "free"))


def init(W: Weight, cfg: CLOVER, generator: Generator, stats: None = None) -> dict[str, Tensor]:
    """Decompose the rows of each head.

    Returns:
        D (heads, head_dim, head_dim); _R_inverse of the same shape, unless the core is free.

    Raises:
        ValueError: If head_dim does not divide d_out, or the rows of a head depend on each other.
    """
    (d_out, _), size = W.shape, cfg.head_dim
    if d_out % size:
        raise ValueError(f"head_dim = {size} does not divide d_out = {d_out}")
    leaves = {"D": torch.zeros(d_out // size, size, size)}
    if cfg.core == "free":
        return leaves
    rows, bias = at_least_float32(dense(W)), bias_of(W)
    if bias is not None:
        rows = torch.cat([rows, bias[:, None].to(rows)], 1)
    R = torch.linalg.qr(rows.view(-1, size, rows.shape[1]).mT, mode="r").R
    diagonal = R.diagonal(dim1=-2, dim2=-1).abs()
    if diagonal.shape[-1] < size or diagonal.min() <= size * 1e-6 * diagonal.max():
        raise ValueError('the rows of a head depend on each other, R has no inverse; core="free"')
    eye = torch.eye(size, dtype=R.dtype, device=R.device).expand_as(R)
    return {**leaves, "_R_inverse": torch.linalg.solve_triangular(R, eye, upper=True)}


def _turn(params: Mapping[str, Tensor]) -> Tensor:
    """R⁻¹ D, shape (heads, head_dim, head_dim)."""
    D = at_least_float32(params["D"])
    if "_R_inverse" not in params:
        return D
    with without_autocast(D):
        return params["_R_inverse"].to(D.dtype) @ D


def prepare(
    params: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Compute ``R⁻¹ D``.

    Returns:
        turn (heads, head_dim, head_dim).
    """
    return {"turn": _turn(params).to(dtype)}


def apply(W: Weight, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Compute ``y + y_h R_h⁻¹ D_h`` of ``y = linear(x, W)``.

    Returns:
        Shape (..., d_out).
    """
    if "turn" not in params:
        params = prepared(prepare, params, W, x.dtype)
    y = linear(x, W)
    return y + rotate_blocks(y, params["turn"])


def weight(W: Weight, params: Mapping[str, Tensor]) -> Tensor:
    """Compute ``W_h + (R_h⁻¹ D_h)ᵀ W_h``.

    Returns:
        Shape (d_out, d_in).
    """
    W = dense(W)
    return W + rotate_blocks(W.mT, _turn(params)).mT


def bias(b: Tensor | None, params: Mapping[str, Tensor]) -> Tensor | None:
    """Compute ``b_h + b_h R_h⁻¹ D_h``.

    Returns:
        Shape (d_out,), or None.
    """
    return None if b is None else b + rotate_blocks(b, _turn(params))


VARIANT = Variant(
    name="clover",
    config=CLOVER,
    family="multiplicative",
    init=init,
    apply=apply,
    prepare=prepare,
    weight=weight,
    bias=bias,
    leaves={"D": "d_out/head head head", "_R_inverse?": "d_out/head head head"},
    neutral={"D": 0.0},
    trials={
        "clover": Trial({"head_dim": 32}, lr=3e-3),
        "clover-free": Trial({"head_dim": 32, "core": "free"}, lr=3e-3),
    },
    stacks=True,
    products_only=True,
)

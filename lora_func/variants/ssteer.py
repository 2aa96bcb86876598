"""S-steer: steer a layer along a direction δ of its singular space.

    scale:  S_i -> S_i (1 + c δ_i)              exp:  S_i -> S_i exp(clamp(c δ_i))
    ablate: y = W x - U a (aᵀ h) + c U a        add:  y = W x + c |cos(√S h, δ)| U a
    h = Vᵀ x,   a = √S δ,   c the steering coefficient

*Identity at the start because* δ = 0 without data, or c = 0; ablation is none.

Asks of W: ``dense`` at init, ``linear`` after that. Takes pairs of calibration batches.

References:
    https://github.com/wassname/ssteer-eval-aware (README and report: scale) and
    https://github.com/wassname/steering-lite (``sspace``: add; ``sspace_damp_amp``: exp;
    ``sspace_ablate``). There is no paper.

Deviations: coordinates are x V √S as in the README and steering-lite; ``ssteer_v3.py`` projects
outputs by U √S. δ = normalize(mean(√S h₊) - mean(√S h₋)) over pairs, at the last token. scale and
exp depend on the signs of singular vectors, so the method sets them: two are turned where fewer
than half of the pairs have the positive one ahead. The references freeze δ; here it may train.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Generator, Tensor

from lora_func.checks import check_choice, check_count, check_number
from lora_func.configs import Calibration, LinearConfig
from lora_func.numerics import (
    SINGULAR,
    add_low_rank,
    along_rows,
    at_least_float32,
    check_rank,
    svd,
)
from lora_func.variant import BiasFn, Trial, Variant, WeightFn, prepared
from lora_func.weights import Weight, dense

_NAMES = {"scale": "ssteer", "exp": "ssteer_exp", "add": "ssteer_add", "ablate": "ssteer_ablate"}


@dataclass(frozen=True, kw_only=True)
class SSteer(LinearConfig):
    """Singular-space steering; calibrated by ``init(..., data=pairs)`` of (positive, negative).

    Attributes:
        mode: "scale", "exp", "add" (not linear in x, so without a weight view) or "ablate".
        r: How many singular directions, those in which the pairs differ most; -1 for all.
        coeff: The steering coefficient c, kept as the constant ``_coeff``; 0 is off, and for
            "ablate" puts nothing in the place of what is removed. None means 1, for "ablate" 0.
        clamp: Bound of c δ_i in "exp".
    """

    mode: str = "scale"
    r: int = -1
    coeff: float | None = None
    clamp: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("mode", self.mode, (*_NAMES,))
        check_count("r", self.r, least=-1)
        if self.r == 0:
            raise ValueError("r: got 0, expected an integer of at least 1, or -1 for all")
        if self.coeff is not None:
            check_number("coeff", self.coeff)
        check_number("clamp", self.clamp, above=0)

    @property
    def variant(self) -> str:
        """The name that belongs to the mode."""
        return _NAMES[self.mode]

    @property
    def calibration(self) -> Calibration:
        """Pairs of a positive and a negative batch."""
        return "pairs"


def observe(cfg: SSteer, acc: Tensor | None, x: Tensor, gy: None) -> Tensor:
    """Keep the differences of the pairs: one row of d_in for each.

    Returns:
        Shape (pairs, d_in), float32 or better.
    """
    difference = at_least_float32(x[0]) - at_least_float32(x[1])
    return difference if acc is None else torch.cat([acc, difference])


def init(
    W: Weight, cfg: SSteer, generator: Generator, stats: Tensor | None = None
) -> dict[str, Tensor]:
    """Find the direction in which the pairs differ; without data it is zero, to be trained.

    Returns:
        delta and _S (r,), _U (d_out, r), _Vh (r, d_in), _coeff (), in mode "exp" _clamp ().

    Raises:
        ValueError: If the mode needs data and has none, pairs do not differ, or coeff would turn a
            singular value round.
    """
    full = min(W.shape)
    r = full if cfg.r == -1 else cfg.r
    coeff = cfg.coeff if cfg.coeff is not None else float(cfg.mode != "ablate")
    check_rank(r, W.shape)
    U, S, Vh = svd(dense(W), full)
    if stats is None:
        if cfg.mode in ("add", "ablate"):
            raise ValueError(
                f"mode={cfg.mode!r} needs pairs of batches; pass init(..., data=pairs)"
            )
        chosen, delta = torch.arange(r, device=S.device), S.new_zeros(r)
    else:
        sign, chosen, delta = _direction(S, Vh, stats.to(Vh), r)
        U, Vh = U * sign, Vh * sign[:, None]
    if cfg.mode == "scale" and (least := (coeff * delta).min().item()) <= -1:
        raise ValueError(
            f"coeff = {coeff} times delta reaches {least:.3g}, and turns a singular value round "
            "from -1 on; bring coeff nearer to 0, or use mode='exp'"
        )
    return {
        "delta": delta,
        "_U": U[:, chosen],
        "_S": S[chosen],
        "_Vh": Vh[chosen],
        "_coeff": torch.tensor(coeff, dtype=torch.float64),
    } | ({"_clamp": torch.tensor(cfg.clamp, dtype=torch.float64)} if cfg.mode == "exp" else {})


def _direction(S: Tensor, Vh: Tensor, pairs: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Signs of the singular pairs (k,), which r are chosen, and the unit direction there (r,)."""
    projected = (pairs @ Vh.mT) * S.sqrt()
    sign = 1 - 2 * ((projected > 0).double().mean(0) < 0.5).to(S)
    mean = projected.mean(0) * sign
    chosen = mean.abs().topk(r).indices.sort().values
    length = mean[chosen].norm()
    if not (length.isfinite() and length > 0):
        raise ValueError(f"{len(pairs)} pairs differ by {length.item()}; pass others")
    return sign, chosen, mean[chosen] / length


def _coordinates(params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """c, shape (..., 1), and δ, S and a = √S δ, shape (..., r)."""
    delta = at_least_float32(params["delta"])
    S = params["_S"].to(delta.dtype)
    return params["_coeff"].to(delta.dtype)[..., None], delta, S, S.sqrt() * delta


def _gain(params: Mapping[str, Tensor]) -> Tensor:
    """What is added to S."""
    c, delta, S, _ = _coordinates(params)
    if "_clamp" not in params:
        return c * delta * S
    bound = params["_clamp"].to(delta.dtype)[..., None]
    return S * (c * delta).clamp(-bound, bound).expm1()


def _for_gain(params: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {"middle": _gain(params).to(dtype)}


def _weight_gain(W: Weight, params: Mapping[str, Tensor]) -> Tensor:
    W, gain = dense(W), _gain(params)
    return W + ((params["_U"] * gain) @ params["_Vh"].to(gain.dtype)).to(W.dtype)


def _for_gate(params: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    c, delta, S, a = _coordinates(params)
    return {"direction": delta, "root": S.sqrt(), "added": c * a}


def _by_gate(ready: Mapping[str, Tensor], h: Tensor) -> Tensor:
    direction, root, added = (along_rows(ready[name]) for name in ("direction", "root", "added"))
    h = at_least_float32(h) * root
    gate = torch.nn.functional.cosine_similarity(h, direction, dim=-1, eps=1e-12).abs()
    return gate[..., None] * added


def _for_removal(params: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    c, _, _, a = _coordinates(params)
    return {"removed": a, "added": c * a}


def _by_removal(ready: Mapping[str, Tensor], h: Tensor) -> Tensor:
    a, added = ready["removed"], along_rows(ready["added"])
    projected = h.to(a.dtype) @ a[..., None]
    return added - projected * along_rows(a)


def _weight_ablate(W: Weight, params: Mapping[str, Tensor]) -> Tensor:
    W, (_, _, _, a) = dense(W), _coordinates(params)
    return W - torch.outer(params["_U"].to(a.dtype) @ a, a @ params["_Vh"].to(a.dtype)).to(W.dtype)


def _bias_ablate(b: Tensor | None, params: Mapping[str, Tensor]) -> Tensor:
    c, _, _, a = _coordinates(params)
    added = c * (params["_U"].to(a.dtype) @ a)
    return added if b is None else b + added.to(b.dtype)


def _variant(
    mode: str,
    change: Callable[[Mapping[str, Tensor], torch.dtype], dict[str, Tensor]],
    steer: Callable[[Mapping[str, Tensor], Tensor], Tensor] | None = None,
    weight: WeightFn | None = None,
    bias: BiasFn | None = None,
) -> Variant:
    def prepare(
        params: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        return change(params, dtype)

    def apply(W: Weight, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        if "middle" not in params and "added" not in params:
            params = prepared(prepare, params, W, x.dtype)
        down, up, middle = params["_Vh"], params["_U"], params.get("middle")
        steered = None if steer is None else partial(steer, params)
        return add_low_rank(x, W, down, up, middle, bottleneck=steered)

    trial = Trial({"mode": mode}, lr=1e-2)
    if mode in ("add", "ablate"):
        trial = trial._replace(data=True, start="elsewhere")
    return Variant(
        name=_NAMES[mode],
        config=SSteer,
        family="SVD",
        init=init,
        apply=apply,
        prepare=prepare,
        casts=("_U", "_Vh"),
        leaves={"delta": "r", "_coeff": "", "_clamp?": "", **SINGULAR},
        weight=weight,
        bias=bias,
        observe=observe,
        join=lambda first, second: torch.cat([first, second]),
        trials={_NAMES[mode].replace("_", "-"): trial},
        stacks=True,
        products_only=True,
    )


VARIANTS = (
    _variant("scale", _for_gain, weight=_weight_gain),
    _variant("exp", _for_gain, weight=_weight_gain),
    _variant("add", _for_gate, _by_gate),
    _variant("ablate", _for_removal, _by_removal, _weight_ablate, _bias_ablate),
)

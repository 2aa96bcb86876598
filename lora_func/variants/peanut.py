"""PEANuT: a change of the weight that a small network computes from the weight.

    W' = W + s B f(W),   f(W) = relu(A W), then ``depth`` layers relu(E_i h) and as many
    relu(D_i h) + the h before the matching E_i

*Identity at the start because* B = 0, so the added term is exactly zero in every dtype.

Asks of W: the dense weight in each call, for 2 r d_out d_in products that do not depend on the
number of tokens. The layer is linear in x: f(W) stands for the A of a LoRA.

References:
    https://arxiv.org/abs/2410.01870, eq. 4-8. Code: huggingface/peft ``tuners/peanut/layer.py``.

Deviations: none in the numbers. PEFT builds the change as a matrix of the size of W, and multiplies
it with x apart; here its factors run as a LoRA. Only relu is offered. There is no alpha:
``scaling`` is s. The usual rank is 32 at depth 0; the learning rate is that of LoRA.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from lora_func.checks import check_count, check_number
from lora_func.configs import RankConfig
from lora_func.numerics import add_low_rank, kaiming_uniform, scaled
from lora_func.variant import PeftFormat, PeftLeaf, Trial, Variant, prepared
from lora_func.variants._low_rank import alpha_of, prepare, scale_like
from lora_func.weights import Affine, Weight, dense


@dataclass(frozen=True, kw_only=True)
class PEANuT(RankConfig):
    """Parameter-efficient adaptation with weight-aware neural tweakers.

    Attributes:
        depth: How many pairs of inner layers the network has.
        scaling: What multiplies the change.

    Examples:
        >>> import torch, lora_func as lf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> params = lf.init(model, lf.PEANuT(r=2, depth=1))
        >>> [tuple(leaf.shape) for leaf in lf.partition(params)[0].values()]
        [(2, 3), (3, 2), (1, 2, 2), (1, 2, 2)]
    """

    r: int = 32
    depth: int = 0
    scaling: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("depth", self.depth, least=0)
        check_number("scaling", self.scaling)


def init(W: Weight, cfg: PEANuT, generator: Generator, stats: None = None) -> dict[str, Tensor]:
    """Draw A and the inner layers, leave B at zero.

    Returns:
        A (r, d_out), B (d_out, r), _scale (); E and D (depth, r, r) if there are inner layers.
    """
    d_out, _ = W.shape
    leaves = {"A": kaiming_uniform(cfg.r, d_out, generator), "B": torch.zeros(d_out, cfg.r)}
    for name in ("E", "D") if cfg.depth else ():
        drawn = [kaiming_uniform(cfg.r, cfg.r, generator) for _ in range(cfg.depth)]
        leaves[name] = torch.stack(drawn)
    return {**leaves, "_scale": torch.tensor(cfg.scaling, dtype=torch.float64)}


def _down(W: Tensor, params: Mapping[str, Tensor]) -> Tensor:
    """f(W), shape (r, d_in)."""
    h = torch.relu(params["A"].to(W.dtype) @ W)
    if "E" not in params:
        return h
    before = []
    for E in params["E"].to(W.dtype).unbind(-3):
        before.append(h)
        h = torch.relu(E @ h)
    for D in params["D"].to(W.dtype).unbind(-3):
        h = torch.relu(D @ h) + before.pop()
    return h


def apply(W: Weight, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Compute ``linear(x, W) + s x f(W)ᵀ Bᵀ``.

    Returns:
        Shape (..., d_out).
    """
    if "up" not in params:
        params = prepared(prepare, params, W, x.dtype)
    return add_low_rank(x, W, _down(dense(W), params), params["up"])


def weight(W: Weight, params: Mapping[str, Tensor]) -> Tensor:
    """Compute ``W + s B f(W)``.

    Returns:
        Shape (d_out, d_in).
    """
    W = dense(W)
    return W + scaled(params["B"], params["_scale"]).to(W.dtype) @ _down(W, params)


def _peft_settings(leaves: Mapping[str, Tensor], shape: tuple[int, int]) -> dict[str, Any]:
    depth = len(leaves["E"]) if "E" in leaves else 0
    scaling = alpha_of(leaves["_scale"], 1)
    return {"r": leaves["A"].shape[-2], "depth": depth, "scaling": scaling}


def _peft_constants(
    config: Mapping[str, Any], leaves: Mapping[str, Tensor], W: Affine
) -> dict[str, Tensor]:
    return scale_like(config["scaling"], leaves["A"])


_PEFT = PeftFormat(
    "PEANUT",
    leaves={"A": PeftLeaf("peanut_A.weight"), "B": PeftLeaf("peanut_B.weight")},
    settings=_peft_settings,
    constants=_peft_constants,
    holds=lambda leaves: "E" not in leaves,
    defaults={"r": 32, "depth": 0, "scaling": 1.0},
    inert={"act_fn": (None, "relu")},
    ignored=("init_weights",),
)
_INNER = {"E": PeftLeaf("peanut_encoders"), "D": PeftLeaf("peanut_decoders")}
_PEFT_DEEP = _PEFT._replace(
    leaves={**_PEFT.leaves, **_INNER},
    holds=lambda leaves: "E" in leaves,
    lists_of=tuple(leaf.name for leaf in _INNER.values()),
)

VARIANT = Variant(
    name="peanut",
    config=PEANuT,
    family="low-rank",
    init=init,
    apply=apply,
    prepare=prepare,
    casts=("A", "E", "D"),
    weight=weight,
    leaves={"A": "r d_out", "B": "d_out r", "E?": "depth r r", "D?": "depth r r", "_scale": ""},
    peft=(_PEFT, _PEFT_DEEP),
    trials={
        "peanut": Trial(peft=("PeanutConfig", {"r": 32})),
        "peanut-deep": Trial({"depth": 2}, peft=("PeanutConfig", {"r": 32, "depth": 2})),
    },
    pads=True,
    stacks=True,
)

"""IA3 on the input side: a trained gain for each input.

    W' = W diag(g)

*Identity at the start because* g = 1, which changes no input in any dtype.

Asks of W: ``linear`` only.

References:
    https://arxiv.org/abs/2205.05638, section 3.3 (the feed-forward's l_ff). Code: huggingface/peft
    ``tuners/ia3/layer.py`` (``feedforward_modules``).

Deviations: T-Few gates the output of the layer before the second feed-forward one, which is the
same thing; PEFT and we gate the input of that one. A convolution has a gain for each input channel,
as in PEFT.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lora_func.configs import LinearConfig
from lora_func.numerics import scale_output
from lora_func.variant import PeftFormat, PeftLeaf, Trial, Variant, matches_path, prepared
from lora_func.weights import Weight, dense, linear, taps_of


@dataclass(frozen=True, kw_only=True)
class IA3FF(LinearConfig):
    """Gains on the inputs of a layer; the authors choose the second feed-forward layer.

    Examples:
        >>> import torch, lora_func as lf
        >>> list(lf.init(torch.nn.Sequential(torch.nn.Linear(4, 3)), lf.IA3FF()))
        ['0.ia3_ff.g']
    """


def init(W: Weight, cfg: IA3FF, generator: Generator, stats: None = None) -> dict[str, Tensor]:
    """Set every gain to one.

    Returns:
        g (d_in,), or of a convolution (channels,).
    """
    _, d_in = W.shape
    return {"g": torch.ones(d_in // taps_of(W))}


def _gains(params: Mapping[str, Tensor], d_in: int) -> Tensor:
    g = params["g"]
    return g if g.shape[-1] == d_in else g.repeat_interleave(d_in // g.shape[-1], -1)


def prepare(
    params: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Compute g for each input, and ``g - 1``, which a cast leaves more precise.

    Returns:
        gains; more, where they need a cast.
    """
    g = _gains(params, shape[1])
    return {"gains": g} if g.dtype == dtype else {"gains": g, "more": (g - 1).to(dtype)}


def apply(W: Weight, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Compute ``linear(g x, W)``, where a cast would round g with ``g x`` as ``x + (g - 1) x``.

    Returns:
        Shape (..., d_out).
    """
    if "gains" not in params:
        params = prepared(prepare, params, W, x.dtype)
    return linear(scale_output(x, params["gains"], params.get("more")), W)


def weight(W: Weight, params: Mapping[str, Tensor]) -> Tensor:
    """Compute ``W diag(g)``.

    Returns:
        Shape (d_out, d_in).
    """
    W = dense(W)
    return W + W * (_gains(params, W.shape[-1]) - 1).to(W.dtype)


VARIANT = Variant(
    name="ia3_ff",
    config=IA3FF,
    family="multiplicative",
    init=init,
    apply=apply,
    prepare=prepare,
    weight=weight,
    leaves={"g": "d_in/taps"},
    neutral={"g": 1.0},
    peft=(
        PeftFormat(
            "IA3",
            leaves={"g": PeftLeaf("ia3_l", lambda g: g.unsqueeze(0), lambda g, _: g.flatten())},
            means=lambda config, path: matches_path(config.get("feedforward_modules"), path),
            listed="feedforward_modules",
            layers=("Linear", "Conv1D"),
        ),
        PeftFormat(
            "IA3",
            leaves={
                "g": PeftLeaf("ia3_l", lambda g: g[None], lambda g, _: g.flatten(), layout="ones")
            },
            means=lambda config, path: matches_path(config.get("feedforward_modules"), path),
            listed="feedforward_modules",
            layers=("Conv2d", "Conv3d"),
            refuses=lambda module: "its groups share gains" if module.groups > 1 else None,
        ),
    ),
    trials={"ia3_ff": Trial(lr=1e-2, peft=("IA3Config", {"feedforward_modules": "all"}))},
    stacks=True,
)

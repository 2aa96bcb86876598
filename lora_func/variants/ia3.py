"""IA3: a trained gain for each output.

    W' = diag(g) W,   b' = g b

*Identity at the start because* g = 1, which changes no output in any dtype.

Asks of W: ``linear`` only.

References:
    https://arxiv.org/abs/2205.05638, section 3.3. Code: r-three/t-few ``configs/ia3.json``,
    huggingface/peft ``tuners/ia3/layer.py``.

Deviations: the paper puts it on keys, values and the inner activations of the feed-forward; which
layers take part is the config's to say (see also ``IA3FF``). The bias is scaled with the output, as
in PEFT. g is a float32 leaf also on a bfloat16 model, where steps near 1 would be rounded away.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lora_func.configs import LinearConfig
from lora_func.numerics import scale_output
from lora_func.variant import PeftFormat, PeftLeaf, Trial, Variant, matches_path, prepared
from lora_func.weights import Weight, dense, linear


@dataclass(frozen=True, kw_only=True)
class IA3(LinearConfig):
    """Gains on the outputs of a layer; the authors choose keys and values.

    Examples:
        >>> import torch, lora_func as lf
        >>> list(lf.init(torch.nn.Sequential(torch.nn.Linear(4, 3)), lf.IA3()))
        ['0.ia3.g']
    """


def init(W: Weight, cfg: IA3, generator: Generator, stats: None = None) -> dict[str, Tensor]:
    """Set every gain to one.

    Returns:
        g (d_out,).
    """
    d_out, _ = W.shape
    return {"g": torch.ones(d_out)}


def prepare(
    params: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Compute ``g - 1``, which a cast leaves more precise than g.

    Returns:
        more; nothing where g needs no cast.
    """
    return {} if params["g"].dtype == dtype else {"more": (params["g"] - 1).to(dtype)}


def apply(W: Weight, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Compute ``g y`` with ``y = linear(x, W)``, where a cast would round g as ``y + (g - 1) y``.

    Returns:
        Shape (..., d_out).
    """
    y = linear(x, W)
    if "more" not in params and params["g"].dtype != y.dtype:
        params = prepared(prepare, params, W, y.dtype)
    return scale_output(y, params["g"], params.get("more"))


def weight(W: Weight, params: Mapping[str, Tensor]) -> Tensor:
    """Compute ``diag(g) W``.

    Returns:
        Shape (d_out, d_in).
    """
    W = dense(W)
    return W + (params["g"] - 1).to(W.dtype)[:, None] * W


def bias(b: Tensor | None, params: Mapping[str, Tensor]) -> Tensor | None:
    """Compute ``g b``.

    Returns:
        Shape (d_out,), or None.
    """
    return None if b is None else b + (params["g"] - 1).to(b.dtype) * b


VARIANT = Variant(
    name="ia3",
    config=IA3,
    family="multiplicative",
    init=init,
    apply=apply,
    prepare=prepare,
    weight=weight,
    bias=bias,
    leaves={"g": "d_out"},
    neutral={"g": 1.0},
    peft=(
        PeftFormat(
            "IA3",
            leaves={"g": PeftLeaf("ia3_l", lambda g: g.unsqueeze(1), lambda g, _: g.flatten())},
            means=lambda config, path: not matches_path(config.get("feedforward_modules"), path),
            ignored=("init_ia3_weights",),
            layers=("Linear", "Conv1D"),
        ),
        PeftFormat(
            "IA3",
            leaves={
                "g": PeftLeaf("ia3_l", lambda g: g[None], lambda g, _: g.flatten(), layout="ones")
            },
            means=lambda config, path: not matches_path(config.get("feedforward_modules"), path),
            ignored=("init_ia3_weights",),
            layers=("Conv2d", "Conv3d"),
        ),
    ),
    trials={"ia3": Trial(lr=1e-2, peft=("IA3Config", {"feedforward_modules": []}))},
    stacks=True,
    products_only=True,
)

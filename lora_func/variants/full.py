"""Full fine-tuning of chosen parameters: heads, LayerNorms, biases, embeddings.

    θ' = the leaf of the parameter's own name

*Identity at the start because* each leaf is a copy of its parameter: exact where the leaf's dtype
holds the base's.

Asks of W: ``dense``; ``linear`` only, if only the bias of a linear layer is trained.

References:
    None; this is ordinary fine-tuning, as functions of a dict. PEFT: ``modules_to_save`` and
    ``trainable_token_indices``.

Deviations: PEFT copies whole modules, which then hold parameters and buffers of their own; here a
site is a set of parameters, and the module stays as it was.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Generator, Tensor

from lora_func.configs import ParameterConfig
from lora_func.variant import PeftFormat, Variant
from lora_func.weights import Affine, Weight, dense, linear


@dataclass(frozen=True, kw_only=True)
class Full(ParameterConfig):
    """Train chosen parameters themselves.

    Examples:
        >>> import torch, lora_func as lf
        >>> params = lf.init(torch.nn.Linear(4, 3), lf.Full(target_parameters="bias"))
        >>> {key: tuple(leaf.shape) for key, leaf in params.items()}
        {'.full.bias': (3,)}
    """


def init(
    W: Mapping[str, Tensor], cfg: Full, generator: Generator, stats: None = None
) -> dict[str, Tensor]:
    """Copy the site's selected parameters, in the layout that the module keeps them in.

    Returns:
        One leaf for each, of its name and shape.
    """
    return {name: parameter.detach().clone() for name, parameter in W.items()}


def apply(W: Weight, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Run an ``nn.Linear`` with the trained weight, bias or both.

    Returns:
        Shape (..., d_out).
    """
    layer = W if isinstance(W, Affine) else Affine(W)
    trained = {name: leaf.to(x.dtype) for name, leaf in params.items()}
    return linear(x, Affine(trained.get("weight", layer.weight), trained.get("bias", layer.bias)))


def weight(W: Weight, params: Mapping[str, Tensor]) -> Tensor:
    """Give the trained weight of an ``nn.Linear``, or the frozen one if only the bias is trained.

    Returns:
        Shape (d_out, d_in).
    """
    W = dense(W)
    return params.get("weight", W).to(W.dtype)


def bias(b: Tensor | None, params: Mapping[str, Tensor]) -> Tensor | None:
    """Give the trained bias, or the frozen one where only the weight is trained.

    Returns:
        Shape (d_out,), or None.
    """
    return params.get("bias", b)


def parameters(own: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the trained parameters in the dtypes of those they replace.

    Returns:
        One tensor for each leaf.
    """
    return {name: leaf.to(own[name].dtype) for name, leaf in params.items()}


VARIANT = Variant(
    name="full",
    config=Full,
    family="full",
    init=init,
    apply=apply,
    weight=weight,
    bias=bias,
    leaves={},
    parameters=parameters,
    peft=(PeftFormat("LN_TUNING", leaves={}, whole="ln_tuning_layers."),),
)

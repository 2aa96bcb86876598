"""An adapter of tied embeddings, which PEFT writes at both places."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_func.adapter import Key, group
from lora_func.modules import shared_parameters
from lora_func.variant import Params, Variant
from lora_func.variants import by_name


def mirrored_once(model: nn.Module, config: Mapping[str, Any], params: Params) -> Params:
    """Make one site of an embedding and the head that is tied to it, if they are mirrored.

    PEFT's ``ensure_weight_tying`` writes the factors of the embedding at the head again, transposed
    and in the other order.

    Args:
        model: The model.
        config: The config.
        params: The adapter, with a site for each place.

    Returns:
        The adapter, with the tied parameter as the site.
    """
    if not config.get("ensure_weight_tying"):
        return params
    names = {module: path for path, module in model.named_modules()}
    sites = {path: (name, keys) for (path, name), keys in group(params).items()}
    found = dict(params)
    for (module, parameter), places in shared_parameters(model).items():
        here = names[module]
        others = [names[m] for m, _ in places if names[m] != here and names[m] in sites]
        if not isinstance(module, nn.Embedding) or here not in sites or len(others) != 1:
            continue
        (name, own), (other_name, other) = sites[here], sites[others[0]]
        leaves = {leaf: params[key] for leaf, key in own.items()}
        at_head = mirrored(by_name(name), leaves)
        equal = name == other_name and all(
            leaf in other and torch.equal(params[other[leaf]], tensor)
            for leaf, tensor in at_head.items()
        )
        if at_head and equal:
            for key in (*own.values(), *other.values()):
                found.pop(key, None)
            tied = {str(Key(f"{here}.{parameter}", name, n)): t for n, t in leaves.items()}
            found |= tied
    return found


def mirrored(variant: Variant, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the factors of the transposed weight, by the axes that the variant names."""
    axes = {leaf: words[0] for leaf, words in variant.axes.items()}
    partner = {("r", "d_in"): ("d_out", "r"), ("d_out", "r"): ("r", "d_in")}
    return {
        leaf: next(tensor.mT for n, tensor in leaves.items() if axes[n] == partner[words])
        for leaf, words in axes.items()
        if words in partner and leaf in leaves
    }

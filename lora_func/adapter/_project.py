"""The bounds of trained leaves, which an optimizer knows nothing of."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lora_func.adapter._keys import as_trainable, group
from lora_func.adapter._schema import check_leaves
from lora_func.variant import Params
from lora_func.variants import by_name


def project(params: Mapping[str, Tensor]) -> Params:
    """Move the trained leaves into their bounds, for variants that have bounds.

    An optimizer's step may leave the bounds that a method sets, such as the angle of OFT's
    ``coft``. Call this after each step, and write the result to the leaves. A clamp inside of the
    forward pass would stop the gradient of what it clamps, for ever.

    Args:
        params: An adapter, or a stack; it does not change.

    Returns:
        The adapter with every leaf in its bounds. Leaves that have none are the same tensors.

    Raises:
        KeyError: If a key is malformed or names no variant.
        ValueError: If the leaves do not fit their variants.

    Examples:
        >>> import torch, lora_func as lf
        >>> cfg = lf.OFT(block_size=2, coft=1e-2)
        >>> params = lf.init(torch.nn.Linear(4, 4), cfg)
        >>> leaf = params[".oft.R"]
        >>> with torch.no_grad():
        ...     for key, bounded in lf.project({**params, ".oft.R": leaf + 1}).items():
        ...         _ = params[key].copy_(bounded)
        >>> print(leaf.squeeze().detach())
        tensor([0.0050, 0.0050])
    """
    check_leaves(params)
    projected: Params = {}
    with torch.no_grad():
        for (_, name), keys in group(params).items():
            bounds = by_name(name).project
            if bounds is not None:
                moved = bounds({leaf: params[key] for leaf, key in keys.items()})
                projected |= {keys[leaf]: tensor for leaf, tensor in moved.items()}
    return {**params, **as_trainable(projected)}

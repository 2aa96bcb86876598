"""Learning rates that differ from leaf to leaf."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lora_func.adapter import group, holds_stack, parse
from lora_func.checks import check_number
from lora_func.modules import find_site
from lora_func.variants import by_name


def lora_plus(
    params: Mapping[str, Tensor],
    lr: float | Tensor,
    ratio: float,
    *,
    model: nn.Module | None = None,
    embedding_lr: float = 1e-6,
) -> dict[str, Any]:
    """LoRA+: B and every leaf of one axis learn ``ratio`` times as fast as the others.

    References:
        https://arxiv.org/abs/2402.12354. Code: huggingface/peft ``optimizers/loraplus.py``.

    Args:
        params: An adapter, or a stack.
        lr: The learning rate of A; for a stack possibly one for each adapter, shape (K,).
        ratio: The paper recommends 16 and more.
        model: The model, if adapters of embeddings shall get a rate of their own.
        embedding_lr: That rate.

    Returns:
        Key of a trained leaf -> its learning rate; for rates (K,) a tensor that fits the leaf.

    Raises:
        ValueError: If ratio or a rate is not positive.
    """
    check_number("ratio", ratio, above=0)
    check_number("embedding_lr", embedding_lr, above=0)
    if not isinstance(lr, Tensor):
        check_number("lr", lr, above=0)
    rates: dict[str, Any] = {}
    stacked = holds_stack(params)
    for (site, name), keys in group(params).items():
        axes = by_name(name).axes
        is_embedding = model is not None and _is_embedding(model, site)
        for leaf, key in keys.items():
            if parse(key).is_constant:
                continue
            if not is_embedding and key in rates:
                continue  # a leaf that an embedding shares
            own = len(axes[leaf][0]) if leaf in axes else params[key].ndim - stacked
            is_fast = leaf == "B" or own == 1
            rate = embedding_lr if is_embedding else lr * ratio if is_fast else lr
            if isinstance(rate, Tensor):
                rate = rate.reshape(-1, *[1] * (params[key].ndim - 1))
            rates[key] = rate
    return rates


def _is_embedding(model: nn.Module, site: str) -> bool:
    return isinstance(find_site(model, site)[0], nn.Embedding)


def groups(
    params: Mapping[str, Tensor], rates: Mapping[str, float], *, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Sort leaves by their learning rate into the groups that torch's optimizers take.

    Args:
        params: An adapter, or a stack.
        rates: Key -> learning rate, one number each.
        weight_decay: The weight decay of each group.

    Returns:
        Groups, from the lowest rate to the highest.

    Raises:
        KeyError: If a rate belongs to no leaf.
        TypeError: If a rate is a tensor.

    Examples:
        >>> import torch, lora_func as lf
        >>> from lora_func import rules
        >>> params = lf.init(torch.nn.Linear(4, 3), lf.LoRA(r=2))
        >>> grouped = rules.groups(params, rules.lora_plus(params, lr=1e-4, ratio=16))
        >>> [group["lr"] for group in grouped]
        [0.0001, 0.0016]
        >>> optimizer = torch.optim.AdamW(grouped)
    """
    if any(isinstance(rate, Tensor) for rate in rates.values()):
        raise TypeError("rates: got tensors; torch's groups take one number for each leaf")
    if unknown := rates.keys() - params.keys():
        raise KeyError(f"rates: {sorted(unknown)[0]!r} is no key of the adapter")
    return [
        {
            "params": [params[key] for key, own in rates.items() if own == rate],
            "lr": rate,
            "weight_decay": weight_decay,
        }
        for rate in sorted({*rates.values()})
    ]

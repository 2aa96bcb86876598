"""VB-LoRA: LoRA factors made of vectors from one trained bank that all sites share.

    W' = W + B A,   each piece of a row of A, or of a column of B, is a mix of k vectors of the bank

The k largest logits of a piece choose the vectors; their softmax gives the weights.

*No identity at the start*: A and B are both mixes of the bank, which must not be zero. The outputs
of a layer change by under one per cent.

Asks of W: ``linear`` only.

References:
    https://arxiv.org/abs/2405.15179, eq. 4-6. Code: huggingface/peft ``tuners/vblora/layer.py``,
    leo-yangli/VB-LoRA.

Deviations: none in the mathematics. PEFT can store the k chosen logits alone, with which no
training goes on; such files are refused. There is no scale. The bank is a trained leaf under ``*``:
its gradient is the sum over all sites. The usual numbers are r = 4, 256 vectors of length 256 and
k = 2; learning rates are 1e-3 for the bank and 1e-2 for the logits.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from lora_func.checks import check_count, check_number
from lora_func.configs import DropoutConfig, RankConfig
from lora_func.numerics import dropout_leaf, dropout_setting
from lora_func.variant import PeftFormat, PeftLeaf, Trial, Variant
from lora_func.variants._factors import views_of
from lora_func.weights import Affine, Weight


@dataclass(frozen=True, kw_only=True)
class VBLoRA(DropoutConfig, RankConfig):
    """Vector-bank LoRA.

    Attributes:
        num_vectors: How many vectors the bank has.
        vector_length: Their length, which divides d_in and d_out of each site.
        topk: How many of them make a piece.
        bound: The bank starts from U(-bound, bound).
        logits_std: The standard deviation of the logits at the start.

    Examples:
        >>> import torch, lora_func as lf
        >>> cfg = lf.VBLoRA(r=2, num_vectors=9, vector_length=2)
        >>> params = lf.init(torch.nn.Sequential(torch.nn.Linear(4, 6)), cfg)
        >>> {key: tuple(leaf.shape) for key, leaf in lf.partition(params)[0].items()}
        {'*.vblora.bank': (9, 2), '0.vblora.logits_A': (2, 2, 9), '0.vblora.logits_B': (3, 2, 9)}
    """

    r: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    bound: float = 0.02
    logits_std: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_vectors", "vector_length", "topk"):
            check_count(name, getattr(self, name))
        for name in ("bound", "logits_std"):
            check_number(name, getattr(self, name), above=0)
        if self.topk > self.num_vectors:
            raise ValueError(f"topk: got {self.topk}, the bank has {self.num_vectors} vectors")


def shared(weights: Mapping[str, Weight], cfg: VBLoRA, generator: Generator) -> dict[str, Tensor]:
    """Draw the bank.

    Returns:
        bank (num_vectors, vector_length).
    """
    drawn = torch.empty(cfg.num_vectors, cfg.vector_length, dtype=torch.float32)
    return {"bank": drawn.uniform_(-cfg.bound, cfg.bound, generator=generator)}


def init(W: Weight, cfg: VBLoRA, generator: Generator, stats: None = None) -> dict[str, Tensor]:
    """Draw the logits.

    Returns:
        logits_A (r, d_in / vector_length, num_vectors), logits_B (d_out / vector_length, r,
        num_vectors), _chosen (topk,): 0 to topk - 1; _dropout () if there is any.

    Raises:
        ValueError: If vector_length does not divide the weight.
    """
    d_out, d_in = W.shape
    length = cfg.vector_length
    for name, size in (("d_in", d_in), ("d_out", d_out)):
        if size % length:
            raise ValueError(f"vector_length: {length} does not divide {name} = {size}")
    shapes = {
        "logits_A": (cfg.r, d_in // length, cfg.num_vectors),
        "logits_B": (d_out // length, cfg.r, cfg.num_vectors),
    }
    drawn = {
        leaf: cfg.logits_std * torch.randn(shape, generator=generator, dtype=torch.float32)
        for leaf, shape in shapes.items()
    }
    return {**drawn, "_chosen": torch.arange(cfg.topk), **dropout_leaf(cfg.dropout)}


def _mixed(params: Mapping[str, Tensor], leaf: str) -> Tensor:
    """The mixes that logits describe, shape (..., vector_length)."""
    logits, bank, k = params[leaf], params["bank"], params["_chosen"].shape[-1]
    top, chosen = logits.topk(k, -1)
    weights = torch.zeros_like(logits).scatter(-1, chosen, top.softmax(-1))
    return weights @ bank.unsqueeze(-3)


def _down(params: Mapping[str, Tensor]) -> Tensor:
    """A, shape (r, d_in)."""
    return _mixed(params, "logits_A").flatten(-2)


def _up(params: Mapping[str, Tensor]) -> Tensor:
    """B, shape (d_out, r)."""
    return _mixed(params, "logits_B").mT.flatten(-3, -2)


def _peft_settings(leaves: Mapping[str, Tensor], shape: tuple[int, int]) -> dict[str, Any]:
    r, pieces, num_vectors = leaves["logits_A"].shape
    return {
        "r": r,
        "num_vectors": num_vectors,
        "vector_length": shape[1] // pieces,
        "topk": len(leaves["_chosen"]),
        **dropout_setting("vblora_dropout", leaves),
    }


def _peft_constants(
    config: Mapping[str, Any], leaves: Mapping[str, Tensor], W: Affine
) -> dict[str, Tensor]:
    chosen = torch.arange(config["topk"], dtype=torch.float64)
    return {"_chosen": chosen, **dropout_leaf(config["vblora_dropout"])}


_PEFT = PeftFormat(
    "VBLORA",
    leaves={
        "logits_A": PeftLeaf("vblora_logits_A"),
        "logits_B": PeftLeaf("vblora_logits_B"),
    },
    settings=_peft_settings,
    constants=_peft_constants,
    defaults={
        "r": 4,
        "num_vectors": 256,
        "vector_length": 256,
        "topk": 2,
        "vblora_dropout": 0.0,
    },
    inert={"save_only_topk_weights": (None, False)},
    ignored=("init_vector_bank_bound", "init_logits_std"),
    shared={"bank": "base_model.vblora_vector_bank"},
    layers=("Linear", "Conv1D"),
)

VARIANT = Variant(
    name="vblora",
    config=VBLoRA,
    family="shared",
    init=init,
    shared=shared,
    leaves={
        "logits_A": "r d_in/length vectors",
        "logits_B": "d_out/length r vectors",
        "bank": "vectors length",
        "_chosen": "k",
        "_dropout?": "",
    },
    trials={
        "vblora": Trial(
            {"num_vectors": 64, "vector_length": 32},
            lr=1e-2,
            start="elsewhere",
            peft=("VBLoRAConfig", {"num_vectors": 64, "vector_length": 32}),
        )
    },
    **{**views_of(_down, _up), "peft": (_PEFT,)},
)

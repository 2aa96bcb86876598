"""GOFT and qGOFT: a tree of trained rotations of pairs of inputs, and a gain for each input.

    W' = W diag(1 + g) Rᵀ,   R = the product of d_in - 1 rotations of pairs (2sj, 2sj + s)

The strides s = 1, 2, 4, ... are the levels of a binary tree, of which the coarsest acts first.
GOFT trains an angle θ = π tanh(a) for each pair; qGOFT a matrix I + E of 2 x 2, without gains.

*Identity at the start because* a = 0, E = 0 and g = 0, and the input is x + x (R - I).

Asks of W: ``linear`` only. The levels below √d_in act in blocks, the others on the first entries of
the blocks, so that the whole tree is two products with small matrices.

References:
    https://arxiv.org/abs/2404.04316, section 3. Code: ArthurLeoM/peft-givens.

Deviations: the released code rotates every entry against its neighbour at all levels, where the
angles are those of pairs at a distance s; from the second level on that is no rotation, its
singular values go down to 2e-4. We follow the paper, so no checkpoint of that code is read. The
code never uses the weight of its penalty; ``orthogonality_penalty`` is a function of the adapter.
One tree reaches a part of all rotations: d_in - 1 of their dimensions. The learning rate is about
that of OFT.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from lora_func.configs import LinearConfig
from lora_func.numerics import at_least_float32, rotate_blocks, without_autocast
from lora_func.variant import Trial, Variant, prepared
from lora_func.weights import Weight, dense, linear

Leaves = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class GOFT(LinearConfig):
    """Givens-rotation orthogonal fine-tuning.

    Attributes:
        quasi: Whether each pair has a free matrix, which may leave the rotations (qGOFT).

    Examples:
        >>> import torch, lora_func as lf
        >>> params = lf.init(torch.nn.Sequential(torch.nn.Linear(8, 3)), lf.GOFT())
        >>> {key: tuple(leaf.shape) for key, leaf in params.items()}
        {'0.goft.angles': (7,), '0.goft.gains': (8,)}
    """

    quasi: bool = False

    @property
    def variant(self) -> str:
        """The name that belongs to the setting."""
        return "qgoft" if self.quasi else "goft"


def init(W: Weight, cfg: GOFT, generator: Generator, stats: None = None) -> dict[str, Tensor]:
    """Start without a rotation.

    Returns:
        angles (d_in - 1,) before tanh, level by level from the finest, and gains (d_in,); for qGOFT
        E (d_in - 1, 2, 2).

    Raises:
        ValueError: If there is one input alone, which has no pair.
    """
    _, d_in = W.shape
    if d_in < 2:
        raise ValueError("d_in = 1 has no pair to rotate; leave this layer out")
    if cfg.quasi:
        return {"E": torch.zeros(d_in - 1, 2, 2)}
    return {"angles": torch.zeros(d_in - 1), "gains": torch.zeros(d_in)}


def _pairs(params: Leaves) -> Sequence[Tensor]:
    """What each pair's matrix adds to the identity, row by row: four tensors (..., d_in - 1)."""
    if "E" in params:
        return at_least_float32(params["E"]).flatten(-2).unbind(-1)
    half = torch.pi / 2 * at_least_float32(params["angles"]).tanh()
    less, sine = -2 * half.sin().square(), (2 * half).sin()  # cos θ - 1 = -2 sin² (θ / 2)
    return less, -sine, sine, less


def _block(d_in: int) -> int:
    """The largest power of two up to √d_in that divides d_in."""
    b = 1
    while (2 * b) ** 2 <= d_in and d_in % (2 * b) == 0:
        b *= 2
    return b


def _tree(rows: Tensor, pairs: Sequence[Tensor]) -> Tensor:
    """Rotate rows (..., c) by the tree over c entries, the coarsest level first."""
    c = rows.shape[-1]
    if c == 1:
        return rows
    here = c // 2
    coarser = _tree(rows[..., ::2], [one[..., here:] for one in pairs])
    p, q = coarser[..., :here], rows[..., 1::2]
    pp, pq, qp, qq = (one[..., :here] for one in pairs)
    both = torch.stack([p + (pp * p + pq * q), q + (qp * p + qq * q)], -1).flatten(-2)
    return torch.cat([both, coarser[..., here:]], -1) if c % 2 else both


def prepare(params: Leaves, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    """Multiply the rotations of the fine levels in each block, and those of the coarse levels.

    Returns:
        fine (d_in / b, b, b), with the gains, and coarse (d_in / b, d_in / b), both without the
        identity.
    """
    d_in, b = shape[1], _block(shape[1])
    blocks, pairs = d_in // b, _pairs(params)
    finer, coarser = zip(*(_split(one, blocks, b) for one in pairs), strict=True)
    eye_b, eye = (torch.eye(n, dtype=pairs[0].dtype, device=pairs[0].device) for n in (b, blocks))
    with without_autocast(eye):
        coarse, fine = _tree(eye, coarser) - eye, _tree(eye_b, finer) - eye_b
    fine = fine.expand(*pairs[0].shape[:-1], blocks, b, b)
    if "gains" in params:
        gains = params["gains"].to(fine.dtype).reshape(*fine.shape[:-2], 1, b)
        fine = fine + (fine + eye_b) * gains
    return {"coarse": coarse.to(dtype), "fine": fine.to(dtype)}


def _split(pair: Tensor, blocks: int, b: int) -> tuple[Tensor, Tensor]:
    """The levels inside of the blocks (..., blocks, 1, b - 1), and those above (..., 1, rest)."""
    inside = [pair[..., None, :0].expand(*pair.shape[:-1], blocks, 0)]
    levels = b // 2
    while levels:
        here, pair = pair[..., : blocks * levels], pair[..., blocks * levels :]
        inside.append(here.reshape(*here.shape[:-1], blocks, levels))
        levels //= 2
    return torch.cat(inside, -1).unsqueeze(-2), pair.unsqueeze(-2)


def _coarse(x: Tensor, coarse: Tensor) -> Tensor:
    """Turn the first entries of the blocks of x (..., d_in)."""
    b = x.shape[-1] // coarse.shape[-1]
    added = x[..., ::b] @ coarse.to(x.dtype)
    return x + F.pad(added.unsqueeze(-1), (0, b - 1)).flatten(-2)


def apply(W: Weight, params: Leaves, x: Tensor) -> Tensor:
    """Rotate the input, then scale it.

    Returns:
        Shape (..., d_out).
    """
    if "coarse" not in params:
        params = prepared(prepare, params, W, x.dtype)
    turned = _coarse(x, params["coarse"])
    return linear(turned + rotate_blocks(turned, params["fine"]), W)


def weight(W: Weight, params: Leaves) -> Tensor:
    """Compute ``W diag(1 + g) Rᵀ``.

    Returns:
        Shape (d_out, d_in).
    """
    W = dense(W)
    rows = at_least_float32(W)
    made = prepared(prepare, params, W, rows.dtype)
    rows = rows + rotate_blocks(rows, made["fine"].mT)
    return _coarse(rows, made["coarse"].mT).to(W.dtype)


def orthogonality_penalty(params: Mapping[str, Tensor]) -> Tensor:
    """Compute ``Σ ‖Gᵀ G - I‖²`` over the matrices G = I + E of all pairs, the penalty of qGOFT.

    Args:
        params: An adapter, or a stack; other variants in it do not count.

    Returns:
        Shape (), or (K,) of a stack.

    Raises:
        ValueError: If no site is adapted by qGOFT.
    """
    found = [at_least_float32(leaf) for key, leaf in params.items() if key.endswith(".qgoft.E")]
    if not found:
        raise ValueError("params: no site is adapted by qGOFT")
    eye = torch.eye(2, dtype=found[0].dtype, device=found[0].device)
    apart = [((eye + E).mT @ (eye + E) - eye).square().sum((-3, -2, -1)) for E in found]
    return torch.stack(apart).sum(0)


def _variant(name: str, leaves: Mapping[str, str], settings: Mapping[str, bool]) -> Variant:
    return Variant(
        name=name,
        config=GOFT,
        family="orthogonal",
        init=init,
        apply=apply,
        prepare=prepare,
        weight=weight,
        leaves=leaves,
        trials={name: Trial(settings, lr=1e-2)},
        stacks=True,
    )


VARIANTS = (
    _variant("goft", {"angles": "pairs", "gains": "d_in"}, {}),
    _variant("qgoft", {"E": "pairs 2 2"}, {"quasi": True}),
)

"""C3A: a trained block-circulant matrix, applied by the fast Fourier transform.

    W' = W + Δ,   Δ[m, n][k, l] = w[m, n, (l - k) mod b] / d_in   in blocks of b x b

*Identity at the start because* w = 0, so the added term is exactly zero in every dtype.

Asks of W: ``linear`` only. Fourier transforms run in float32 or wider; per frequency the blocks are
mixed by a real matrix.

References:
    https://arxiv.org/abs/2407.19342, eq. 5. Code: huggingface/peft ``tuners/c3a/layer.py``.

Deviations: the paper and PEFT start with random kernels, which change the model; we start at zero,
where every gradient is alive, and give the authors' start as ``start="xavier_uniform"``. PEFT's
backward pass gives a wrong gradient of x (it correlates where it has to convolve), which we do not
follow. The usual block size is 256 or the width divided by a small number; the method has no scale.
Its learning rate is that of full fine-tuning times d_in, about 1e-1.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Generator, Tensor

from lora_func.checks import check_choice, check_count
from lora_func.configs import LinearConfig
from lora_func.numerics import at_least_float32, is_eager, without_autocast
from lora_func.variant import PeftFormat, PeftLeaf, Trial, Variant, prepared
from lora_func.weights import Weight, dense, linear


@dataclass(frozen=True, kw_only=True)
class C3A(LinearConfig):
    """Circular convolution adaptation.

    Attributes:
        block_size: Side of a block; divides d_in and d_out.
        start: "zeros", or the authors' "xavier_uniform", which changes the model from the start.

    Examples:
        >>> import torch, lora_func as lf
        >>> params = lf.init(torch.nn.Sequential(torch.nn.Linear(8, 4)), lf.C3A(block_size=4))
        >>> params["0.c3a.kernel"].shape
        torch.Size([1, 2, 4])
    """

    block_size: int = 256
    start: Literal["zeros", "xavier_uniform"] = "zeros"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("block_size", self.block_size)
        check_choice("start", self.start, ("zeros", "xavier_uniform"))


def init(W: Weight, cfg: C3A, generator: Generator, stats: None = None) -> dict[str, Tensor]:
    """Make a kernel for each block.

    Returns:
        kernel (d_out / b, d_in / b, b).

    Raises:
        ValueError: If the block size does not divide d_in and d_out.
    """
    (d_out, d_in), b = W.shape, cfg.block_size
    if d_in % b or d_out % b:
        raise ValueError(
            f"block_size = {b} does not divide d_in = {d_in} and d_out = {d_out}; choose a divisor"
        )
    kernel = torch.zeros(d_out // b, d_in // b, b)
    if cfg.start == "xavier_uniform":
        bound = (6 / (d_in + d_out)) ** 0.5
        kernel.uniform_(-bound, bound, generator=generator)
    return {"kernel": kernel}


def prepare(
    params: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Transform the kernels; for each frequency the complex products are one real matrix.

    Returns:
        mixer (b // 2 + 1, 2 d_in / b, 2 d_out / b), in float32 or wider.
    """
    kernel = at_least_float32(params["kernel"])
    kernel = kernel.to(torch.promote_types(kernel.dtype, dtype))
    d_in = kernel.shape[-1] * kernel.shape[-2]
    spectrum = torch.fft.rfft(kernel / d_in)
    real, imaginary = spectrum.real, -spectrum.imag  # a correlation: the conjugate
    of_real = torch.stack([real, imaginary], -1)
    of_imaginary = torch.stack([-imaginary, real], -1)
    both = torch.stack([of_real, of_imaginary], -1)  # (..., m, n, frequency, part out, part in)
    return {"mixer": rearrange(both, "... m n f o i -> ... f (n i) (m o)")}


def apply(W: Weight, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Compute ``linear(x, W)`` plus the correlations of the blocks of x with the kernels.

    Returns:
        Shape (..., d_out).
    """
    if "mixer" not in params:
        params = prepared(prepare, params, W, x.dtype)
    y, mixer, b = linear(x, W), params["mixer"], params["kernel"].shape[-1]
    if not x.numel():  # MKL transforms no empty tensors; the gradients are zeros
        return y + y * mixer.sum().to(y.dtype)
    if mixer.ndim == 3:  # one adapter is a stack of one
        mixer = mixer[None]
    with without_autocast(x):
        blocks = x.reshape(len(mixer), -1, x.shape[-1] // b, b).to(mixer.dtype)
        mix = _Mixed.apply if is_eager(blocks) else _mixed
        change: Tensor = mix(blocks, mixer).reshape(y.shape)
    return y + change.to(y.dtype)


def _mixed(blocks: Tensor, mixer: Tensor) -> Tensor:
    """Mix the blocks (K, n, blocks, b) in each frequency, and transform them back."""
    return _back(_transformed(blocks) @ mixer, blocks.shape[-1])


def _transformed(blocks: Tensor, norm: str = "backward") -> Tensor:
    """The real and imaginary parts for each frequency, (K, f, n, 2 blocks)."""
    parts: Tensor = rearrange(
        torch.view_as_real(torch.fft.rfft(blocks, norm=norm)), "K n i f part -> K f n (i part)"
    )
    return parts


def _back(mixed: Tensor, b: int, norm: str = "backward") -> Tensor:
    """Blocks (K, n, blocks, b) of their real and imaginary parts for each frequency."""
    parts = rearrange(mixed, "K f n (o part) -> K n o f part", part=2)
    blocks: Tensor = torch.fft.irfft(torch.view_as_complex(parts.contiguous()), n=b, norm=norm)
    return blocks


class _Mixed(torch.autograd.Function):
    """``_mixed``, whose gradient with respect to the blocks has the same form."""

    @staticmethod
    def forward(ctx: Any, blocks: Tensor, mixer: Tensor) -> Tensor:
        ctx.save_for_backward(blocks, mixer)
        return _mixed(blocks, mixer)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor]:
        blocks, mixer = ctx.saved_tensors
        b, of_blocks = blocks.shape[-1], None
        parts = _transformed(gradient, "forward")
        if ctx.needs_input_grad[0]:
            of_blocks = _back(parts @ mixer.mT, b, "forward")
        of_mixer = _transformed(blocks).mT @ parts
        of_mixer[:, 1 : (b + 1) // 2].mul_(2)  # each of these frequencies stands for two
        return of_blocks, of_mixer


def weight(W: Weight, params: Mapping[str, Tensor]) -> Tensor:
    """Compute ``W + Δ``.

    Returns:
        Shape (d_out, d_in).
    """
    W, kernel = dense(W), params["kernel"]
    b = torch.arange(kernel.shape[-1], device=kernel.device)
    blocks = kernel[..., (b - b[:, None]) % len(b)] / W.shape[-1]
    change: Tensor = rearrange(blocks, "... m n k l -> ... (m k) (n l)")
    return W + change.to(W.dtype)


def delta_norm(params: Mapping[str, Tensor], shape: tuple[int, int] | None) -> Tensor:
    """Compute the norm of Δ, in which each number of a kernel stands b times.

    Returns:
        Shape ().
    """
    kernel = params["kernel"].double()
    _, n, b = kernel.shape[-3:]
    norm: Tensor = torch.linalg.vector_norm(kernel, dim=(-3, -2, -1))
    return norm * math.sqrt(b) / (n * b)


VARIANT = Variant(
    name="c3a",
    config=C3A,
    family="spectral",
    init=init,
    apply=apply,
    prepare=prepare,
    weight=weight,
    delta_norm=delta_norm,
    leaves={"kernel": "d_out/b d_in/b b"},
    neutral={"kernel": 0.0},
    peft=(
        PeftFormat(
            "C3A",
            leaves={"kernel": PeftLeaf("c3a_kernel")},
            settings=lambda leaves, shape: {"block_size": leaves["kernel"].shape[-1]},
            patterns={"block_size": "block_size_pattern"},
            defaults={"block_size": 256},
            ignored=("init_weights",),
        ),
    ),
    trials={"c3a": Trial({"block_size": 64}, lr=1e-1, peft=("C3AConfig", {"block_size": 64}))},
    stacks=True,
)

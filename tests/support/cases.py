"""The table of cases. Every law runs on every case; a new variant adds its rows here."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora_func as lf
from lora_func.adapter import parse
from lora_func.configs import AdapterConfig
from lora_func.variants import by_config
from lora_func.variants._template import Template
from lora_func.weights import Affine, Weight, affine, dense


@dataclass(frozen=True)
class Case:
    """One configuration of one variant.

    Attributes:
        name: Shown as the test's id.
        config: Builds the config from a rank (ignored by methods without a rank).
        dead: Leaves whose gradient is exactly zero at initialization, by the formula.
        bias: True if the layer needs a bias, False if it must have none, None if both work.
        fit: Maps any (d_in, d_out, r) to sizes that the config accepts.
        data: The calibration data: "inputs", "gradients", "pairs" or None.
        start: Initial output relative to the base: "exact", "close" (8 eps) or "elsewhere".
        jumps: True if the first optimizer step has a fixed size, whatever the learning rate.
    """

    name: str
    config: Callable[[int], AdapterConfig]
    dead: frozenset[str] = field(default_factory=frozenset)
    bias: bool | None = None
    fit: Callable[[int, int, int], tuple[int, int, int]] = lambda d_in, d_out, r: (d_in, d_out, r)
    data: str | None = None
    start: str = "exact"
    jumps: bool = False

    @property
    def variant(self) -> lf.Variant:
        """The variant of this case's config."""
        return by_config(self.config(2))

    @property
    def is_adapter(self) -> bool:
        """True if the variant adapts layers; False if it trains the parameters directly."""
        return self.variant.parameters is None

    @property
    def has_weight(self) -> bool:
        """True if the variant is linear in x, so that it has a weight view."""
        return self.variant.weight is not None

    def __repr__(self) -> str:
        return self.name


A = frozenset({"A"})
TWICE = {"fit": lambda d_in, d_out, r: (2 * d_in, 2 * d_out, 2 * r)}
WIDE = {"fit": lambda d_in, d_out, r: (d_in + 1, d_out + 1, r)}
WIDE_RANK = {"fit": lambda d_in, d_out, r: (d_in + 1, d_out + 1, r + 1)}
EVEN = {"fit": lambda d_in, d_out, r: (d_in + 1, d_out, 2 * r)}
SPARSE = {"fit": lambda d_in, d_out, r: (d_in + 2, d_out + 2, 1)}

CASES = [
    *(
        Case(
            f"antipasto-{basis}",
            lambda r, b=basis: lf.AntiPaSTO(r=r, block_size=2, rotate=b),
            **TWICE,
        )
        for basis in ("V", "U", "none")
    ),
    Case(
        "antipasto-data",
        lambda r: lf.AntiPaSTO(r=r, block_size=2, coeff=-0.7),
        data="inputs",
        **TWICE,
    ),
    Case("bitfit", lambda r: lf.BitFit(), bias=True),
    Case("bitfit-new", lambda r: lf.BitFit(allow_new_bias=True), bias=False),
    Case("delora", lambda r: lf.DeLoRA(r=r), dead=frozenset({"A", "lambda"}), jumps=True, **WIDE),
    Case(
        "delora-copy",
        lambda r: lf.DeLoRA(r=r, init="frozen_copy"),
        dead=frozenset({"lambda"}),
        **WIDE,
    ),
    Case("dora", lambda r: lf.DoRA(r=r, alpha=3.0), dead=A),
    Case("eva", lambda r: lf.EVA(r=r), dead=A, data="inputs"),
    Case("full", lambda r: lf.Full(target_parameters=".*")),
    Case("full-weight", lambda r: lf.Full(target_parameters="weight")),
    Case("full-bias", lambda r: lf.Full(target_parameters="bias"), bias=True),
    Case("hra", lambda r: lf.HRA(r=r), start="close", **EVEN),
    Case("ia3", lambda r: lf.IA3()),
    Case("ia3_ff", lambda r: lf.IA3FF()),
    Case("lora", lambda r: lf.LoRA(r=r), dead=A),
    Case("lora-alpha", lambda r: lf.LoRA(r=r, alpha=3.0), dead=A),
    Case("rslora", lambda r: lf.LoRA(r=r, alpha=5.0, rslora=True), dead=A),
    Case("oft", lambda r: lf.OFT(block_size=2), **TWICE),
    Case("oft-neumann", lambda r: lf.OFT(block_size=2, neumann_terms=5), **TWICE),
    Case("pissa", lambda r: lf.PiSSA(r=r)),
    Case("pissa-fast", lambda r: lf.PiSSA(r=r, niter=2, alpha=3.0)),
    *(Case(f"road{k}", lambda r, k=k: lf.ROAD(kind=k, group_size=2), **TWICE) for k in (1, 2, 4)),
    Case("shira", lambda r: lf.SHiRA(r=r), **SPARSE),
    Case("shira-magnitude", lambda r: lf.SHiRA(r=r, mask="magnitude"), **SPARSE),
    Case("shira-snip", lambda r: lf.SHiRA(r=r, mask="snip"), data="gradients", **SPARSE),
    Case("ssteer", lambda r: lf.SSteer(r=r)),
    Case("ssteer-data", lambda r: lf.SSteer(coeff=0.5), data="pairs", start="elsewhere"),
    Case("ssteer-exp", lambda r: lf.SSteer(mode="exp", r=r)),
    Case("ssteer-add", lambda r: lf.SSteer(mode="add"), data="pairs", start="elsewhere", **WIDE),
    Case("ssteer-ablate", lambda r: lf.SSteer(mode="ablate", r=r), data="pairs", start="elsewhere"),
    Case("ssvd", lambda r: lf.SSVD(r=r), **WIDE_RANK),
    Case("ssvd-strict", lambda r: lf.SSVD(r=r, orthogonality="strict"), **WIDE_RANK),
    Case("template", lambda r: Template(r=r), dead=frozenset({"A", "g"})),
    Case("vera", lambda r: lf.VeRA(r=r), dead=frozenset({"lambda_d"})),
]


@dataclass(frozen=True)
class Layer:
    """A linear layer and a case's adapter, as arguments for the variant's functions."""

    module: nn.Linear
    W: Affine
    variant: lf.Variant
    leaves: dict[str, Tensor]
    x: Tensor
    r: int

    @property
    def trained(self) -> dict[str, Tensor]:
        return {name: leaf for name, leaf in self.leaves.items() if not name.startswith("_")}

    def weight(self, W: Weight) -> Tensor:
        """The adapted weight, or the frozen weight if the variant has no weight view."""
        return self.variant.weight(W, self.leaves) if self.variant.weight else dense(W)

    def apply(self, leaves: dict[str, Tensor] | None = None, x: Tensor | None = None) -> Tensor:
        return self.variant.apply(
            self.W,
            self.leaves if leaves is None else self.leaves | leaves,
            self.x if x is None else x,
        )

    @property
    def bias(self) -> Tensor | None:
        return self.variant.bias(self.W.bias, self.leaves) if self.variant.bias else self.W.bias


class Layers(nn.ModuleDict):
    """Parallel layers; each has its own input."""

    def forward(self, **inputs: Tensor) -> Tensor:
        return torch.cat([self[name](x).flatten() for name, x in inputs.items()])


def make_params(case: Case, module: nn.Linear | Layers, r: int, **settings: object) -> lf.Params:
    """Make a case's adapter, calibrated on random data if the case needs data."""

    def batch(seed: int) -> Tensor | dict[str, Tensor]:
        if isinstance(module, Layers):
            return {name: inputs(layer, seed) for name, layer in module.items()}
        return inputs(module, seed)

    def inputs(layer: nn.Linear, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        shape = torch.empty(4, 5, layer.in_features, dtype=layer.weight.dtype)
        return random_like(shape, generator) + seed

    pairs = case.data == "pairs"
    data = [(batch(1), batch(0)) if pairs else batch(seed) for seed in range(2)]
    return lf.init(
        module,
        case.config(r),
        data=data if case.data else None,
        loss_fn=lambda y, _: y.double().square().sum(),
        **settings,
    )


def random_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)


def make_layer(
    case: Case,
    d_in: int = 6,
    d_out: int = 5,
    r: int = 2,
    bias: bool = True,
    batch: tuple[int, ...] = (3,),
    seed: int = 0,
    scrambled: bool = False,
    dtype: torch.dtype = torch.float64,
    leaf_dtype: torch.dtype | None = None,
) -> Layer:
    """Make a random layer with a case's adapter, freshly initialized or with random leaves."""
    generator = torch.Generator().manual_seed(seed)
    d_in, d_out, r = case.fit(d_in, d_out, r)
    module = nn.Linear(d_in, d_out, bias=bias if case.bias is None else case.bias)
    module.to(dtype).requires_grad_(False)
    for parameter in module.parameters():
        parameter.copy_(random_like(parameter, generator))
    cfg = case.config(r)
    params = make_params(case, module, r, seed=seed, dtype=leaf_dtype or dtype)
    leaves = {parse(key).leaf: leaf.detach() for key, leaf in params.items()}
    if scrambled:
        leaves |= {
            name: random_like(leaf, generator)
            for name, leaf in leaves.items()
            if not name.startswith("_")
        }
    x = torch.randn(*batch, d_in, generator=generator, dtype=torch.float64).to(dtype)
    return Layer(module, affine(module), by_config(cfg), leaves, x, r)


def scrambled_stack(layer, adapters, seed):
    """Adapters with random trained leaves, as a list and as a stack."""
    generator = torch.Generator().manual_seed(seed)
    many = [
        {**layer.leaves, **{k: random_like(v, generator) for k, v in layer.trained.items()}}
        for _ in range(adapters)
    ]
    return many, {name: torch.stack([leaves[name] for leaves in many]) for name in layer.leaves}


class Made(TorchDispatchMode):
    """Records the size of every tensor that an operation allocates; views are not counted."""

    def __init__(self, *known):
        super().__init__()
        self.sizes, self.alive = [], []
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage().data_ptr()
                if storage not in self.known:
                    self.known.add(storage)
                    self.sizes.append(tensor.numel())
                self.alive.append(tensor)
        return result

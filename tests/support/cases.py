"""The table of cases. Every law runs on every case; a new variant adds its rows here."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lora_func as lf
from lora_func.testing import Case
from lora_func.variants._template import Template

A = frozenset({"A"})
TWICE = {"fit": lambda d_in, d_out, r: (2 * d_in, 2 * d_out, 2 * r)}
FOUR_TIMES = {"fit": lambda d_in, d_out, r: (4 * d_in, 4 * d_out, r)}
TALL = {"fit": lambda d_in, d_out, r: (d_in, 8 * d_out, r)}
WIDE = {"fit": lambda d_in, d_out, r: (d_in + 1, d_out + 1, r)}
WIDER = {"fit": lambda d_in, d_out, r: (d_in + 3, d_out + 3, r)}
WIDE_RANK = {"fit": lambda d_in, d_out, r: (d_in + 1, d_out + 1, r + 1)}
WIDE_RANK_LESS = {"fit": lambda d_in, d_out, r: (d_in + 1, d_out + 1, min(r, d_in, d_out))}
HALF_RANK = {"fit": lambda d_in, d_out, r: (2 * d_in, 2 * d_out, r)}
EVEN = {"fit": lambda d_in, d_out, r: (d_in + 1, d_out, 2 * r)}
LOCATED = {"fit": lambda d_in, d_out, r: (d_in + 2, d_out + 2, min(r, 3))}
SPARSE = {"fit": lambda d_in, d_out, r: (d_in + 2, d_out + 2, 1)}

CASES = [
    Case("adalora", lambda r: lf.AdaLoRA(r=r), dead=frozenset("AB")),
    *(
        Case(
            f"antipasto-{basis}",
            lambda r, b=basis: lf.AntiPaSTO(r=r, block_size=2, rotate=b),
            **TWICE,
        )
        for basis in ("V", "U", "both", "none")
    ),
    Case(
        "antipasto-data",
        lambda r: lf.AntiPaSTO(r=r, block_size=2, coeff=-0.7),
        data="inputs",
        **TWICE,
    ),
    *(
        Case(f"bdlora-{side}", lambda r, s=side: lf.BDLoRA(r=r, side=s), dead=A, **TWICE)
        for side in "AB"
    ),
    Case("bitfit", lambda r: lf.BitFit(), bias=True),
    Case("bitfit-new", lambda r: lf.BitFit(allow_new_bias=True), bias=False),
    Case("boft", lambda r: lf.BOFT(block_size=2), **TWICE),
    Case("boft-factors", lambda r: lf.BOFT(block_size=2, factors=2), **FOUR_TIMES),
    Case("c3a", lambda r: lf.C3A(block_size=4), **FOUR_TIMES),
    Case(
        "c3a-xavier",
        lambda r: lf.C3A(block_size=4, start="xavier_uniform"),
        start="elsewhere",
        **FOUR_TIMES,
    ),
    Case("clover", lambda r: lf.CLOVER(head_dim=2), refuses_zero_rows=True, **TWICE),
    Case("clover-free", lambda r: lf.CLOVER(head_dim=2, core="free"), **TWICE),
    # relu has a kink, across which finite differences see both sides
    Case("deft", lambda r: lf.DeFT(r=r, alpha=3.0), detached=frozenset("P"), **TALL),
    Case("deft-qr", lambda r: lf.DeFT(r=r, method="qr"), **TALL),
    Case("para", lambda r: lf.DeFT(r=r, method="qr", para=True), start="elsewhere", **TALL),
    Case("delora", lambda r: lf.DeLoRA(r=r), dead=frozenset({"A", "lambda"}), jumps=True, **WIDE),
    Case(
        "delora-copy",
        lambda r: lf.DeLoRA(r=r, init="frozen_copy"),
        dead=frozenset({"lambda"}),
        **WIDE,
    ),
    Case("dora", lambda r: lf.DoRA(r=r, alpha=3.0), dead=A, detached=A | {"B"}),
    Case("ether-plus", lambda r: lf.ETHERPlus(blocks=2), **FOUR_TIMES),
    Case("ether-plus-one-sided", lambda r: lf.ETHERPlus(two_sided=False), **WIDE),
    Case("eva", lambda r: lf.EVA(r=r), dead=A, data="inputs"),
    Case("fourierft", lambda r: lf.FourierFT(n_frequency=4 + r), **LOCATED),
    Case("full", lambda r: lf.Full(target_parameters=".*")),
    Case("full-weight", lambda r: lf.Full(target_parameters="weight")),
    Case("full-bias", lambda r: lf.Full(target_parameters="bias"), bias=True),
    Case("goft", lambda r: lf.GOFT(), **FOUR_TIMES),
    Case("qgoft", lambda r: lf.GOFT(quasi=True), **TWICE),
    Case("gralora", lambda r: lf.GraLoRA(r=r), dead=A, **TWICE),
    Case(
        "gralora-hybrid",
        lambda r: lf.GraLoRA(r=r, hybrid_r=1, alpha=3.0),
        dead=frozenset({"A", "A_general"}),
        **TWICE,
    ),
    Case("hira", lambda r: lf.HiRA(r=r), dead=A),
    Case("hra", lambda r: lf.HRA(r=r), start="close", **EVEN),
    Case("ia3", lambda r: lf.IA3()),
    Case("ia3_ff", lambda r: lf.IA3FF()),
    Case("kasa", lambda r: lf.KaSA(r=r), dead=A | {"d"}, start="elsewhere", **WIDE_RANK_LESS),
    Case("loha", lambda r: lf.LoHa(r=r), dead=frozenset({"A1", "B1", "B2"})),
    Case(
        "lokr",
        lambda r: lf.LoKr(r=r, decompose_factor=2),
        dead=frozenset({"w2_a", "w2_b"}),
        fit=lambda d_in, d_out, r: (16 * d_in, 16 * d_out, min(r, 3)),
    ),
    Case("lokr-whole", lambda r: lf.LoKr(r=9), dead=frozenset({"w2"})),
    Case(
        "lokr-both",
        lambda r: lf.LoKr(r=1, alpha=3.0, decompose_both=True, decompose_factor=4, zero="w2"),
        dead=frozenset({"w1_a", "w1_b", "w2_a"}),
        fit=lambda d_in, d_out, r: (16 * d_in, 16, 1),
    ),
    Case("lora", lambda r: lf.LoRA(r=r), dead=A),
    Case("lora-bias", lambda r: lf.LoRA(r=r, alpha=3.0, bias=True), dead=A),
    Case("loreft", lambda r: lf.LoReFT(r=r), **TALL),
    Case("lora_xs", lambda r: lf.LoRAXS(r=r)),
    Case("lora-alpha", lambda r: lf.LoRA(r=r, alpha=3.0), dead=A),
    # relu has a kink, as in DeFT, and needs some width to be alive
    Case("peanut", lambda r: lf.PEANuT(r=r + 12, scaling=2.0), dead=A, detached=A, **WIDER),
    Case(
        "peanut-deep",
        lambda r: lf.PEANuT(r=r + 12, depth=1, scaling=0.5),
        dead=A | {*"ED"},
        detached=A | {*"ED"},
        **WIDER,
    ),
    Case("psoft", lambda r: lf.PSOFT(r=r), **WIDE_RANK),
    Case("psoft-rotation", lambda r: lf.PSOFT(r=r, gains=False), **WIDE_RANK),
    Case("randlora", lambda r: lf.RandLoRA(r=r, alpha=1.0), dead=frozenset({"gamma"}), **WIDE),
    Case(
        "randlora-sparse",
        lambda r: lf.RandLoRA(r=r, alpha=3.0, bases="sparse"),
        dead=frozenset({"gamma"}),
        # most entries of a sparse base are zero: narrow ones can be zero altogether
        fit=lambda d_in, d_out, r: (8 * d_in, 8 * d_out, 2 * r),
    ),
    Case("rslora", lambda r: lf.LoRA(r=r, alpha=5.0, rslora=True), dead=A),
    Case("olora", lambda r: lf.OLoRA(r=r, alpha=3.0)),
    Case("mica", lambda r: lf.MiCA(r=r, alpha=3.0)),
    Case("lora-one", lambda r: lf.LoRAOne(r=r), data="gradients", start="elsewhere"),
    Case("miss", lambda r: lf.MiSS(r=r)),
    Case("miss-mini", lambda r: lf.MiSS(r=r, form="mini", mini_r=2), **TWICE),
    Case(
        "miss-bat",
        lambda r: lf.MiSS(r=2, form="bat"),
        fit=lambda d_in, d_out, r: (2 * d_in, 2 * d_out, 2),
    ),
    Case("oft", lambda r: lf.OFT(block_size=2), **TWICE),
    Case("oft-share", lambda r: lf.OFT(block_size=2, share=True, coft=9), **TWICE),
    Case("oft-neumann", lambda r: lf.OFT(block_size=2, neumann_terms=5), **TWICE),
    Case("pissa", lambda r: lf.PiSSA(r=r)),
    Case("pissa-fast", lambda r: lf.PiSSA(r=r, niter=2, alpha=3.0)),
    *(Case(f"road{k}", lambda r, k=k: lf.ROAD(kind=k, group_size=2), **TWICE) for k in (1, 2, 4)),
    *(
        Case(
            f"sablate-{basis}",
            lambda r, b=basis: lf.SAblate(r=r, basis=b, coeff=0.7),
            dead=frozenset({"C"}),
            data="inputs" if basis != "svd" else None,
            **WIDE_RANK,
        )
        for basis in ("svd", "corda")
    ),
    *(
        Case(f"sgain-{side}", lambda r, s=side: lf.SGain(r=r, side=s, coeff=0.7))
        for side in ("out", "in")
    ),
    Case("sgain-asvd", lambda r: lf.SGain(r=r, basis="asvd", suppress_only=True), data="inputs"),
    Case("sgain-dplr", lambda r: lf.SGain(r=r, k=1), dead=A),
    Case("shira", lambda r: lf.SHiRA(r=r), **SPARSE),
    Case("shira-magnitude", lambda r: lf.SHiRA(r=r, mask="magnitude"), **SPARSE),
    Case("shira-snip", lambda r: lf.SHiRA(r=r, mask="snip"), data="gradients", **SPARSE),
    Case("svft", lambda r: lf.SVFT(r=r)),
    Case("svft-band", lambda r: lf.SVFT(r=r, band=1), **WIDE_RANK),
    Case("ssteer", lambda r: lf.SSteer(r=r)),
    Case("ssteer-data", lambda r: lf.SSteer(coeff=0.5), data="pairs", start="elsewhere"),
    Case("ssteer-exp", lambda r: lf.SSteer(mode="exp", r=r)),
    Case("ssteer-add", lambda r: lf.SSteer(mode="add"), data="pairs", start="elsewhere", **WIDE),
    Case("ssteer-ablate", lambda r: lf.SSteer(mode="ablate", r=r), data="pairs", start="elsewhere"),
    Case("ssvd", lambda r: lf.SSVD(r=r), **WIDE_RANK),
    Case("ssvd-strict", lambda r: lf.SSVD(r=r, orthogonality="strict"), **WIDE_RANK),
    Case("template", lambda r: Template(r=r), dead=frozenset({"A", "g"})),
    Case("waveft", lambda r: lf.WaveFT(n_frequency=4 + r, scaling=3.0), **LOCATED),
    Case("waveft-entries", lambda r: lf.WaveFT(n_frequency=4 + r, wavelet=None), **LOCATED),
    Case("waveft-sym4", lambda r: lf.WaveFT(n_frequency=4 + r, wavelet="sym4"), **LOCATED),
    *(
        Case(f"tinylora{'-tied' * tied}", lambda r, t=tied: lf.TinyLoRA(r=r, u=3, tied=t))
        for tied in (False, True)
    ),
    Case("tied-lora", lambda r: lf.TiedLoRA(r=r, alpha=3.0), dead=A),
    Case(
        "vblora",
        lambda r: lf.VBLoRA(r=r, num_vectors=4, vector_length=2),
        start="elsewhere",
        **TWICE,
    ),
    Case("vera", lambda r: lf.VeRA(r=r), dead=frozenset({"lambda_d"})),
]

OF_STARTS = [
    Case("lora-gaussian", lambda r: lf.LoRA(r=r, start="gaussian"), dead=A),
    Case("lora-orthogonal", lambda r: lf.LoRA(r=r, start="orthogonal"), start="close", **TWICE),
    Case("milora", lambda r: lf.MiLoRA(r=r, alpha=3.0)),
    *(
        Case(
            f"corda-{method}",
            lambda r, m=method: lf.CorDA(r=r, method=m, root=m == "kpm"),
            data="inputs",
        )
        for method in ("ipm", "kpm")
    ),
    Case("lora-ga", lambda r: lf.LoRAGA(r=r), data="gradients", **HALF_RANK),
    Case(
        "lora-ga-peft",
        lambda r: lf.LoRAGA(r=r, direction="random", scale_by="weight_svd", peft_compat=True),
        data="gradients",
        **HALF_RANK,
    ),
    Case("lora-one-start", lambda r: lf.LoRAOne(r=r, step=False), data="gradients"),
]
"""For the laws alone: after the start they are "lora", "olora" and "lora-one"."""

OF_TOKENS = [
    Case(
        "trainable-tokens",
        lambda r: lf.TrainableTokens(token_ids=tuple(range(r)), target_modules=".*"),
    )
]
"""For the laws alone: the sites of this config are tables and heads, not the layers of a model."""


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

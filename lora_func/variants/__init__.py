"""The methods, one file each, and the table that lists them.

A file holds the config, the functions and the ``Variant`` of one method. Mathematics that several
methods share belongs to ``numerics``. ``register`` adds a method from another package.
"""

from lora_func.variants import (
    _registry,
    adalora,
    antipasto,
    bdlora,
    bitfit,
    boft,
    c3a,
    clover,
    corda,
    deft,
    delora,
    dora,
    ether_plus,
    eva,
    fourierft,
    full,
    goft,
    gralora,
    hira,
    hra,
    ia3,
    ia3_ff,
    kasa,
    loha,
    lokr,
    lora,
    lora_bias,
    lora_ga,
    lora_one,
    lora_xs,
    loreft,
    mica,
    milora,
    miss,
    oft,
    olora,
    peanut,
    pissa,
    psoft,
    randlora,
    road,
    sablate,
    sgain,
    shira,
    ssteer,
    ssvd,
    svft,
    tied_lora,
    tinylora,
    trainable_tokens,
    vblora,
    vera,
    waveft,
)
from lora_func.variants._registry import register
from lora_func.variants.adalora import AdaLoRA
from lora_func.variants.antipasto import AntiPaSTO
from lora_func.variants.bdlora import BDLoRA
from lora_func.variants.bitfit import BitFit
from lora_func.variants.boft import BOFT
from lora_func.variants.c3a import C3A
from lora_func.variants.clover import CLOVER
from lora_func.variants.corda import CorDA
from lora_func.variants.deft import DeFT
from lora_func.variants.delora import DeLoRA
from lora_func.variants.dora import DoRA
from lora_func.variants.ether_plus import ETHERPlus
from lora_func.variants.eva import EVA
from lora_func.variants.fourierft import FourierFT
from lora_func.variants.full import Full
from lora_func.variants.goft import GOFT
from lora_func.variants.gralora import GraLoRA
from lora_func.variants.hira import HiRA
from lora_func.variants.hra import HRA
from lora_func.variants.ia3 import IA3
from lora_func.variants.ia3_ff import IA3FF
from lora_func.variants.kasa import KaSA
from lora_func.variants.loha import LoHa
from lora_func.variants.lokr import LoKr
from lora_func.variants.lora import LoRA
from lora_func.variants.lora_ga import LoRAGA
from lora_func.variants.lora_one import LoRAOne
from lora_func.variants.lora_xs import LoRAXS
from lora_func.variants.loreft import LoReFT
from lora_func.variants.mica import MiCA
from lora_func.variants.milora import MiLoRA
from lora_func.variants.miss import MiSS
from lora_func.variants.oft import OFT
from lora_func.variants.olora import OLoRA
from lora_func.variants.peanut import PEANuT
from lora_func.variants.pissa import PiSSA
from lora_func.variants.psoft import PSOFT
from lora_func.variants.randlora import RandLoRA
from lora_func.variants.road import ROAD
from lora_func.variants.sablate import SAblate
from lora_func.variants.sgain import SGain
from lora_func.variants.shira import SHiRA
from lora_func.variants.ssteer import SSteer
from lora_func.variants.ssvd import SSVD
from lora_func.variants.svft import SVFT
from lora_func.variants.tied_lora import TiedLoRA
from lora_func.variants.tinylora import TinyLoRA
from lora_func.variants.trainable_tokens import TrainableTokens
from lora_func.variants.vblora import VBLoRA
from lora_func.variants.vera import VeRA
from lora_func.variants.waveft import WaveFT

__all__ = [
    "BOFT",
    "C3A",
    "CLOVER",
    "EVA",
    "GOFT",
    "HRA",
    "IA3",
    "IA3FF",
    "OFT",
    "PSOFT",
    "ROAD",
    "SSVD",
    "SVFT",
    "AdaLoRA",
    "AntiPaSTO",
    "BDLoRA",
    "BitFit",
    "CorDA",
    "DeFT",
    "DeLoRA",
    "DoRA",
    "ETHERPlus",
    "FourierFT",
    "Full",
    "GraLoRA",
    "HiRA",
    "KaSA",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoRAGA",
    "LoRAOne",
    "LoRAXS",
    "LoReFT",
    "MiCA",
    "MiLoRA",
    "MiSS",
    "OLoRA",
    "PEANuT",
    "PiSSA",
    "RandLoRA",
    "SAblate",
    "SGain",
    "SHiRA",
    "SSteer",
    "TiedLoRA",
    "TinyLoRA",
    "TrainableTokens",
    "VBLoRA",
    "VeRA",
    "WaveFT",
    "register",
]

_TABLE = (
    adalora.VARIANT,
    antipasto.VARIANT,
    *bdlora.VARIANTS,
    bitfit.VARIANT,
    boft.VARIANT,
    c3a.VARIANT,
    clover.VARIANT,
    corda.VARIANT,
    *deft.VARIANTS,
    delora.VARIANT,
    dora.VARIANT,
    ether_plus.VARIANT,
    eva.VARIANT,
    fourierft.VARIANT,
    full.VARIANT,
    *goft.VARIANTS,
    gralora.VARIANT,
    hira.VARIANT,
    hra.VARIANT,
    ia3.VARIANT,
    ia3_ff.VARIANT,
    kasa.VARIANT,
    loha.VARIANT,
    lokr.VARIANT,
    lora.VARIANT,
    lora_bias.VARIANT,
    lora_ga.VARIANT,
    *lora_one.VARIANTS,
    lora_xs.VARIANT,
    loreft.VARIANT,
    mica.VARIANT,
    milora.VARIANT,
    *miss.VARIANTS,
    oft.VARIANT,
    olora.VARIANT,
    peanut.VARIANT,
    pissa.VARIANT,
    psoft.VARIANT,
    randlora.VARIANT,
    *road.VARIANTS,
    sablate.VARIANT,
    *sgain.VARIANTS,
    shira.VARIANT,
    *ssteer.VARIANTS,
    ssvd.VARIANT,
    svft.VARIANT,
    tied_lora.VARIANT,
    *tinylora.VARIANTS,
    trainable_tokens.VARIANT,
    vblora.VARIANT,
    vera.VARIANT,
    waveft.VARIANT,
)

all_variants, registered = _registry.all_variants, _registry.registered
by_config, by_name = _registry.by_config, _registry.by_name

for _variant in _TABLE:
    register(_variant)

"""A small random model of each architecture, with a batch and an adapter on every layer."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForTokenClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import lora_func as lf
from tests.support.models import SIZES, VOCABULARY, WIDTHS, bert, gpt2, qwen3, scramble

DECODER = {
    **SIZES,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}
EXPERTS = ("experts", r"mlp\.gate\.weight")


def text(rows: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """Random tokens for language modelling; one row is padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, 10), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def unpadded(rows: int = 3, seed: int = 0) -> dict[str, Tensor]:
    ids = text(rows, seed)["input_ids"]
    return {"input_ids": ids, "labels": ids}


def of_class(rows: int = 3, seed: int = 0) -> dict[str, Tensor]:
    return text(rows, seed) | {"labels": torch.arange(rows) % 3}


def of_tokens(rows: int = 3, seed: int = 0) -> dict[str, Tensor]:
    batch = text(rows, seed)
    return batch | {"labels": batch["labels"].clamp(max=2)}


def pairs(rows: int = 3, seed: int = 0) -> dict[str, Tensor]:
    batch = text(rows, seed)
    return batch | {"labels": batch["input_ids"][:, :6].contiguous()}


def images(rows: int = 3, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(rows, 3, 8, 8, generator=generator)
    return {"pixel_values": pixels, "labels": torch.arange(rows) % 3}


def speech(rows: int = 3, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, 8, 16, generator=generator)
    return {"input_features": features, "labels": pairs(rows, seed)["labels"]}


class CNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 2, stride=2, groups=2),
            nn.BatchNorm2d(8),
            nn.Flatten(),
            nn.Linear(8 * 16, 3),
        )

    def forward(self, pixel_values: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.layers(pixel_values), labels, reduction="none")


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(32, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        hidden = self.encoder(self.embed(input_ids), src_key_padding_mask=attention_mask == 0)
        logits = self.head(hidden[:, 0])
        return nn.functional.cross_entropy(logits, labels, reduction="none")


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        model: Builds the model.
        batch: Makes a batch, given the number of rows and a seed.
        modules: Target modules in addition to the linear layers.
        parameters: Target parameters.
        exclude: Linear layers to exclude.
        unfoldable: Why several adapters of this model cannot share one call; None if they can.
        loss_fn: The loss, for a model that returns none.
    """

    model: Callable[[], nn.Module]
    batch: Callable[..., dict[str, Tensor]] = text
    modules: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    unfoldable: str | None = None
    loss_fn: Callable[[Tensor, object], Tensor] | None = None

    def make(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.model()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                elif not parameter.any():  # a zero router sends all tokens to the same experts
                    parameter.normal_()
        return model.eval().requires_grad_(False)

    def configs(self) -> list[object]:
        return [
            lf.LoRA(
                r=2,
                target_modules=["all-linear", *self.modules],
                target_parameters=self.parameters,
                exclude_modules=self.exclude,
            ),
        ]

    def adapter(self, model: nn.Module, seed: int = 0) -> lf.Params:
        return scramble(lf.init(model, self.configs(), seed=seed), seed)


def mean(losses: Tensor, batch: object) -> Tensor:
    return losses.mean()


FAMILIES = {
    "qwen3": Family(qwen3, modules=("embed_tokens",)),
    "llama": Family(lambda: LlamaForCausalLM(LlamaConfig(**DECODER)), modules=("lm_head",)),
    "gemma3, tied": Family(
        lambda: Gemma3ForCausalLM(Gemma3TextConfig(**DECODER, sliding_window=4)),
        parameters=("embed_tokens",),
        unfoldable="other modules read this parameter as well",
    ),
    "gpt2": Family(gpt2, modules=("wte",)),
    "gpt2, positions": Family(
        gpt2, modules=("wpe",), unfoldable=r"transformer\.wpe: its inputs have shapes \[\(1, 10\)\]"
    ),
    "bert": Family(bert, of_class, modules=("word_embeddings",)),
    "bert, tokens": Family(
        lambda: BertForTokenClassification(BertConfig(**SIZES, num_labels=3)),
        of_tokens,
    ),
    "t5": Family(
        lambda: T5ForConditionalGeneration(
            T5Config(
                vocab_size=VOCABULARY,
                d_model=32,
                d_kv=8,
                d_ff=48,
                num_layers=2,
                num_heads=4,
                decoder_start_token_id=0,
                pad_token_id=0,
                use_cache=False,
            )
        ),
        pairs,
    ),
    "vit": Family(
        lambda: ViTForImageClassification(
            ViTConfig(**WIDTHS, image_size=8, patch_size=4, num_labels=3)
        ),
        images,
        modules=(r"patch_embeddings\.projection",),
    ),
    "whisper": Family(
        lambda: WhisperForConditionalGeneration(
            WhisperConfig(
                vocab_size=VOCABULARY,
                d_model=32,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=48,
                decoder_ffn_dim=48,
                num_mel_bins=8,
                max_source_positions=8,
                max_target_positions=16,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                decoder_start_token_id=1,
                use_cache=False,
            )
        ),
        speech,
        modules=(r"conv\d", r"decoder\.embed_positions"),
    ),
    "mamba2": Family(
        lambda: Mamba2ForCausalLM(
            Mamba2Config(
                vocab_size=VOCABULARY,
                hidden_size=32,
                num_hidden_layers=2,
                num_heads=4,
                head_dim=16,
                state_size=8,
                n_groups=1,
                chunk_size=4,
                expand=2,
                use_cache=False,
                pad_token_id=0,
                tie_word_embeddings=False,
            )
        ),
        unpadded,
        parameters=(r"conv1d\.weight",),
        unfoldable="the model reads this parameter past its module",
    ),
    "qwen3 moe": Family(
        lambda: Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **DECODER, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
            )
        ),
        parameters=EXPERTS,
    ),
    "mixtral": Family(
        lambda: MixtralForCausalLM(
            MixtralConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2)
        ),
        parameters=EXPERTS,
    ),
    "cnn": Family(CNN, images, modules=("layers",), loss_fn=mean),
    "torch's encoder": Family(
        Encoder, of_class, modules=("embed",), exclude=("out_proj",), loss_fn=mean
    ),
    "torch's encoder, attention": Family(
        Encoder,
        of_class,
        parameters=("in_proj_weight",),
        unfoldable="torch's attention does",
        loss_fn=mean,
    ),
}

EACH_FAMILY = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)

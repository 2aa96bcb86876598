"""Variants that are wrong in one way each: W' = W + B A, with a fault."""

from dataclasses import dataclass

import torch

import lora_func as lf
from lora_func.numerics import kaiming_uniform


@dataclass(frozen=True, kw_only=True)
class Broken(lf.RankConfig):
    """The config of all of them."""


def init(W, cfg, generator, stats):
    d_out, d_in = W.shape
    return {"A": kaiming_uniform(cfg.r, d_in, generator), "B": torch.zeros(d_out, cfg.r)}


def delta(params):
    return params["B"] @ params["A"]


def apply(W, params, x):
    A, B = params["A"].to(x.dtype), params["B"].to(x.dtype)
    return lf.linear(x, W) + (x @ A.mT) @ B.mT


def weight(W, params):
    W = lf.dense(W)
    return W + delta(params).to(W.dtype)


RIGHT = lf.Variant(
    "right",
    Broken,
    init=init,
    apply=apply,
    leaves={"A": "r d_in", "B": "d_out r"},
    weight=weight,
    stacks=True,
    pads=True,
    products_only=True,
)


def with_leaf(name, value, axes):
    """A third leaf."""
    return {
        "init": lambda *args: init(*args) | {name: value},
        "leaves": RIGHT.leaves | {name: axes},
    }


def started_away(W, cfg, generator, stats):
    return {k: v + 0.1 for k, v in init(W, cfg, generator, stats).items()}


def jumping(W, params, x):
    B = params["B"] / params["B"].square().sum(0).clamp_min(1e-30).sqrt()
    return apply(W, {**params, "B": B}, x)


calls = []


def counting(W, params, x):
    calls.append(1)
    return apply(W, params, x) + 1e-3 * len(calls) * params["B"].sum().to(x.dtype)


def random_init(W, cfg, generator, stats):
    return {**init(W, cfg, generator, stats), "A": torch.randn(cfg.r, W.shape[1])}


def writing(W, params, x):
    params["A"].mul_(1.0)
    return apply(W, params, x)


def branching(W, params, x):
    return apply(W, params, x) if params["B"].sum() > 0 else apply(W, params, x) * 1


def leaking(W, params, x):
    return lf.linear(x, W) + (x.float() @ params["A"].float().mT) @ params["B"].float().mT


def dividing(W, params, x):
    W_ = lf.dense(W)
    ratio = W_.norm(dim=1) / W_.norm(dim=1).detach()
    return apply(W, params, x) * ratio


def casting(W, params, x):
    y = apply(W, params, x)
    return y.float() if torch.is_autocast_enabled("cpu") else y


def prepare(params, shape, dtype):
    return {"twice": 2 * params["B"]}


def prepared(W, params, x):
    return apply(W, {**params, "B": params.get("twice", params["B"])}, x)


strengths = {}


def remembering(W, params, x):
    strength = strengths.setdefault(id(params["A"]), float(len(strengths)))
    return apply(W, {**params, "B": strength * params["B"]}, x)


def unstacked(W, params, x):
    A, B = params["A"].to(x.dtype), params["B"].to(x.dtype)
    return lf.linear(x, W) + (x @ A.transpose(0, -1)) @ B.transpose(0, -1)


def padded(W, params, x):
    return apply(W, params, x) * (1 + 0.1 * params["A"].shape[-2])


def reading(W, params, x):
    return apply(W, params, x) + 0 * x.sum()


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t):
        ctx.twice = 2 * t.detach()
        return t * t

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.twice


def once_differentiable(W, params, x):
    return apply(W, {**params, "B": Square.apply(params["B"])}, x)


def named(leaf):
    return lf.PeftLeaf(f"lora_{leaf}.weight")


WRONG_FORMAT = lf.PeftFormat(
    "LORA",
    {"A": named("A"), "B": named("B")},
    settings=lambda leaves, shape: {"r": len(leaves["A"]), "lora_alpha": 2 * len(leaves["A"])},
)

FAULTS = {
    "bounds_keep_what_is_inside_of_them": {"project": lambda params: {"B": params["B"] / 2}},
    "start_is_the_base": {"init": started_away},
    "weight_view_is_the_activation_view": {
        "weight": lambda W, params: lf.dense(W) + 2 * delta(params).to(lf.dense(W).dtype)
    },
    "each_leaf_gets_a_gradient": with_leaf("c", torch.ones(1), "1"),
    "first_step_follows_the_learning_rate": {"apply": jumping, "weight": None},
    "apply_is_a_function": {"apply": counting},
    "randomness_comes_from_the_seed": {"init": random_init},
    "nothing_that_goes_in_is_written_to": {"apply": writing},
    "one_graph_serves_every_adapter": {"apply": branching},
    "vmap_over_a_stack_is_the_loop": {"apply": branching},
    "leaves_have_the_axes_that_they_name": {"leaves": {"A": "r d_in", "B": "r d_out"}},
    "mixed_ranks_train_like_their_members_or_are_refused": {"apply": padded, "weight": None},
    "apply_takes_a_stack": {"apply": unstacked},
    "products_with_x_are_all_that_apply_needs": {"apply": reading},
    "output_has_the_dtype_of_the_layer": {"apply": leaking},
    "double_backward_is_the_derivative_of_the_gradient": {
        "apply": once_differentiable,
        "weight": None,
    },
    "zero_rows_stay_finite": {"apply": dividing, "products_only": False, "stacks": False},
    "autocast_keeps_start_and_dtype": {"apply": casting},
    "prepared_leaves_give_the_same": {"prepare": prepare, "apply": prepared},
    "peft_computes_the_same": {"peft": (WRONG_FORMAT,)},
    "files_keep_every_bit": {"apply": remembering},
}
"""The law that names a fault -> the fields of a variant that has it."""

MISSING_LEAF = RIGHT._replace(name="missing", leaves={"A": "r d_in"})

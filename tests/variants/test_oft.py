"""OFT compared with its formula in dense matrices and with PEFT."""

import peft
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import nn

import lora_func as lf
from lora_func.peft import to_peft
from lora_func.testing import Case, layers
from lora_func.variants import oft
from tests.support.parity import D_IN, assert_parity, parity_errors, same

EXACT = Case("oft", lambda r: lf.OFT(block_size=3), fit=lambda d_in, d_out, r: (3 * d_in, d_out, r))


def dense_rotation(leaves, b=3):
    blocks = []
    for upper in leaves["R"]:
        Q = torch.zeros(b, b, dtype=upper.dtype)
        Q[tuple(torch.triu_indices(b, b, 1))] = upper
        Q, eye = Q - Q.T, torch.eye(b, dtype=upper.dtype)
        blocks.append((eye + Q) @ torch.linalg.inv(eye - Q))
    return torch.block_diag(*blocks)


@given(layer=layers(EXACT, scrambled=True))
def test_formula(layer):
    R = dense_rotation(layer.leaves)
    y = F.linear(layer.x @ R, layer.module.weight, layer.module.bias)
    torch.testing.assert_close(layer.apply(), y)
    torch.testing.assert_close(R @ R.T, torch.eye(len(R), dtype=R.dtype))
    torch.testing.assert_close(torch.linalg.det(R), torch.ones((), dtype=R.dtype))


@pytest.mark.parametrize("terms", [2, 3, 4, 5, 6, 8])
def test_orthogonality_defect_of_the_series(terms):
    upper = torch.tensor([[0.5]], dtype=torch.float64)
    R = torch.eye(2) + oft.rotation({"R": upper, "_neumann": torch.ones(terms)}, 2)[0]
    q, t = 0.5, max(terms, 4)
    defect = torch.linalg.matrix_norm(R @ R.T - torch.eye(2), 2).item()
    if terms == 2:
        expected = 4 * q**2
    else:
        expected = abs((1 - q ** (t - 1)) ** 2 - 1) if t % 2 else q ** (2 * (t - 1))
    assert defect == pytest.approx(expected)


def test_the_series_approaches_the_exact_rotation():
    leaves = {"R": 0.1 * torch.randn(2, 6, dtype=torch.float64)}
    exact = oft.rotation(leaves, 8)
    errors = [
        (oft.rotation(leaves | {"_neumann": torch.ones(t)}, 8) - exact).norm().item()
        for t in (2, 4, 6, 12)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4 * errors[0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("terms", [2, 3, 4, 5, 6])
def test_parity_with_peft_neumann(bias, terms):
    assert_parity(
        lf.OFT(block_size=8, neumann_terms=terms),
        peft.OFTConfig(
            oft_block_size=8,
            use_cayley_neumann=True,
            num_cayley_neumann_terms=terms,
            target_modules=["0"],
        ),
        lambda layer: {"R": (layer.oft_R["default"].weight, same)},
        bias=bias,
        spread=0.1,
    )


EXACT_PEFT = {"use_cayley_neumann": False, "target_modules": ["0"], "oft_block_size": 8}


@pytest.mark.parametrize("bias", [True, False])
def test_parity_with_peft_exact_is_with_the_sign_turned(bias):
    assert_parity(
        lf.OFT(block_size=8),
        peft.OFTConfig(**EXACT_PEFT),
        lambda layer: {"R": (layer.oft_R["default"].weight, torch.neg)},
        bias=bias,
    )


def test_the_other_sign_rotates_the_other_way():
    errors = parity_errors(
        lf.OFT(block_size=8),
        peft.OFTConfig(**EXACT_PEFT),
        lambda layer: {"R": (layer.oft_R["default"].weight, same)},
        bias=True,
        dtype=torch.float64,
        constants=lambda layer: {},
        spread=1.0,
        merges=True,
    )
    assert errors["y"] > 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 1}, "block_size: got 1, expected an integer of at least 2"),
        ({"block_size": 4.0}, r"block_size: got 4\.0, expected an integer"),
        ({"neumann_terms": 1}, "neumann_terms: got 1, expected an integer of at least 2"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        lf.OFT(**settings)


def test_refuses_blocks_that_do_not_fit():
    with pytest.raises(ValueError, match="0: oft: block_size = 32 does not divide d_in = 48"):
        lf.init(nn.Sequential(nn.Linear(D_IN, 4)), lf.OFT())


def test_the_number_of_terms_is_in_the_dict():
    layer = Case("oft", lambda r: lf.OFT(block_size=2, neumann_terms=6)).layer()
    assert torch.equal(layer.leaves["_neumann"], torch.ones(6))


@pytest.mark.parametrize("share", [False, True])
def test_parity_with_peft_shared_and_bounded(share):
    """PEFT shortens in each forward pass what ``project`` shortens once."""
    layer = Case("oft", lambda r: lf.OFT(block_size=4, share=share, coft=0.3)).layer(
        d_in=16, d_out=5, r=1
    )
    config = peft.OFTConfig(
        **EXACT_PEFT | {"oft_block_size": 4}, block_share=share, coft=True, eps=0.3
    )
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(16, 5)).double(), config)
    theirs.base_model.model[0].get_base_layer().load_state_dict(layer.module.state_dict())
    R = torch.randn(1 if share else 4, 6, dtype=torch.float64)
    theirs.base_model.model[0].oft_R["default"].weight.data.copy_(-R)
    bounded = oft.project({**layer.leaves, "R": R})
    torch.testing.assert_close(layer.apply(bounded), theirs(layer.x))
    Q = bounded["R"].norm(dim=-1) * 2**0.5
    torch.testing.assert_close(Q, torch.full_like(Q, 0.3 / (1 if share else 2)))


def test_without_a_bound_nothing_is_projected():
    params = lf.init(nn.Linear(4, 4), lf.OFT(block_size=2))
    assert all(leaf is params[key] for key, leaf in lf.project(params).items())


def test_a_bounded_adapter_trains_within_its_bound():
    model, x = nn.Linear(8, 4).requires_grad_(False), torch.randn(16, 8)
    params = lf.init(model, lf.OFT(block_size=4, coft=0.05))
    leaf = params[".oft.R"]
    optimizer = torch.optim.SGD([leaf], 1.0)
    for _ in range(5):
        optimizer.zero_grad()
        (lf.fcall(model, params, x) - 1).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            leaf.copy_(lf.project(params)[".oft.R"])
        assert (leaf.norm(dim=-1) * 2**0.5 <= 0.05 / 2**0.5 + 1e-7).all()
    assert leaf.abs().max() > 0.01


def test_what_is_out_of_its_bound_is_not_written(tmp_path):
    model = nn.Sequential(nn.Linear(8, 4))
    params = lf.init(model, lf.OFT(block_size=4, coft=0.05))
    params["0.oft.R"].data.fill_(1)
    with pytest.raises(ValueError, match="0: R: is out of the bound of coft"):
        to_peft(params, tmp_path, model=model)
    to_peft(lf.project(params), tmp_path, model=model)

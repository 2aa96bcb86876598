"""Shared linear algebra, compared with dense matrices."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_func.numerics import kaiming_uniform, low_rank_norm, scaled
from lora_func.testing import dims, seeds


@given(d_in=dims, d_out=dims, r=dims, seed=seeds)
def test_scales_and_norms_equal_the_dense_products(d_in, d_out, r, seed):
    g = torch.Generator().manual_seed(seed)
    A, B = (
        torch.randn(*shape, generator=g, dtype=torch.float64)
        for shape in ((2, r, d_in), (2, d_out, r))
    )
    scale = torch.tensor([-1.5, 0.5], dtype=torch.float64)
    dense = scale[:, None, None] * B @ A
    torch.testing.assert_close(scaled(B, scale) @ A, dense)
    torch.testing.assert_close(scaled(B[0], scale[0]), scale[0] * B[0])
    torch.testing.assert_close(low_rank_norm(A, B, scale), torch.linalg.matrix_norm(dense))


@given(rows=dims, columns=dims, seed=st.integers(0, 2**31))
def test_kaiming_uniform_is_torchs(rows, columns, seed):
    ours = kaiming_uniform(rows, columns, torch.Generator().manual_seed(seed))
    theirs = torch.empty(rows, columns)
    torch.nn.init.kaiming_uniform_(theirs, a=5**0.5, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(ours, theirs)

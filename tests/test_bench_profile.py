"""`bench profile`: how kernels are sorted and counted, and the command."""

from __future__ import annotations

import pytest
import torch
from bench_common import CPU  # noqa: F401  (makes bench importable)

from bench.__main__ import main
from bench.profile import Kernel, busy, kind_of, table


@pytest.mark.parametrize(
    "name, kind",
    [
        ("void mxtrain::cuda::fold_kernel<true>(mxtrain::cuda::FoldWork, unsigned*, int)", "fold"),
        ("void mxtrain::cuda::sm90::folded_gemm_kernel<mxtrain::cuda::sm90::GemmTraits<1, 1, 128>, "
         "(mxtrain::cuda::FloatType)0, (mxtrain::cuda::sm90::Tiling)2>(CUtensorMap_st)",
         "folded GEMM, split K"),
        ("void mxtrain::cuda::sm90::folded_gemm_kernel<mxtrain::cuda::sm90::GemmTraits<2, 2, 128>, "
         "(mxtrain::cuda::FloatType)1, (mxtrain::cuda::sm90::Tiling)1>(CUtensorMap_st)",
         "folded GEMM"),
        ("void mxtrain::cuda::requantize_strips_kernel<...>", "requantize"),
        ("void mxtrain::cuda::quantize_dual_kernel<...>", "quantize_dual"),
        ("void mxtrain::cuda::quantize_strips_kernel<...>", "quantize"),
        ("void mxtrain::cuda::column_strips_kernel<...>", "column_sum"),
        ("mxtrain::cuda::column_runs_kernel(mxtrain::cuda::ColumnRunsParams)", "column_sum"),
        ("void mxtrain::cuda::adamw_kernel<...>", "mxtrain, other"),
        ("void mxtrain::cuda::int8_quantize_kernel<...>", "quantize"),
        ("mxtrain::cuda::int8_pack_kernel(...)", "residuals packed"),
        ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_NTT", "cuBLAS"),
        ("void pytorch_flash::flash_fwd_kernel<...>", "attention"),
        ("triton_red_fused_native_layer_norm_0", "torch.compile"),
        ("void at::native::vectorized_elementwise_kernel<...>", "other"),
    ],
)  # fmt: skip
def test_kinds(name, kind):
    assert kind_of(name) == kind


def test_time_is_counted_once_and_gaps_are_idle():
    kernels = [
        Kernel("fold_kernel", 0, 1000),
        Kernel("nvjet", 500, 2500),
        Kernel("triton", 3000, 4000),
    ]
    assert busy(kernels) == 3500 and busy([]) == 0
    lines = [line.split() for line in table(kernels, 2).splitlines()]
    assert ["cuBLAS", "1.00", "0"] in lines or ["cuBLAS", "1.00", "1"] in lines
    assert ["idle", "0.25"] in lines and ["all", "2.00", "2"] in lines


def test_bad_usage(capsys):
    for row in ("nothing/of/it", "gemm/mxfp4/12"):
        assert main(["profile", row]) == 2
    assert main(["profile", "gemm/mxfp4/64x64x64", "--calls", "0"]) == 2
    assert "--calls must be between 1 and 1000" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["profile", "gemm/mxfp4/64x64x64"]) == 2
        assert "profile needs a CUDA GPU" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_profile_of_a_product(capsys):
    assert main(["profile", "gemm/mxfp4/256x256x256"]) == 0
    out = capsys.readouterr().out
    assert "gemm/mxfp4/256x256x256, 3 calls" in out and "idle" in out and "all" in out

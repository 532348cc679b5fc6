# SPDX-License-Identifier: Apache-2.0
"""seer_cuda._core, the torch-free module: what it refuses, and its numpy twins of the bit ops."""

import numpy as np
import pytest

from seer_cuda import _library


@pytest.fixture(scope="module")
def core():
    module = _library.load_core()
    if module is None:
        pytest.skip("_core is not built")
    return module


@pytest.mark.parametrize("op", ["block_sparse_atn", "pack_block_bits", ""])
def test_explain_knows_its_ops(core, op):
    with pytest.raises(ValueError, match=f"'attn_pool', .+ or 'gate_select', got '{op}'"):
        core.explain(op, 90, "bfloat16", 128, 64, 64)


def test_bits_of_strided_arrays(core):
    mask = np.random.default_rng(0).random((3, 5, 140))[:, ::2, ::2] < 0.5
    bits = core.pack_block_bits(mask)
    assert bits.dtype == np.int32 and bits.shape == (3, 3, 3)
    wide = np.repeat(bits, 2, axis=-1)[..., ::2]
    for words in (bits, wide, wide.view(np.uint32), bits.astype(">i4")):
        np.testing.assert_array_equal(core.unpack_block_bits(words, 70), mask)


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.int16, np.float32, bool])
def test_unpack_takes_words_alone(core, dtype):
    with pytest.raises(TypeError, match="block_bits: expected dtype int32 or uint32, got "):
        core.unpack_block_bits(np.ones((2, 1), dtype=dtype), 32)


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.uint8])
def test_pack_takes_bools_alone(core, dtype):
    with pytest.raises(TypeError, match="mask: expected dtype bool, got "):
        core.pack_block_bits(np.ones((2, 32), dtype=dtype))

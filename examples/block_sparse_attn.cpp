// SPDX-License-Identifier: Apache-2.0
// Sparse attention from C++: the CUDA kernel where there is a GPU, else the CPU kernel.
#include <cmath>
#include <cstdio>

#include "memory.h"  // allocate, gpu, wait: managed memory where there is a GPU, else malloc
#include "seer/block_sparse_attn.h"

int main() {
  constexpr int kHeadsQ = 8, kHeadsKv = 2, kDim = 128, kBlock = 64;
  constexpr int64_t kRows = 1000, kBlocks = seer::ceil_div(kRows, kBlock);
  // Contiguous [1, rows, heads, head_dim] of bfloat16: numbers from 0.5 to 2, or all the same.
  const auto tensor = [](int heads, int same) -> seer::View<void*> {
    auto* data = static_cast<uint16_t*>(allocate(2 * kRows * heads * kDim));
    for (int64_t i = 0; i < kRows * heads * kDim; ++i)
      data[i] = same != 0 ? same : 0x3f00 + i * 7919 % 256;
    return {data, kRows * heads * kDim, heads * kDim, kDim};
  };
  const auto input = [](const seer::View<void*>& x) -> seer::ConstView {
    return {x.data, x.batch_stride, x.row_stride, x.head_stride};
  };

  seer::BlockSparseAttnParams p;
  p.batch = 1, p.heads_q = kHeadsQ, p.heads_kv = kHeadsKv, p.head_dim = kDim;
  p.rows_q = p.rows_kv = kRows, p.scale = 1.0f / std::sqrt(float(kDim));
  p.q = input(tensor(kHeadsQ, 0));
  p.k = input(tensor(kHeadsKv, 0));
  p.v = input(tensor(kHeadsKv, 0x3f80));  // 1.0: so must be its averages in out
  p.out = tensor(kHeadsQ, 0xffff);        // NaN, to see that all of it is written
  p.lse = static_cast<float*>(allocate(4 * kHeadsQ * kRows));
  p.lse_batch_stride = kHeadsQ * kRows, p.lse_head_stride = kRows;
  p.workspace = static_cast<int32_t*>(allocate(seer::kBlockSparseAttnWorkspaceBytes));
  // One mask for all heads: query block i keeps KV blocks 0, i / 2 and i.
  auto* bits = static_cast<int32_t*>(allocate(4 * kBlocks));
  for (int i = 0; i < kBlocks; ++i) bits[i] = 1 | 1 << i / 2 | 1 << i;
  p.block_bits = {.data = bits, .heads = 1, .row_stride = 1, .words = 1};

  const auto serial = [](int64_t count, int64_t, const auto& body) { body(0, count); };
  const seer::Status status = gpu() ? seer::launch_block_sparse_attn(p, /*stream=*/nullptr)
                                    : seer::block_sparse_attn_cpu(p, serial);
  if (!status.ok() || !wait()) return std::printf("failed: %s\n", status.text.c_str()), 1;
  int64_t wrong = 0;
  const auto* out = static_cast<const uint16_t*>(p.out.data);
  for (int64_t i = 0; i < kRows * kHeadsQ * kDim; ++i) wrong += out[i] < 0x3f7e || out[i] > 0x3f81;
  std::printf("%s: lse of row 0 %.3f, %ld wrong\n", gpu() ? "GPU" : "CPU", p.lse[0], long(wrong));
  return wrong > 0;
}

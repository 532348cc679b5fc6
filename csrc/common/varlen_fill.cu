// SPDX-License-Identifier: Apache-2.0
// Rows of a packed output that belong to no sequence (see varlen_fill.h).
//
// One CTA looks after 64 packed rows:
//   covered[64] = false
//   for every sequence, in parallel: mark its rows that fall in here
//   for every row not marked: out = 0, lse = -inf, all heads
#include <cmath>

#include "common/cuda_status.h"
#include "common/varlen.cuh"
#include "common/varlen_fill.h"

namespace seer {
namespace {

constexpr int kThreads = 128;
constexpr int kRowsPerCta = 64;

__global__ void fill_uncovered(const __grid_constant__ VarlenFillParams p) {
  __shared__ bool covered[kRowsPerCta];
  if (threadIdx.x < kRowsPerCta) covered[threadIdx.x] = false;
  __syncthreads();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRowsPerCta;
  for (int b = threadIdx.x; b < p.batch; b += kThreads) {
    const dev::RowRange range = dev::sequence_rows(p.cu_seqlens, b, p.total, p.max_rows);
    const int64_t begin = max(range.start - first, int64_t{0});
    const int64_t end = min(range.start + range.rows - first, int64_t{kRowsPerCta});
    for (int64_t row = begin; row < end; ++row) covered[row] = true;
  }
  __syncthreads();
  for (int row = 0; row < kRowsPerCta && first + row < p.total; ++row) {
    if (covered[row]) continue;
    const int chunks = p.row_bytes / 16;
    for (int i = threadIdx.x; i < p.heads * chunks; i += kThreads) {
      const int64_t element = (first + row) * p.out.row_stride + i / chunks * p.out.head_stride;
      auto* bytes = static_cast<char*>(p.out.data) + element * p.element_bytes;
      reinterpret_cast<uint4*>(bytes)[i % chunks] = uint4{0, 0, 0, 0};
    }
    for (int h = threadIdx.x; h < p.heads; h += kThreads) {
      p.lse[h * p.lse_head_stride + first + row] = -INFINITY;
    }
  }
}

}  // namespace

Status fill_uncovered_rows(const VarlenFillParams& params, CUstream_st* stream) {
  if (params.total == 0 || params.heads == 0) return {};
  const auto grid = static_cast<unsigned>(ceil_div(params.total, kRowsPerCta));
  fill_uncovered<<<grid, kThreads, 0, stream>>>(params);
  return check_launch("fill_uncovered", grid, 0);
}

}  // namespace seer

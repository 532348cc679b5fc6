// SPDX-License-Identifier: Apache-2.0
// The hot loops of the CPU ops, compiled once per instruction set and chosen at run time.
//
// All of them work on a "chunk": `lanes` query rows side by side in the lanes of a few vectors.
//   qt      [head_dim][lanes]   the query rows, transposed
//   scores  [cols][lanes]       = k_tile [cols][head_dim] x qt
//   out     [head_dim][lanes]  += v_tile [cols][head_dim]^T x probabilities
// With rows in lanes the online softmax needs no horizontal reduction, K and V stay in their own
// layout (their elements are broadcast), and a masked diagonal is one compare per vector.
// Matrices of `lanes` columns are contiguous and aligned to their vectors (64 bytes suffice).
#pragma once

#include <cstdint>

#include "seer/types.h"

namespace seer::cpu {

enum class Isa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

struct Kernels {
  int lanes;

  // dst [rows][cols] fp32, contiguous, from rows `row_stride` elements apart; and back, rounded
  // to nearest even.
  void (*load_tile)(DType dtype, const void* src, int64_t row_stride, int64_t rows, int64_t cols,
                    float* dst);
  void (*store_tile)(DType dtype, const float* src, int64_t rows, int64_t cols, void* dst,
                     int64_t row_stride);

  // c [rows][lanes] = a [rows][depth] x b [depth][lanes].
  void (*multiply)(const float* a, int64_t rows, int64_t depth, const float* b, float* c);

  // c [rows][lanes] = c * carry [lanes] + a^T x b, a [depth][rows], b [depth][lanes].
  void (*accumulate)(const float* a, int64_t depth, int64_t rows, const float* b,
                     const float* carry, float* c);

  // One step of the online softmax in base 2 (Milakov and Gimelshein 2018; Dao 2023): scores
  // [cols][lanes] become exp2(score - new maximum); row_max and row_sum [lanes] are updated; carry
  // [lanes] receives the factor of all older sums. `visible` [lanes], if given, counts the visible
  // columns of each row; the others become 0. `tile_max` and `tile_sum` [lanes], if given,
  // receive the maximum of this tile's scores and the sum of its weights, relative to the new
  // row_max (to 0 while that is -inf). A NaN score is left out of the maxima, but makes sums NaN.
  void (*softmax_step)(float* scores, int64_t cols, const int32_t* visible, float* row_max,
                       float* row_sum, float* carry, float* tile_max, float* tile_sum);

  // maxima [tiles][lanes], from softmax_step's tile_max or logarithms (base 2) of sums of weights
  // relative to 0, become probabilities exp2(maximum - row_max) * inverse_sum.
  void (*probabilities)(float* maxima, int64_t tiles, const float* row_max,
                        const float* inverse_sum);

  // Column-wise maximum, minimum (both NaN if a value is NaN) and mean of tile [rows][cols];
  // each output is [cols] or null. rows >= 1.
  void (*pool)(const float* tile, int64_t rows, int64_t cols, float* max, float* min, float* mean);
};

// The best instruction set of this machine.
Isa best_isa();

// The kernels for chunks of at most the natural width of `isa`; for `rows` so few that a narrower
// chunk holds them all, the narrower one. `isa` must not exceed best_isa().
const Kernels& kernels_for(int64_t rows, Isa isa = best_isa());

}  // namespace seer::cpu

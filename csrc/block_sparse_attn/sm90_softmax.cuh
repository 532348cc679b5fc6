// SPDX-License-Identifier: Apache-2.0
// The softmax of a consumer of the Hopper kernel: a reference per row that is fixed early, so that
// most KV tiles need no maximum.
//
// A row's weights are exp2(score - reference), scores in units of log2. Any reference gives the
// right quotient as long as nothing overflows and the largest weight does not vanish. Two ways to
// keep it so, per warp and KV tile:
//   careful  the reference is the maximum so far, raised lazily (common/online_softmax.cuh). Taken
//            for a row's first tile, for masked tiles, and by a warp with a reference that is
//            unset or beyond 2^24 (there, scores are rounded as the reference was: its rounding
//            error, the same for all weights of a row, could otherwise take them out of range);
//   fixed    the reference stays. Whether everything stayed in range is asked once, at the end of
//            the unit: if not (a score more than 2^64 above the reference, in weights), the
//            scheduler streams the tile again, careful throughout. fp16 weights end at 65504, so
//            for them a lane's sum is looked at after every tile, and the reference lifted beyond
//            2^14.
// The maximum costs 32 instructions and two rounds of shuffles per lane and KV tile, 7 % of the
// kernel's time.
#pragma once

#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "common/online_softmax.cuh"

namespace seer::dev {

// Scores of a lane: element 4 * j + 2 * half + c is row `half` of the lane (common/wgmma.cuh).
template <class Element>
class Sm90Softmax {
 public:
  static constexpr bool kLifts = std::is_same_v<Element, __half>;

  __device__ __forceinline__ void begin(bool careful) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      reference[half] = OnlineSoftmax<2>::kNothing;
      sum[half] = 0.0f;
    }
    always_careful = careful;
    next_careful = true;
  }

  // Whether the next tile needs raise().
  __device__ __forceinline__ bool careful() const { return next_careful; }

  // The largest of the lane's scores in each row.
  static __device__ __forceinline__ void maxima(const float (&s)[32], float (&top)[2]) {
    top[0] = fmaxf(s[0], s[1]);
    top[1] = fmaxf(s[2], s[3]);
#pragma unroll
    for (int i = 4; i < 32; i += 4) {
      top[0] = fmaxf(top[0], fmaxf(s[i], s[i + 1]));
      top[1] = fmaxf(top[1], fmaxf(s[i + 2], s[i + 3]));
    }
  }

  // Brings the references up to date with new scores. True (for the whole warp) if what was
  // accumulated so far must be multiplied by shrink[half]. May change `scale`, the factor from
  // scores to units of log2.
  __device__ __forceinline__ bool raise(float (&s)[32], float& scale, float (&shrink)[2]) {
    float top[2];
    maxima(s, top);
    bool rises = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      top[half] = fmaxf(top[half], __shfl_xor_sync(0xffffffffu, top[half], 1));
      top[half] = fmaxf(top[half], __shfl_xor_sync(0xffffffffu, top[half], 2));
      top[half] *= scale;
      rises |= top[half] - reference[half] > kSlack;
    }
    const bool rescale = __any_sync(0xffffffffu, rises);
    if (rescale) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float raised = fmaxf(reference[half], top[half]);
        shrink[half] = exp2_fast(reference[half] - raised);
        reference[half] = raised;
        // So much that the factor may have vanished, and the sum with it: for in_range().
        const bool lost = !(sum[half] < kInRange);
        sum[half] = lost ? sum[half] + INFINITY : sum[half] * shrink[half];
      }
    }
    bool unset = false, huge = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool nothing = reference[half] == OnlineSoftmax<2>::kNothing;
      unset |= nothing;
      huge |= !nothing && fabsf(reference[half]) > kHuge;
    }
    const bool round = __any_sync(0xffffffffu, huge);
    next_careful = always_careful || round || __any_sync(0xffffffffu, unset);
    if (round) {
      // As the maximum was, so that the largest score has weight 1 exactly.
#pragma unroll
      for (int i = 0; i < 32; ++i) s[i] *= scale;
      scale = 1.0f;
    }
    return rescale;
  }

  // Turns scores into weights and adds them up, those of this tile in added[]. `raised`: what
  // raise() said of it; the result and shrink then tell of both steps.
  __device__ __forceinline__ bool weigh(float (&s)[32], float scale, float (&shrink)[2],
                                        bool raised, float (&added)[2]) {
#pragma unroll
    for (int i = 0; i < 32; ++i) s[i] = exp2_fast(fmaf(s[i], scale, -reference[i / 2 % 2]));
    added[0] = s[0] + s[1];
    added[1] = s[2] + s[3];
#pragma unroll
    for (int i = 4; i < 32; i += 4) {
      added[0] += s[i] + s[i + 1];
      added[1] += s[i + 2] + s[i + 3];
    }
    if constexpr (kLifts) {
      const bool fits = fmaxf(added[0], added[1]) <= kLiftAbove;  // not if NaN
      if (!__all_sync(0xffffffffu, fits)) {
        if (!raised) shrink[0] = shrink[1] = 1.0f;
        lift(s, added, shrink);
        raised = true;
      }
    }
    sum[0] += added[0];
    sum[1] += added[1];
    return raised;
  }

  // Whether everything stayed in range, if not every tile was a careful one. `out`: what was
  // accumulated; it overflows before the sums do if V is large.
  template <int kCount>
  __device__ __forceinline__ bool in_range(const float (&out)[kCount]) const {
    float zeros[4] = {};  // four chains: one would wait for itself
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      zeros[i % 4] = fmaf(out[i], 0.0f, zeros[i % 4]);  // NaN from Inf and NaN
    }
    const float zero = zeros[0] + zeros[1] + (zeros[2] + zeros[3]);
    // One by one: a maximum would drop a NaN, which is what an overflown sum becomes when shrunk.
    const bool good = sum[0] < kInRange && sum[1] < kInRange && zero == 0.0f;
    return __all_sync(0xffffffffu, good);
  }

  // Adds the quad's shares of the sums together.
  __device__ __forceinline__ void finish() {
    sum[0] = quad_sum(sum[0]);
    sum[1] = quad_sum(sum[1]);
  }
  __device__ __forceinline__ float lse(int half) const {
    return lse_of(reference[half], sum[half]);
  }
  __device__ __forceinline__ float inverse_sum(int half) const { return inverse_of(sum[half]); }
  // What the weights of a row are relative to at present.
  __device__ __forceinline__ const float (&references() const)[2] { return reference; }
  // Of the weights of a row: after finish(), all of it.
  __device__ __forceinline__ const float (&sums() const)[2] { return sum; }

 private:
  static constexpr float kSlack = 8.0f;  // a careful reference rises when outgrown by 2^8
  // Beyond it a reference's rounding error could take weights out of range: 2^24 has it below 1.
  static constexpr float kHuge = 0x1p24f;
  static constexpr float kInRange = 0x1p64f;  // leaves room for V and for long rows
  static constexpr float kLiftAbove = 0x1p14f;
  static constexpr float kMendable = 0x1p100f;

  __device__ __forceinline__ void lift(float (&s)[32], float (&added)[2], float (&shrink)[2]) {
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float row = quad_sum(added[half]);
      const float rise = row > kLiftAbove ? floorf(log2f(row)) : 0.0f;
      const float lifted = reference[half] + rise;
      // Taken from what the reference really became: its sum may have been rounded.
      factor[half] = exp2_fast(reference[half] - lifted);
      reference[half] = lifted;
      sum[half] *= factor[half];
      shrink[half] *= factor[half];
      // Infinite from there on, whatever later lifts do, so that in_range() sees it.
      added[half] = row < kMendable ? added[half] * factor[half] : row + INFINITY;
    }
#pragma unroll
    for (int i = 0; i < 32; ++i) s[i] *= factor[i / 2 % 2];
  }

  float reference[2];
  float sum[2];  // this lane's share
  bool always_careful, next_careful;
};

}  // namespace seer::dev

// SPDX-License-Identifier: Apache-2.0
// Softmax over a row that arrives in pieces (Milakov and Gimelshein 2018; Dao 2022).
//
// Of each row it keeps a reference (a maximum seen so far) and the sum of exp2(score - reference),
// with scores in units of log2: raw products times `scale_log2` = softmax scale * log2(e), a factor
// that costs nothing in the multiply-add in front of exp2. When the reference rises, what was
// summed so far shrinks by exp2(old - new).
//
// The reference rises lazily: only when some row of the warp exceeds its own by 2^kSlackLog2. In
// between, probabilities are at most 2^kSlackLog2 instead of 1: exact in floating point, far from
// the end of fp16's range, and the rescaling of the output is skipped for most tiles.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

namespace seer::dev {

// 2^x, to 2 ulp, subnormal results flushed to 0. exp2(-inf) = 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x, to 1 ulp, subnormals taken as 0. A correctly rounded quotient takes 20 instructions more.
__device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A row's sum over the quad of lanes that share it.
__device__ __forceinline__ float quad_sum(float share) {
  share += __shfl_xor_sync(0xffffffffu, share, 1);
  return share + __shfl_xor_sync(0xffffffffu, share, 2);
}

// Natural log of the sum of exponentials of a row's scaled scores; -inf for an empty row.
__device__ __forceinline__ float lse_of(float reference, float sum) {
  constexpr float kLn2 = 0.693147180559945309f;
  return sum == 0.0f ? -INFINITY : (reference + log2f(sum)) * kLn2;
}

// 1 / sum, and 0 for an empty row.
__device__ __forceinline__ float inverse_of(float sum) {
  return sum == 0.0f ? 0.0f : reciprocal_fast(sum);
}

// The rows of a lane: row i of the warp's accumulators is spread over the four lanes of a quad.
template <int kRows>
struct OnlineSoftmax {
  // Reference of a row that has seen nothing but masked scores. Lower than any score, and finite:
  // no difference taken with it is NaN, exp2(-inf - kNothing) is 0 and exp2(kNothing - any) is 0.
  static constexpr float kNothing = -FLT_MAX;

  float reference[kRows];
  float sum[kRows];  // this lane's share

  __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      reference[i] = kNothing;
      sum[i] = 0.0f;
    }
  }

  // Takes the lane's maxima of the new raw scores. True (for the whole warp) if references rose:
  // then the caller multiplies everything accumulated so far by shrink[].
  template <int kSlackLog2>
  __device__ __forceinline__ bool raise(float (&maxima)[kRows], float scale_log2,
                                        float (&shrink)[kRows]) {
    bool rises = false;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      maxima[i] = fmaxf(maxima[i], __shfl_xor_sync(0xffffffffu, maxima[i], 1));
      maxima[i] = fmaxf(maxima[i], __shfl_xor_sync(0xffffffffu, maxima[i], 2));
      maxima[i] *= scale_log2;
      rises |= maxima[i] - reference[i] > static_cast<float>(kSlackLog2);
    }
    if (!__any_sync(0xffffffffu, rises)) return false;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float raised = fmaxf(reference[i], maxima[i]);
      shrink[i] = exp2_fast(reference[i] - raised);
      reference[i] = raised;
      sum[i] *= shrink[i];
    }
    return true;
  }

  // The weight of a raw score in row i, added to the row's sum. Masked scores (-inf) weigh 0.
  __device__ __forceinline__ float weigh(float score, float scale_log2, int i) {
    const float weight = exp2_fast(fmaf(score, scale_log2, -reference[i]));
    sum[i] += weight;
    return weight;
  }

  // Adds the quad's shares together; afterwards every lane of the quad holds the row's sum.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int i = 0; i < kRows; ++i) sum[i] = quad_sum(sum[i]);
  }

  __device__ __forceinline__ float lse(int i) const { return lse_of(reference[i], sum[i]); }
  __device__ __forceinline__ float inverse_sum(int i) const { return inverse_of(sum[i]); }
};

}  // namespace seer::dev

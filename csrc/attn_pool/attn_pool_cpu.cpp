// SPDX-License-Identifier: Apache-2.0
// attn_pool on the CPU: the attention engine keeps each KV block's row maxima, or its sums of
// weights, of the one pass, so the map costs no second product and is exact.
#include "attn_pool/dense.h"
#include "common/cpu_attn.h"
#include "seer/attn_pool.h"

namespace seer {

Status attn_pool_cpu(const AttnPoolParams& params, const ParallelFor& parallel_for) {
  const cpu::PooledMap map{params.pooled, params.per_token, params.reduce == PoolReduce::kSum};
  return cpu::attention(as_dense(params), map, parallel_for);
}

}  // namespace seer

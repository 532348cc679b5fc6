// SPDX-License-Identifier: Apache-2.0
// What a consumer of the Hopper kernel keeps of the scores beside the output: Traits::Map. Of
// block_sparse_attn that is nothing; attn_pool/sm90_row_map.cuh keeps a number per row and KV tile.
//
//   note()    with the weights of a KV tile and their sums; masked ones are 0
//   keep()    while the tensor cores work on that tile's P V: whatever takes time belongs here
//   finish()  once per unit, when its sums are final and its output is stored; the page is still held
//
// A tile that is streamed again (sm90_softmax.cuh) gives all of its notes again. Warps whose result
// is not final do not call finish().
#pragma once

namespace seer::dev {

struct Sm90NoMap {
  static constexpr bool kKeeps = false;  // then nothing else is called

  template <class Params>
  __device__ __forceinline__ explicit Sm90NoMap(const Params&) {}
};

}  // namespace seer::dev

// SPDX-License-Identifier: Apache-2.0
// torch.ops.seer from a C++ program on libtorch, without Python.
//
//   example_libtorch path/to/libseer_ops.so               calls an operator
//   example_libtorch path/to/libseer_ops.so model.pt2     runs a model that AOTInductor compiled
//                                                         (examples/aot_inductor.py makes one)
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <optional>
#include <tuple>

// The first line of the operator's schema in csrc/torch/library.cpp, in C++ types.
using BlockSparseAttn = std::tuple<at::Tensor, at::Tensor>(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const std::optional<at::Tensor>& block_bits, int64_t block_q, int64_t block_kv, bool causal,
    std::optional<double> scale, const std::optional<at::Tensor>& cu_seqlens_q,
    const std::optional<at::Tensor>& cu_seqlens_kv, int64_t max_rows_q, int64_t max_rows_kv);

int main(int argc, char** argv) {
  // Loading the library registers the operators; nothing of it is linked.
  if (argc < 2 || dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    return std::printf("expected the path of libseer_ops.so, got %s: %s\n",
                       argc < 2 ? "nothing" : argv[1], argc < 2 ? "" : dlerror()),
           1;
  }
  const at::Tensor q = at::randn({1, 512, 4, 64}, at::kBFloat16);
  const at::Tensor k = at::randn({1, 512, 2, 64}, at::kBFloat16), v = at::ones_like(k);
  // One row of bits for all heads and query blocks: KV blocks 0 to 2.
  const at::Tensor bits = at::full({1, 1, 8, 1}, 7, at::kInt);

  at::Tensor out;
  if (argc == 2) {
    static const auto attention = c10::Dispatcher::singleton()
                                      .findSchemaOrThrow("seer::block_sparse_attn", "")
                                      .typed<BlockSparseAttn>();
    out = std::get<0>(attention.call(q, k, v, bits, 64, 64, /*causal=*/true, std::nullopt,
                                     std::nullopt, std::nullopt, 0, 0));
  } else {
    torch::inductor::AOTIModelPackageLoader model(argv[2]);
    out = model.run({q, k, v, bits})[0];
  }
  // Rows of out are averages of rows of v, which are 1.
  const double error = (out.to(at::kFloat) - 1.0f).abs().max().item<double>();
  std::printf("out [%ld, %ld, %ld, %ld], largest error %.4f\n", long(out.size(0)),
              long(out.size(1)), long(out.size(2)), long(out.size(3)), error);
  return error < 0.01 ? 0 : 1;
}

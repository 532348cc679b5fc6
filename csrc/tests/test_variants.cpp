// SPDX-License-Identifier: Apache-2.0
// The choice among compiled kernels. Without a table (a CPU-only build) every problem is refused.
#include <string>

#include "check.h"
#include "seer/block_sparse_attn.h"
#include "seer/pool_gate.h"

namespace {

seer::BlockSparseAttnParams problem() {
  seer::BlockSparseAttnParams params;
  params.dtype = seer::DType::kBFloat16;
  params.batch = 2;
  params.heads_q = 4;
  params.heads_kv = 2;
  params.head_dim = 128;
  params.rows_q = params.rows_kv = 256;
  params.q = {nullptr, 256 * 4 * 128, 4 * 128, 128};
  params.k = params.v = {nullptr, 256 * 2 * 128, 2 * 128, 128};
  return params;
}

bool has_family(int sm) {
  for (const auto& row : seer::block_sparse_attn_variants())
    if (row.sm == sm) return true;
  return false;
}

// The family that serves `params` on compute capability `sm`; 0 for none, with the reason.
int family(const seer::BlockSparseAttnParams& params, int sm, std::string* why = nullptr) {
  const int index = seer::find_block_sparse_attn_variant(params, sm, why);
  return index < 0 ? 0 : seer::block_sparse_attn_variants()[index].sm;
}

void expect_family(const seer::BlockSparseAttnParams& params, int sm, int expected) {
  const int got = family(params, sm);
  SEER_CHECK(got == expected, "sm_%d, arch %d: expected family %d, got %d", sm, params.arch,
             expected, got);
}

// Refused with a reason that starts with `text`.
void expect_refusal(const seer::BlockSparseAttnParams& params, int sm, const std::string& text) {
  std::string why;
  SEER_CHECK(family(params, sm, &why) == 0, "sm_%d, arch %d", sm, params.arch);
  SEER_CHECK(why.starts_with(text), "expected '%s', got '%s'", text.c_str(), why.c_str());
}

void test_newest_family_that_serves() {
  expect_family(problem(), 90, has_family(90) ? 90 : 80);
  expect_family(problem(), 100, 80);
  expect_family(problem(), 120, 80);
  expect_refusal(problem(), 75,
                 "variant: expected a compiled kernel, got none for sm_75, bfloat16, head_dim 128");
}

void test_family_asked_for() {
  auto params = problem();
  params.arch = 80;
  expect_family(params, 90, 80);
  params.arch = 90;
  expect_family(params, 90, has_family(90) ? 90 : 0);
  expect_refusal(params, 100, "arch: expected a compiled kernel of family 90, got none for sm_100");
  params.arch = 70;
  expect_refusal(params, 90, "arch: expected a compiled kernel of family 70, got none for sm_90");
}

// What TMA cannot address goes to the portable kernels.
void test_addressable() {
  const auto expect_portable = [](auto change) {
    auto params = problem();
    change(params);
    expect_family(params, 90, 80);
    params.arch = 90;
    expect_refusal(params, 90, "arch: expected a compiled kernel of family 90, got none for sm_90");
  };
  expect_portable([](auto& p) { p.k.head_stride = 0; });
  expect_portable([](auto& p) { p.v.row_stride = 0; });
  expect_portable([](auto& p) { p.q.batch_stride = -8; });
  expect_portable([](auto& p) { p.v.batch_stride = int64_t{1} << 39; });
  expect_portable([](auto& p) { p.rows_kv = 0; });

  // A stride along a dimension of size 1 is never used.
  auto params = problem();
  params.batch = params.heads_kv = 1;
  params.k.batch_stride = params.k.head_stride = 0;
  expect_family(params, 90, has_family(90) ? 90 : 80);
  params.batch = 3;  // packed sequences: the batch is no dimension of k
  params.total_q = params.total_kv = 256;
  const int32_t cu_seqlens[4] = {};
  params.cu_seqlens_q = params.cu_seqlens_kv = cu_seqlens;
  expect_family(params, 90, has_family(90) ? 90 : 80);
}

seer::PoolGateParams pooling() {
  seer::PoolGateParams params;
  params.batch = params.heads = 2;
  params.heads_out = 4;
  params.head_dim = params.gate_dim = 128;
  params.rows = 300;
  params.pools = 7;
  params.x = {nullptr, 300 * 256, 256, 128};
  params.weight = &params;  // aligned, never read
  return params;
}

seer::GateSelectParams selection() {
  seer::GateSelectParams params;
  params.gate.batch = params.gate.heads_q = params.gate.heads_k = 2;
  params.gate.gate_dim = 64;
  params.gate.blocks_q = params.gate.blocks_kv = 10;
  params.gate.q_gate = params.gate.k_gate = {nullptr, 1280, 128, 64};
  return params;
}

// Served by a row of the params' own type and dimension; after `change` refused, and why.
template <class Params, class Find, class Change>
void expect_gate_refusal(Params params, Find find, const std::string& text, Change change) {
  alignas(16) static const char weight[16] = {};
  if constexpr (requires { params.weight; }) params.weight = weight;
  std::string why;
  SEER_CHECK(find(params, 90, &why) >= 0, "%s", why.c_str());
  change(params);
  SEER_CHECK(find(params, 90, &why) < 0, "expected a refusal: %s", text.c_str());
  SEER_CHECK(why.find(text) != std::string::npos, "expected '%s', got '%s'", text.c_str(),
             why.c_str());
}

void test_gates() {
  const auto pool = [](auto text, auto change) {
    expect_gate_refusal(pooling(), &seer::find_pool_gate_variant, text, change);
  };
  pool("got float32, head_dim 128", [](auto& p) { p.dtype = seer::DType::kFloat32; });
  pool("got bfloat16, head_dim 96", [](auto& p) { p.head_dim = 96; });
  pool("weight: expected gate_dim 64 or 128, got 32", [](auto& p) { p.gate_dim = 32; });
  pool("x: expected at most 2^30 blocks, got 2000000000.", [](auto& p) {
    p.rows = 2000000000;
    p.block = 1;
  });
  pool("weight: expected data", [](auto& p) { p.weight = static_cast<const char*>(p.weight) + 2; });
  pool("x: expected data", [](auto& p) { p.x.row_stride = 260; });
  pool("x: expected data", [](auto& p) { p.x.data = reinterpret_cast<const void*>(8); });
  const auto select = [](auto text, auto change) {
    expect_gate_refusal(selection(), &seer::find_gate_select_variant, text, change);
  };
  select("got bfloat16, gate_dim 32", [](auto& p) { p.gate.gate_dim = 32; });
  select("q_gate: expected data", [](auto& p) { p.gate.q_gate.head_stride = 66; });
  select("k_gate: expected data", [](auto& p) { p.gate.k_gate.batch_stride = 1; });
  select("q_gate: expected at most 2^30 blocks, got 2000000000.",
         [](auto& p) { p.gate.blocks_q = 2000000000; });
  select("k_gate: expected at most 2^30 blocks, got 2000000000.",
         [](auto& p) { p.gate.blocks_kv = 2000000000; });
  select("blocks to rank, got 30000", [](auto& p) {
    p.method = seer::SelectMethod::kTopK;
    p.gate.blocks_kv = 30000;
  });
  std::string why;
  auto plain = pooling();  // gate_dim without weight is no matter of kernels
  plain.weight = nullptr;
  SEER_CHECK(seer::find_pool_gate_variant(plain, 90, &why) >= 0, "%s", why.c_str());
  auto params = selection();
  params.gate.blocks_kv = 30000;  // a threshold ranks nothing
  SEER_CHECK(seer::find_gate_select_variant(params, 90, &why) >= 0, "%s", why.c_str());
  params.gate.batch = 1;  // a stride along a dimension of size 1 is never used
  params.gate.q_gate.batch_stride = 1;
  SEER_CHECK(seer::find_gate_select_variant(params, 120, &why) >= 0, "%s", why.c_str());
  SEER_CHECK(seer::find_gate_scores_variant(params.gate, 75, &why) < 0, "sm_75");
}

}  // namespace

int main() {
  std::string why;
  auto params = pooling();
  params.block = 0;
  SEER_CHECK(seer::find_pool_gate_variant(params, 90, &why) < 0 &&
                 why == "block: expected at least 1 row, got 0. Use 64.",
             "%s", why.c_str());
  if (seer::block_sparse_attn_variants().empty()) {
    expect_refusal(problem(), 90, "variant: expected a compiled kernel, got none for sm_90");
  } else if (family(problem(), 90) != 0) {  // else a build for newer GPUs alone
    test_newest_family_that_serves();
    test_family_asked_for();
    test_addressable();
    test_gates();
  }
  return seer::test::report("variants");
}

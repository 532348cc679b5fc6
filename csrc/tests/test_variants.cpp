// SPDX-License-Identifier: Apache-2.0
// The choice among compiled kernels. Without a table (a CPU-only build) every problem is refused.
#include <string>

#include "check.h"
#include "seer/block_sparse_attn.h"

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

}  // namespace

int main() {
  if (seer::block_sparse_attn_variants().empty()) {
    expect_refusal(problem(), 90, "variant: expected a compiled kernel, got none for sm_90");
  } else if (family(problem(), 90) != 0) {  // else a build for newer GPUs alone
    test_newest_family_that_serves();
    test_family_asked_for();
    test_addressable();
  }
  return seer::test::report("variants");
}

// SPDX-License-Identifier: Apache-2.0
#include "selection.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

namespace seer::bench {
namespace {

// How many of the best blocks are kept, if `sorted` (descending, visible ones only) were exact.
// `lean` shifts the decision by the slack: below 0 towards fewer, above 0 towards more.
int64_t kept_count(SelectMethod method, double value, const std::vector<double>& sorted,
                   int64_t columns, double lean) {
  const auto visible = static_cast<int64_t>(sorted.size());
  double sum = 0.0;
  for (const double score : sorted) sum += std::exp(score - sorted[0]);
  const auto share = [&](int64_t at) { return std::exp(sorted[at] - sorted[0]) / sum; };
  int64_t count = 0;
  switch (method) {
    case SelectMethod::kThreshold:
      while (count < visible && share(count) * std::exp(2.0 * lean) > value) ++count;
      break;
    case SelectMethod::kTopK: count = static_cast<int64_t>(std::min(value, double(visible))); break;
    case SelectMethod::kDensity:
      count = std::max<int64_t>(
          1, static_cast<int64_t>((1.0 - std::sqrt(1.0 - value)) * double(columns)));
      break;
    case SelectMethod::kTopP:  // as few as reach the mass
      for (double mass = 0.0; count < visible && (count == 0 || mass < value + 2.0 * lean);) {
        mass += share(count++);
      }
      break;
  }
  return std::min(count, visible);
}

}  // namespace

int64_t wrong_choices(SelectMethod method, double value, const float* scores, int64_t columns,
                      const int32_t* bits, double slack) {
  std::vector<double> sorted;
  for (int64_t j = 0; j < columns; ++j) {
    if (scores[j] > -std::numeric_limits<float>::infinity()) sorted.push_back(scores[j]);
  }
  std::sort(sorted.begin(), sorted.end(), std::greater<>());
  const int64_t fewest = kept_count(method, value, sorted, columns, -slack);
  const int64_t most = kept_count(method, value, sorted, columns, slack);
  // The best score that may be left out, and the worst that may be kept.
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const double outside = fewest < int64_t(sorted.size()) ? sorted[fewest] : -kInfinity;
  const double inside = most > 0 ? sorted[most - 1] : kInfinity;
  int64_t wrong = 0;
  for (int64_t j = 0; j < columns; ++j) {
    const bool kept = static_cast<uint32_t>(bits[j / 32]) >> (j % 32) & 1u;
    const bool visible = scores[j] > -kInfinity;
    const bool must = visible && scores[j] > outside + 2.0 * slack;
    const bool may = visible && scores[j] >= inside - 2.0 * slack;
    wrong += (must && !kept) || (kept && !may);
  }
  return wrong;
}

}  // namespace seer::bench

// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <chrono>
#include <cmath>
#include <thread>

#include "timing.h"

namespace seer::bench {
namespace {

constexpr int kBurstLaunches = 5;
constexpr int kHostLaunches = 9;
constexpr int64_t kSpinCycles = 1'000'000;  // about half a millisecond

__global__ void spin_kernel(int64_t cycles) {
  const int64_t began = clock64();
  while (clock64() - began < cycles) {
  }
}

__global__ void read_kernel(const int4* words, int64_t count, int* sum) {
  const int64_t threads = int64_t{gridDim.x} * blockDim.x;
  int mine = 0;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += threads) {
    const int4 word = words[i];
    mine ^= word.x ^ word.y ^ word.z ^ word.w;
  }
  if (mine == 42) *sum = mine;  // never: the memory is zero. Without it nothing would be read.
}

int launches_within(double budget_ms, double one_ms, int most) {
  return std::clamp(static_cast<int>(budget_ms / std::max(one_ms, 1e-3)), 1, most);
}

double median_of(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return quantile(values, 0.5);
}

}  // namespace

double quantile(const std::vector<double>& sorted, double share) {
  const double at = share * double(sorted.size() - 1);
  const auto below = static_cast<size_t>(at);
  const size_t above = std::min(below + 1, sorted.size() - 1);
  return sorted[below] + (at - double(below)) * (sorted[above] - sorted[below]);
}

Timer::Timer(const Schedule& schedule)
    : schedule_(schedule), starts_(schedule.max_launches), ends_(schedule.max_launches) {
  int device = 0, l2_bytes = 0;
  check(cudaGetDevice(&device), "asking for the device");
  check(cudaDeviceGetAttribute(&l2_bytes, cudaDevAttrL2CacheSize, device), "asking for L2's size");
  sweep_words_ = 2 * int64_t{l2_bytes} / int64_t{sizeof(int4)};
  scratch_ = DeviceBuffer((sweep_words_ + 1) * int64_t{sizeof(int4)});
  check(cudaMemset(scratch_.as<>(), 0, scratch_.bytes()), "clearing memory");
  check(cudaDeviceSynchronize(), "clearing memory");
}

void Timer::sweep_l2() {
  int4* words = scratch_.as<int4>();
  read_kernel<<<1024, 256, 0, stream_>>>(words, sweep_words_,
                                         reinterpret_cast<int*>(words + sweep_words_));
}

std::vector<double> Timer::round(const std::function<void(cudaStream_t)>& launch, int warm,
                                 int timed, L2 l2) {
  if (warm == 0) spin_kernel<<<1, 1, 0, stream_>>>(kSpinCycles);
  for (int i = 0; i < warm; ++i) launch(stream_);
  for (int i = 0; i < timed; ++i) {
    if (l2 == L2::kCold) sweep_l2();
    starts_[i].record(stream_);
    launch(stream_);
    ends_[i].record(stream_);
  }
  stream_.wait();
  std::vector<double> ms;
  for (int i = 0; i < timed; ++i) ms.push_back(starts_[i].ms_until(ends_[i]));
  return ms;
}

Timing Timer::time(const std::function<void(cudaStream_t)>& launch, Protocol protocol, L2 l2) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> host_us;
  stream_.wait();
  for (int i = 0; i < kHostLaunches; ++i) {
    const auto began = Clock::now();
    starts_[0].record(stream_);
    launch(stream_);
    ends_[0].record(stream_);
    host_us.push_back(std::chrono::duration<double, std::micro>(Clock::now() - began).count());
  }
  const double estimate = median_of(round(launch, 1, std::min(3, schedule_.max_launches), l2));
  std::vector<double> all;
  for (int r = 0; r < schedule_.rounds; ++r) {
    stream_.wait();
    std::this_thread::sleep_for(std::chrono::duration<double, std::milli>(schedule_.pause_ms));
    const int most = schedule_.max_launches;
    std::vector<double> ms;
    if (protocol == Protocol::kBurst) {
      const int few = std::min(kBurstLaunches, most);
      ms = round(launch, 0, launches_within(schedule_.burst_ms, estimate, few), l2);
    } else {
      const double warm = std::ceil(schedule_.warm_ms / std::max(estimate, 1e-3));
      const int timed = launches_within(schedule_.sustained_ms, estimate, most);
      ms = round(launch, std::max(static_cast<int>(warm), 1), std::max(timed, std::min(3, most)),
                 l2);
    }
    all.insert(all.end(), ms.begin(), ms.end());
  }
  std::sort(all.begin(), all.end());
  return {quantile(all, 0.5), quantile(all, 0.05), quantile(all, 0.95),
          static_cast<int>(all.size()), median_of(host_us)};
}

}  // namespace seer::bench

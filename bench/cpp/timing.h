// SPDX-License-Identifier: Apache-2.0
// The timing protocol of docs/benchmarks.md, for one contestant.
//
//   burst      the first launches after a pause
//   sustained  launches that follow, after the pause, `warm_ms` of back-to-back launches
//
// A power-bound GPU runs a burst up to 15 % faster: the two must not be compared with each other.
// Each time is between two events around one launch. Launches are enqueued ahead (a burst behind a
// short spin on the GPU), so the host's work does not count as long as it takes less time than the
// kernel; host_us tells.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "device.h"
#include "names.h"

namespace seer::bench {

struct Schedule {
  int rounds = 3;
  double pause_ms = 200.0;
  double warm_ms = 150.0;
  double burst_ms = 15.0;  // bound of the timed part of a round
  double sustained_ms = 80.0;
  int max_launches = 100;
};

// Of all timed launches of all rounds, in ms.
struct Timing {
  double median = 0.0, p5 = 0.0, p95 = 0.0;
  int launches = 0;
  double host_us = 0.0;  // the host's share of a launch, on an idle GPU

  // Whether this may be the host's time: its share above 90 % of the whole.
  bool host_bound() const { return host_us > 0.9e3 * median; }
};

// Value below which `share` of the sorted values lie, interpolated.
double quantile(const std::vector<double>& sorted, double share);

class Timer {
 public:
  explicit Timer(const Schedule& schedule);

  // `launch` enqueues one launch on the stream; it must have run once before. Cold: caches are
  // swept before every timed launch, by reading twice the size of L2 (reads leave nothing to be
  // written back while the launch runs).
  Timing time(const std::function<void(cudaStream_t)>& launch, Protocol protocol, L2 l2);

 private:
  std::vector<double> round(const std::function<void(cudaStream_t)>& launch, int warm, int timed,
                            L2 l2);
  void sweep_l2();

  Schedule schedule_;
  Stream stream_;
  std::vector<Event> starts_, ends_;
  DeviceBuffer scratch_;  // twice the size of L2, then the sum that keeps the sweep's reads alive
  int64_t sweep_words_ = 0;
};

}  // namespace seer::bench

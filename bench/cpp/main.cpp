// SPDX-License-Identifier: Apache-2.0
// seer_bench: the kernels of seer_cuda, timed and checked by themselves. bench/cpp/README.md.
#include <unistd.h>

#include <exception>
#include <iostream>
#include <new>
#include <optional>
#include <stdexcept>

#include "ceilings.h"
#include "options.h"
#include "problem.h"
#include "report.h"

namespace seer::bench {
namespace {

constexpr int kFailed = 1, kUnusable = 2;

std::string title_of(const Case& c) {
  std::string title;
  for (const Field& field : fields_of(c)) title += (title.empty() ? "" : " ") + field.text;
  return title;
}

// What the standard library throws where the host's memory ends says nothing to a reader.
std::string text_of(const std::exception& error) {
  const bool memory = dynamic_cast<const std::bad_alloc*>(&error) != nullptr ||
                      dynamic_cast<const std::length_error*>(&error) != nullptr;
  return memory ? "host memory: expected room for the mask and what is compared, got none. Take "
                  "fewer rows or heads, or --mask dense."
                : error.what();
}

// Whether `run` did, and returned true; else the reason is told, and the next case may follow.
template <class Run>
bool attempt(const Case& c, const Run& run) try {
  return run();
} catch (const std::exception& error) {
  std::cerr << "seer_bench: " << title_of(c) << ": " << text_of(error) << "\n";
  return false;
}

// Adds the rows of one case. Returns whether it was right, if that was asked for.
bool run_case(const Options& options, const Device& device, const Ceilings& ceilings, Timer* timer,
              const Case& c, std::vector<Row>* rows) {
  const HostMask mask = make_mask(c, options.seed);
  const std::unique_ptr<Problem> problem = make_problem(c, mask, device, options.seed);
  const auto launch = [&](cudaStream_t stream) { problem->launch(stream); };
  launch(nullptr);
  check(cudaStreamSynchronize(nullptr), "running the kernel");
  std::string verdict;
  if (options.verify) {
    const Verdict found = problem->verify();
    if (!found.ok()) {
      std::cerr << "seer_bench: " << title_of(c) << ": wrong result: " << found.text() << "\n";
      return false;
    }
    verdict = found.text();
  }
  const Work work = work_of(c, mask);
  for (const Protocol protocol : options.protocol) {
    for (const L2 l2 : options.l2) {
      const Timing timing = timer->time(launch, protocol, l2);
      rows->push_back(
          timed_row(c, work, problem->kernel(), protocol, l2, timing, ceilings, verdict));
    }
  }
  return true;
}

// The exit status of a run.
int told(size_t failed, size_t cases) {
  if (failed == 0) return 0;
  std::cerr << "seer_bench: " << failed << " of " << cases << " cases failed\n";
  return kFailed;
}

int run(const Options& options) {
  const std::vector<Case> cases = expand(options.sweep);
  std::vector<Row> rows;
  size_t done = 0, failed = 0;
  if (options.plan) {
    for (const Case& c : cases) {
      failed += !attempt(c, [&] {
        rows.push_back(plan_row(c, make_mask(c, options.seed)));
        return true;
      });
    }
    print_report(std::cout, options.format, nullptr, {}, rows);
    return told(failed, cases.size());
  }
  std::optional<Device> device;
  try {
    device = open_device(options.device);
  } catch (const CudaError& error) {
    throw UsageError(error.what());
  }
  Timer timer(options.schedule);
  const Ceilings ceilings = options.ceilings ? measure_ceilings(&timer, *device) : Ceilings{};
  const bool watched = isatty(STDERR_FILENO);
  for (const Case& c : cases) {
    if (watched) std::cerr << "\r" << ++done << " of " << cases.size() << " cases" << std::flush;
    failed += !attempt(c, [&] { return run_case(options, *device, ceilings, &timer, c, &rows); });
  }
  if (watched) std::cerr << "\n";
  print_report(std::cout, options.format, &*device, ceilings, rows);
  return told(failed, cases.size());
}

int run_main(int argc, const char* const* argv) try {
  const Options options = parse_options(argc, argv);
  switch (options.action) {
    case Action::kHelp: std::cout << help_text(); return 0;
    case Action::kVersion: std::cout << "seer_bench " SEER_VERSION "\n"; return 0;
    case Action::kList: print_variants(std::cout, options.format); return 0;
    case Action::kRun: break;
  }
  return run(options);
} catch (const UsageError& error) {
  std::cerr << "seer_bench: " << error.what() << "\n";
  return kUnusable;
} catch (const std::exception& error) {
  std::cerr << "seer_bench: " << text_of(error) << "\n";
  return kFailed;
}

}  // namespace
}  // namespace seer::bench

int main(int argc, char** argv) { return seer::bench::run_main(argc, argv); }

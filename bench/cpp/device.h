// SPDX-License-Identifier: Apache-2.0
// Owners of CUDA memory, streams and events; errors are exceptions.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "seer/status.h"

namespace seer::bench {

struct CudaError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void check(cudaError_t error, const char* doing) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next launch would report this error as its own
  throw CudaError(std::string("CUDA: ") + doing + ": " + cudaGetErrorName(error) + " (" +
                  cudaGetErrorString(error) + ")");
}

inline void check(const Status& status) {
  if (!status.ok()) throw CudaError(status.text);
}

class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  explicit DeviceBuffer(int64_t bytes) : bytes_(bytes) {
    if (bytes == 0) return;
    const cudaError_t error = cudaMalloc(&data_, bytes);
    if (error != cudaSuccess) {
      check(error, ("allocating " + std::to_string(bytes >> 20) + " MiB").c_str());
    }
  }
  DeviceBuffer(DeviceBuffer&& other) noexcept { swap(other); }
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~DeviceBuffer() { cudaFree(data_); }

  template <class T = void>
  T* as() const {
    return static_cast<T*>(data_);
  }
  int64_t bytes() const { return bytes_; }

  // Full of NaN and set bits: what a kernel fails to write is seen, not taken from an earlier case.
  static DeviceBuffer poisoned(int64_t bytes) {
    DeviceBuffer buffer(bytes);
    check(cudaMemset(buffer.data_, 0xff, bytes), "filling memory");
    return buffer;
  }
  template <class T>
  static DeviceBuffer copy_of(const std::vector<T>& host) {
    DeviceBuffer buffer(static_cast<int64_t>(host.size() * sizeof(T)));
    check(cudaMemcpy(buffer.data_, host.data(), buffer.bytes_, cudaMemcpyHostToDevice),
          "copying to the device");
    return buffer;
  }
  template <class T>
  std::vector<T> to_host() const {
    std::vector<T> host(bytes_ / sizeof(T));
    check(cudaMemcpy(host.data(), data_, bytes_, cudaMemcpyDeviceToHost), "copying to the host");
    return host;
  }

 private:
  void swap(DeviceBuffer& other) {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
  }
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

class Stream {
 public:
  Stream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "making a stream"); }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  operator cudaStream_t() const { return stream_; }
  void wait() const { check(cudaStreamSynchronize(stream_), "running the kernels"); }

 private:
  cudaStream_t stream_ = nullptr;
};

class Event {
 public:
  Event() { check(cudaEventCreate(&event_), "making an event"); }
  Event(Event&& other) noexcept : event_(std::exchange(other.event_, nullptr)) {}
  ~Event() {
    if (event_ != nullptr) cudaEventDestroy(event_);
  }
  void record(cudaStream_t stream) const { check(cudaEventRecord(event_, stream), "an event"); }
  // Both must have happened.
  double ms_until(const Event& later) const {
    float ms = 0.0f;
    check(cudaEventElapsedTime(&ms, event_, later.event_), "reading events");
    return ms;
  }

 private:
  cudaEvent_t event_ = nullptr;
};

// What the report says about the machine.
struct Device {
  int index = 0, sm = 0, multiprocessors = 0;
  std::string name, driver, runtime;
};

// Makes device `index` the current one. Throws CudaError where there is none.
Device open_device(int index);

}  // namespace seer::bench

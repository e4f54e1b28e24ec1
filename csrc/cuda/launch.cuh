// The one way to launch a kernel: guards the device, states the limits that need stating, and checks.
#pragma once
#include <stdint.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

#include "cuda/device.h"
#include "cuda/target.h"

namespace kdfast::cuda {

// A check of our own: torch's STD_CUDA_CHECK needs a symbol that a CPU-only torch does not have.
inline void check_cuda(cudaError_t error, const char* op, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(op) + ": " + what + ": " + cudaGetErrorString(error));
}

// cudart is linked statically, so that the current device is set in this copy of it.
class DeviceGuard {
 public:
  DeviceGuard(int device, const char* op) {
    check_cuda(cudaGetDevice(&before_), op, "cudaGetDevice");
    if (device == before_) return;
    check_cuda(cudaSetDevice(device), op, "cudaSetDevice");
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

struct Grid {
  int64_t blocks;
  int threads;
  int64_t shared = 0;  // bytes
  int cluster = 1;     // blocks
};

// A launch's grid as the runtime takes it; where it is in clusters it points to itself.
struct LaunchConfig {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute cluster = {};

  LaunchConfig(const Target& target, const Grid& grid) {
    config.gridDim = dim3(unsigned(grid.blocks));
    config.blockDim = dim3(unsigned(grid.threads));
    config.dynamicSmemBytes = size_t(grid.shared);
    config.stream = cudaStream_t(target.stream);
    if (grid.cluster == 1) return;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = unsigned(grid.cluster);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
  LaunchConfig(const LaunchConfig&) = delete;
  LaunchConfig& operator=(const LaunchConfig&) = delete;
};

// What is asked of the driver, or told it, once per key and process; any thread may be the first.
template <class Key>
class Once {
 public:
  template <class Make>
  int operator()(const Key& key, Make make) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = known_.find(key);
    if (found != known_.end()) return found->second;
    return known_[key] = make();
  }

 private:
  std::mutex mutex_;
  std::map<Key, int> known_;
};

// Lets a kernel have what a grid needs, on the current device, `device`. Of shared memory all there is, not what this
// call takes: kernels are shared by all threads, and one would lower it under another.
inline void allow(const char* op, const void* kernel, int device, const Grid& grid) {
  static Once<std::pair<const void*, int>> once;
  if (grid.shared > 48 << 10) {
    once({kernel, device}, [&] {
      int most = 0;
      check_cuda(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), op, "shared memory");
      cudaFuncAttributes fixed = {};
      check_cuda(cudaFuncGetAttributes(&fixed, kernel), op, "kernel");
      const int dynamic = most - int(fixed.sharedSizeBytes);
      check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, dynamic), op,
                 "shared memory");
      return dynamic;
    });
  }
  if (grid.cluster > 8) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), op, "cluster size");
  }
}

// Whether the device has room for one cluster of such a grid: of 16 blocks not every one does.
inline bool has_room(const char* op, const void* kernel, const Target& target, const Grid& grid) {
  using Shape = std::tuple<const void*, int, int, int, int64_t>;
  static Once<Shape> once;
  const int found = once(Shape{kernel, target.device, grid.cluster, grid.threads, grid.shared}, [&] {
    const DeviceGuard guard(target.device, op);
    allow(op, kernel, target.device, grid);
    const LaunchConfig of(target, grid);
    int clusters = 0;
    // An error is a no as well: a cluster of this size is beyond the device.
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &of.config) != cudaSuccess) cudaGetLastError();
    return clusters;
  });
  return found > 0;
}

template <class... Parameters>
void launch(const char* op, void (*kernel)(Parameters...), const Target& target, const Grid& grid,
            std::type_identity_t<Parameters>... arguments) {
  constexpr int64_t kMostBlocks = (int64_t(1) << 31) - 1;
  if (grid.blocks > kMostBlocks) {
    throw std::runtime_error(std::string(op) + ": expected at most 2^31 - 1 blocks, got " +
                             std::to_string(grid.blocks));
  }
  const DeviceGuard guard(target.device, op);
  allow(op, (const void*)kernel, target.device, grid);
  const LaunchConfig of(target, grid);
  check_cuda(cudaLaunchKernelEx(&of.config, kernel, arguments...), op, "launch");
}

}  // namespace kdfast::cuda

// The one way to launch a kernel: guards the device, states the limits that need stating, and checks.
#pragma once
#include <stdint.h>

#include <stdexcept>
#include <string>
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

template <class... Parameters>
void launch(const char* op, void (*kernel)(Parameters...), const Target& target, const Grid& grid,
            std::type_identity_t<Parameters>... arguments) {
  constexpr int64_t kMostBlocks = (int64_t(1) << 31) - 1;
  if (grid.blocks > kMostBlocks) {
    throw std::runtime_error(std::string(op) + ": expected at most 2^31 - 1 blocks, got " +
                             std::to_string(grid.blocks));
  }
  const DeviceGuard guard(target.device, op);
  if (grid.shared > 48 << 10) {
    check_cuda(cudaFuncSetAttribute((const void*)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(grid.shared)),
               op, "shared memory");
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(grid.blocks));
  config.blockDim = dim3(unsigned(grid.threads));
  config.dynamicSmemBytes = size_t(grid.shared);
  config.stream = cudaStream_t(target.stream);
  cudaLaunchAttribute cluster = {};
  if (grid.cluster > 1) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = unsigned(grid.cluster);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
  if (grid.cluster > 8) {
    check_cuda(cudaFuncSetAttribute((const void*)kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), op,
               "cluster size");
  }
  check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...), op, "launch");
}

}  // namespace kdfast::cuda

#include "cuda/runtime.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>

#include "cuda/divergence.h"
#include "cuda/qk.h"
#include "cuda/tensor_map.h"
#include "host/build_info.h"

namespace kdfast::cuda {
namespace {

using CurrentStream = int32_t (*)(int32_t device, void** stream);

// Looked up, not linked: a CPU-only torch does not have the symbol, and this library must load there too.
CurrentStream find_current_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
  return library ? CurrentStream(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
}

int attribute(const char* op, cudaDeviceAttr name, int device) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, name, device);
  STD_TORCH_CHECK(error == cudaSuccess, op, ": cudaDeviceGetAttribute: ", cudaGetErrorString(error));
  return value;
}

// KDFAST_CUDA_NO_CLUSTERS: as if the device were older than Hopper.
bool forbidden() {
  const char* set = std::getenv("KDFAST_CUDA_NO_CLUSTERS");
  return set && *set && *set != '0';
}

// 16 blocks is beyond what CUDA promises everywhere; data-center Hopper and Blackwell have it.
int max_cluster(int major) {
  if (major < 9 || forbidden()) return 1;
  return major < 12 ? 16 : 8;
}

// Every build has the kernels for sm_90a, and nothing else runs them: not what comes after Hopper either.
bool has_wgmma(int major, int minor) { return major == 9 && minor == 0 && !forbidden() && has_tensor_maps(); }

}  // namespace

Target target_of(const char* op, const torch::stable::Tensor& t) {
  static const CurrentStream current_stream = find_current_stream();
  STD_TORCH_CHECK(current_stream, op,
                  ": expected a torch with CUDA (libtorch_cuda.so with aoti_torch_get_current_cuda_stream), got none");
  Target target = {t.get_device_index(), nullptr};
  STD_TORCH_CHECK(current_stream(target.device, &target.stream) == 0, op, ": torch has no stream on device ",
                  target.device);
  return target;
}

DeviceLimits limits_of(const char* op, const Target& target) {
  auto of = [&](cudaDeviceAttr name) { return attribute(op, name, target.device); };
  const int major = of(cudaDevAttrComputeCapabilityMajor), minor = of(cudaDevAttrComputeCapabilityMinor);
  return {of(cudaDevAttrMultiProcessorCount), of(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          of(cudaDevAttrMaxSharedMemoryPerMultiprocessor), max_cluster(major), has_wgmma(major, minor)};
}

torch::stable::Tensor new_output(const torch::stable::Tensor& like, const std::vector<int64_t>& sizes,
                                 torch::headeronly::ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

}  // namespace kdfast::cuda

namespace kdfast {
namespace {

std::vector<CudaKernel> kernels() {
  std::vector<CudaKernel> found;
  for (const auto& family : {cuda::divergence_kernels(), cuda::layer_kernels(), cuda::qk_kernels()}) {
    for (const cuda::NamedKernel& kernel : family) {
      cudaFuncAttributes a = {};
      const cudaError_t error = cudaFuncGetAttributes(&a, kernel.function);
      STD_TORCH_CHECK(error == cudaSuccess, "cuda_kernels: ", kernel.name, ": ", cudaGetErrorString(error));
      found.push_back({kernel.name, a.numRegs, int(a.localSizeBytes), a.maxThreadsPerBlock, a.binaryVersion});
    }
  }
  return found;
}

}  // namespace

const CudaBuild* cuda_build() {
  static const CudaBuild build{KDFAST_CUDA_TOOLKIT, KDFAST_CUDA_ARCHITECTURES, kernels};
  return &build;
}

}  // namespace kdfast

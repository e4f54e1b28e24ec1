// What the operator library tells the pybind11 module about itself.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#define KDFAST_EXPORT __attribute__((visibility("default")))

namespace kdfast {

KDFAST_EXPORT std::vector<std::string> cpu_variants();
KDFAST_EXPORT std::string cpu_variant_name();
KDFAST_EXPORT void set_cpu_variant(const std::string& name);
// Whether products on the CPU are faster by the variant's own kernels (csrc/cpu/matmul.cpp) than by torch's library:
// of float32, and float16 that is widened; or of bfloat16 into float32.
KDFAST_EXPORT bool own_products(bool bf16);
KDFAST_EXPORT void vector_exp2(const float* x, float* y, int64_t count);
KDFAST_EXPORT void vector_log2(const float* x, float* y, int64_t count);

struct CudaKernel {
  std::string name;
  int registers, local_bytes, max_threads, binary_version;
};
struct CudaBuild {
  const char *toolkit, *architectures;
  std::vector<CudaKernel> (*kernels)();  // as the driver loaded them: needs a device
};
// Null in builds without CUDA. The library tells, not the module: the one may be built elsewhere than the other.
KDFAST_EXPORT const CudaBuild* cuda_build();

}  // namespace kdfast

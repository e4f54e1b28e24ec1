// Test-only: csrc/cuda as CPU operators kdfast_cuda_host::*, on a device that the tests describe. Outputs lie between
// canaries and start as NaN.
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <thread>
#include <utility>

#include "cuda/device.h"
#include "cuda/divider.h"
#include "cuda/launch.cuh"
#include "cuda/runtime.h"

namespace kdfast::cuda {
namespace {

using torch::stable::Tensor;

constexpr int64_t kCanary = 64;  // bytes

struct Output {
  Tensor memory;  // canary, shift, the output, canary
  int64_t begin, bytes;
};
std::vector<Output> outputs;
int64_t output_shift = 0;  // elements
DeviceLimits limits = {};
int device = 0;  // every one that is described is another: what launches keep of a device is not this one's

Tensor with_dtype(const Tensor& bytes, torch::headeronly::ScalarType dtype) {
  std::array<StableIValue, 2> stack = {torch::stable::detail::from(bytes), torch::stable::detail::from(dtype)};
  if (torch_call_dispatcher("aten::view", "dtype", stack.data(), TORCH_ABI_VERSION)) throw std::runtime_error("view");
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace

Target target_of(const char*, const Tensor&) { return {device, nullptr}; }

DeviceLimits limits_of(const char*, const Target&) { return limits; }

Tensor new_output(const Tensor& like, const std::vector<int64_t>& sizes, torch::headeronly::ScalarType dtype) {
  int64_t count = 1;
  for (int64_t size : sizes) count *= size;
  const auto element = int64_t(torch::stable::new_empty(like, {0}, dtype).element_size());
  const int64_t begin = kCanary + output_shift * element, bytes = count * element;
  Tensor memory = torch::stable::new_empty(like, {begin + bytes + kCanary}, torch::headeronly::ScalarType::Byte);
  std::memset(memory.mutable_data_ptr(), cuda_host::kPoison, size_t(memory.numel()));
  outputs.push_back({memory, begin, bytes});
  return torch::stable::view(with_dtype(torch::stable::narrow(memory, 0, begin, bytes), dtype), sizes);
}

}  // namespace kdfast::cuda

#define EXPORT extern "C" __attribute__((visibility("default")))

// The device from now on, by default without wgmma, the order of its threads (fibers.h), and by how many elements
// outputs are misaligned. Three blocks of any size fit a multiprocessor, so that the smallest cluster that fits at all
// is planned.
EXPORT void cuda_host_device(int multiprocessors, int shared_per_block, int max_cluster, unsigned seed, int shift) {
  const int64_t per_multiprocessor = 3 * (shared_per_block + kdfast::cuda::kReservedShared);
  kdfast::cuda::limits = {multiprocessors, shared_per_block, per_multiprocessor, max_cluster};
  kdfast::cuda::output_shift = shift;
  ++kdfast::cuda::device;
  cuda_host::room = cuda_host::kMostCluster;
  cuda_host::machine().seed = seed;
}

// Of the device that was described last.
EXPORT void cuda_host_room(int largest_cluster) { cuda_host::room = largest_cluster; }
EXPORT void cuda_host_wgmma(int has_it) { kdfast::cuda::limits.wgmma = has_it; }

// The calls since they were last asked for.
EXPORT int cuda_host_shared_calls() { return std::exchange(cuda_host::shared_calls, 0); }
EXPORT int cuda_host_room_calls() { return std::exchange(cuda_host::room_calls, 0); }

namespace kdfast::cuda {
namespace {

void last_byte(int shared, std::atomic<int>* runs) {
  shared_memory()[shared - 1] = 1;
  if (threadIdx.x == 0) ++*runs;
}

}  // namespace
}  // namespace kdfast::cuda

// Two threads launch a kernel at once, on a device that is new to both, with `first` and `second` bytes of shared
// memory. Returns how often it ran.
EXPORT int cuda_host_launch_by_two(int first, int second) {
  using namespace kdfast::cuda;
  ++device;
  std::atomic<int> ready{0}, runs{0};
  auto launch_of = [&](int shared) {
    ++ready;
    while (ready < 2) std::this_thread::yield();
    try {
      launch("by_two", last_byte, Target{device, nullptr}, Grid{1, 32, shared}, shared, &runs);
    } catch (const std::runtime_error&) {  // it did not run
    }
  };
  std::thread one(launch_of, first), two(launch_of, second);
  one.join();
  two.join();
  return runs;
}

EXPORT unsigned cuda_host_divided(unsigned n, int64_t by) { return kdfast::cuda::Divider(by)(n); }

// How many canary bytes around the outputs since the last call were overwritten.
EXPORT int cuda_host_clobbered() {
  int count = 0;
  for (const auto& output : kdfast::cuda::outputs) {
    const auto* at = (const unsigned char*)output.memory.const_data_ptr();
    for (int64_t i = 0; i < output.memory.numel(); ++i) {
      const bool inside = i >= output.begin && i < output.begin + output.bytes;
      count += !inside && at[i] != cuda_host::kPoison;
    }
  }
  kdfast::cuda::outputs.clear();
  return count;
}

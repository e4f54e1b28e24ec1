// Test-only: what csrc/cuda/device.h and launch.cuh take from CUDA, for the CPU (fibers.h). Included by device.h where
// the compiler is not nvcc.
#pragma once
#include <math.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <thread>
#include <utility>

#include "fibers.h"

#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
#define KDFAST_DEVICE inline
#define KDFAST_DEVICE_CALL inline

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
using std::max;
using std::min;

// ---- the runtime, as far as launch.cuh calls it ----
using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributeNonPortableClusterSizeAllowed };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
};
namespace cuda_host {
constexpr int64_t kStaticShared = 64;  // of every kernel
// What a kernel was allowed on a device: a launch that needs an attribute must have set it, and none is taken back.
struct Allowed {
  int64_t shared = 48 << 10;
  bool large_cluster = false;
};
inline std::map<std::pair<const void*, int>, Allowed> allowed;
inline thread_local int current_device = 0;
inline std::mutex mutex;  // of all that is here: the runtime may be called by any thread, one at a time runs a kernel
inline int room = kMostCluster;  // the largest cluster that the device has room for
// Calls since they were last read: of the attribute of shared memory, and whether there is room.
inline int shared_calls = 0, room_calls = 0;
inline Allowed& allowed_of(const void* kernel) { return allowed[{kernel, current_device}]; }
}  // namespace cuda_host

inline const char* cudaGetErrorString(cudaError_t) { return "refused by the host shim"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = cuda_host::current_device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  cuda_host::current_device = device;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = int(cuda_host::kMostShared);
  return cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->sharedSizeBytes = size_t(cuda_host::kStaticShared);
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  std::this_thread::yield();  // another may come between this and the launch
  const std::lock_guard<std::mutex> lock(cuda_host::mutex);
  cuda_host::Allowed& of = cuda_host::allowed_of(kernel);
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    of.large_cluster = value;
    return cudaSuccess;
  }
  ++cuda_host::shared_calls;
  if (value < of.shared || value > cuda_host::kMostShared - cuda_host::kStaticShared) return cudaErrorInvalidValue;
  of.shared = value;
  return cudaSuccess;
}
namespace cuda_host {
inline bool allows(const void* kernel, const cudaLaunchConfig_t* config) {
  const Allowed& of = allowed_of(kernel);
  const int cluster = config->numAttrs ? int(config->attrs->val.clusterDim.x) : 1;
  return int64_t(config->dynamicSmemBytes) <= of.shared && cluster <= kMostCluster &&
         (cluster <= 8 || of.large_cluster);
}
}  // namespace cuda_host
inline cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel, const cudaLaunchConfig_t* config) {
  const std::lock_guard<std::mutex> lock(cuda_host::mutex);
  ++cuda_host::room_calls;
  if (!cuda_host::allows(kernel, config)) return cudaErrorInvalidValue;
  *clusters = int(config->attrs->val.clusterDim.x) <= cuda_host::room;
  return cudaSuccess;
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  const std::lock_guard<std::mutex> lock(cuda_host::mutex);
  auto& machine = cuda_host::machine();
  const int cluster = config->numAttrs ? int(config->attrs->val.clusterDim.x) : 1;
  const unsigned blocks = config->gridDim.x, threads = config->blockDim.x;
  const bool wrong = blocks == 0 || blocks % unsigned(cluster) || threads % 32 || threads == 0 || threads > 1024 ||
                     cluster > cuda_host::room || !cuda_host::allows((const void*)kernel, config);
  if (wrong) return cudaErrorInvalidValue;
  gridDim.x = blocks;
  blockDim.x = threads;
  const std::function<void()> body = [&] { kernel(Parameters(arguments)...); };
  for (unsigned first = 0; first < blocks; first += unsigned(cluster)) {
    machine.run_cluster(first, cluster, int(threads), config->dynamicSmemBytes, body);
  }
  return cudaSuccess;
}

// ---- what a kernel may call ----
inline void __syncthreads() { cuda_host::machine().meet(cuda_host::machine().current().block->meeting); }

namespace cuda_host {
// What lane `from` of this thread's warp passes.
inline float shuffled(unsigned mask, float x, unsigned from) {
  auto& machine = cuda_host::machine();
  Fiber& me = machine.current();
  Warp& warp = me.block->warps[me.thread / 32];
  if (mask != ~0u || warp.meeting.members != 32) machine.fail("a shuffle that is not by a whole warp");
  float* slots = warp.slots[me.shuffles++ % 2];
  slots[me.thread % 32] = x;
  machine.meet(warp.meeting);
  return slots[from];
}
}  // namespace cuda_host
inline float __shfl_xor_sync(unsigned mask, float x, int apart) {
  return cuda_host::shuffled(mask, x, threadIdx.x % 32 ^ unsigned(apart));
}
inline float __shfl_sync(unsigned mask, float x, int lane, int width) {
  const unsigned own = threadIdx.x % 32, group = own - own % unsigned(width);
  return cuda_host::shuffled(mask, x, group + unsigned(lane) % unsigned(width));
}

namespace kdfast::cuda {

inline unsigned char* shared_memory() { return cuda_host::machine().current().block->shared(); }

inline float exp2_fast(float x) {
  const float y = exp2f(x);
  return fabsf(y) < 1.17549435e-38f ? 0.f : y;
}
inline float log2_fast(float x) { return log2f(fabsf(x) < 1.17549435e-38f ? 0.f : x); }
inline float reciprocal_fast(float x) { return 1 / x; }
inline float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline void check_aligned(const void* p, int bytes = 16) {
  if (uintptr_t(p) % unsigned(bytes)) cuda_host::machine().fail("a wide access to a misaligned address");
}
inline uint4 load16(const void* p) {
  check_aligned(p);
  uint4 v;
  std::memcpy(&v, p, 16);
  return v;
}
inline uint2 load8(const void* p) {
  check_aligned(p, 8);
  uint2 v;
  std::memcpy(&v, p, 8);
  return v;
}
inline void store16(void* p, uint4 v) {
  check_aligned(p);
  std::memcpy(p, &v, 16);
}
inline void store8(void* p, uint2 v) {
  check_aligned(p, 8);
  std::memcpy(p, &v, 8);
}
inline uint32_t shared_or(uint32_t* word, uint32_t bits) {
  const uint32_t before = *word & bits;
  *word |= bits;
  return before;
}
inline void copy16_async(void* shared, const void* global) { store16(shared, load16(global)); }
inline void copies_arrived() {}

template <class T>
inline float widen_bits(uint16_t bits) {
  if constexpr (std::is_same_v<T, BFloat16>) return as_float(uint32_t(bits) << 16);
  return float(torch::headeronly::Half(bits, torch::headeronly::Half::from_bits()));
}
template <class T>
inline uint16_t narrow_bits(float x) {
  if constexpr (std::is_same_v<T, BFloat16>) return torch::headeronly::BFloat16(x).x;
  return torch::headeronly::Half(x).x;
}
template <class T>
inline void widen_pair(T, uint32_t pair, float* x) {
  x[0] = widen_bits<T>(uint16_t(pair));
  x[1] = widen_bits<T>(uint16_t(pair >> 16));
}
template <class T>
inline uint32_t narrow_pair(T, float lo, float hi) {
  return narrow_bits<T>(lo) | uint32_t(narrow_bits<T>(hi)) << 16;
}
template <class T>
inline uint32_t max_pair(T type, uint32_t a, uint32_t b) {
  float x[2], y[2];
  widen_pair(type, a, x);
  widen_pair(type, b, y);
  return narrow_pair(type, fmaxf(x[0], y[0]), fmaxf(x[1], y[1]));
}

struct alignas(8) PushBarrier {
  int expected, pushed;
};
inline int cluster_rank() { return int(cuda_host::machine().current().block->rank); }
inline void cluster_announce(PushBarrier* barriers, int first_bytes, int second_bytes) {
  auto& cluster = cuda_host::machine().cluster;
  if (threadIdx.x == 0) {
    barriers[0] = {first_bytes, 0};
    barriers[1] = {second_bytes, 0};
  }
  ++cluster.waiting;
  cluster.release();
  cuda_host::machine().progress();
}
inline void cluster_ready() {
  auto& machine = cuda_host::machine();
  while (machine.cluster.turn == 0) machine.yield();
  machine.progress();
}
template <class T>
inline void cluster_push(T* to, PushBarrier* barrier, int rank, T v) {
  auto& machine = cuda_host::machine();
  unsigned char *own = machine.current().block->shared(), *theirs = machine.peer(rank).shared();
  if (machine.cluster.turn == 0) machine.fail("a push to a block that may not run yet");
  std::memcpy(theirs + ((unsigned char*)to - own), &v, sizeof(T));
  ((PushBarrier*)(theirs + ((unsigned char*)barrier - own)))->pushed += int(sizeof(T));
  machine.progress();
}
inline void pushes_arrived(PushBarrier* barrier) {
  auto& machine = cuda_host::machine();
  while (barrier->pushed < barrier->expected) machine.yield();
  if (barrier->pushed != barrier->expected) machine.fail("more bytes pushed than the barrier expects");
  machine.progress();
}

}  // namespace kdfast::cuda

// x *= factor in place: 2 x elements x size of traffic, or none where the factor on the device is 1, which is what a
// loss that is the root of its graph gets.
#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/scale.h"
#include "cuda/vector.cuh"

namespace kdfast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerMultiprocessor = 8;

template <class T>
__global__ void __launch_bounds__(kThreads) scale_kernel(T* x, int64_t count, const float* factor) {
  using V = Vector<T>;
  const float f = *factor;
  if (f == 1.f) return;
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x, threads = int64_t(gridDim.x) * kThreads;
  const int64_t to_boundary = int64_t((0 - uintptr_t(x) / sizeof(T)) & (V::count - 1));
  const int64_t head = to_boundary < count ? to_boundary : count, vectors = (count - head) / V::count;
  auto scale_one = [&](int64_t i) { x[i] = V::narrow_one(V::widen_one(x[i]) * f); };
  if (thread < head) scale_one(thread);
  for (int64_t v = thread; v < vectors; v += threads) {
    T* at = x + head + v * V::count;
    float values[V::count];
    V::widen(*(const uint4*)at, values);  // not load16: that is for memory nobody writes
#pragma unroll
    for (int e = 0; e < V::count; ++e) values[e] *= f;
    store16(at, V::narrow(values));
  }
  const int64_t tail = head + vectors * V::count;
  if (thread < count - tail) scale_one(tail + thread);
}

}  // namespace

void launch_scale(const char* op, const Target& target, Element type, void* x, int64_t count, const float* factor,
                  int multiprocessors) {
  const int64_t most = int64_t(multiprocessors) * kBlocksPerMultiprocessor;
  const Grid grid{std::clamp<int64_t>(count / (kThreads * 8), 1, most), kThreads};
  if (type == Element::f32) return launch(op, scale_kernel<float>, target, grid, (float*)x, count, factor);
  if (type == Element::bf16) return launch(op, scale_kernel<BFloat16>, target, grid, (BFloat16*)x, count, factor);
  launch(op, scale_kernel<Float16>, target, grid, (Float16*)x, count, factor);
}

}  // namespace kdfast::cuda

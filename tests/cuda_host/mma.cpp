// Test-only: the matrix instructions by themselves, with each lane's registers as they are given, for
// tests/test_cuda_mma_host.py.
#include "cuda/mma.cuh"

#include "cuda/launch.cuh"

namespace kdfast::cuda {
namespace {

enum Instruction { kBFloat16, kFloat16, kTf32, kLoad, kLoadTransposed, kSplit };

struct Registers {
  const uint32_t *a, *b;  // of lane i from 4 i and 2 i on; or a: the 32 rows that are loaded
  float* c;               // from 4 i on
  uint32_t* loaded;       // the same
};

void run(int instruction, Registers of) {
  const int lane = int(threadIdx.x);
  uint32_t a[4], b[2], loaded[4];
  std::memcpy(a, of.a + 4 * lane, sizeof(a));
  if (instruction == kLoad || instruction == kLoadTransposed) {
    auto* row = shared_memory() + 16 * lane;
    std::memcpy(row, a, sizeof(a));
    instruction == kLoad ? load_matrices(loaded, row) : load_matrices_transposed(loaded, row);
    std::memcpy(of.loaded + 4 * lane, loaded, sizeof(loaded));
    return;
  }
  std::memcpy(b, of.b + 2 * lane, sizeof(b));
  float c[4];
  std::memcpy(c, of.c + 4 * lane, sizeof(c));
  if (instruction == kBFloat16) mma16(BFloat16{}, c, a, b);
  if (instruction == kFloat16) mma16(Float16{}, c, a, b);
  if (instruction == kTf32) mma_tf32(c, a, b);
  if (instruction == kSplit) {  // a and b: row-major [16, 8] and [8, 16], twice
    auto number = [](uint32_t bits) { return as_float(bits); };
    SplitA of_a[2];
    SplitB of_b[2];
    for (int k = 0; k < 2; ++k) {
      of_a[k].load([&](int row, int i) { return number(of.a[row * 8 + i]); });
      of_b[k].load([&](int column, int i) { return number(of.b[i * 8 + column]); });
    }
    multiply_split(c, of_a, of_b);
  }
  std::memcpy(of.c + 4 * lane, c, sizeof(c));
}

}  // namespace
}  // namespace kdfast::cuda

extern "C" __attribute__((visibility("default"))) void cuda_host_mma(int instruction, const uint32_t* a,
                                                                     const uint32_t* b, float* c, uint32_t* loaded) {
  using namespace kdfast::cuda;
  launch("mma", run, Target{0, nullptr}, Grid{1, 32, 512}, instruction, Registers{a, b, c, loaded});
}

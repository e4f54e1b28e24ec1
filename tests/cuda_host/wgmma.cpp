// Test-only: Hopper's instructions by themselves, for tests/test_cuda_wgmma_host.py, and matrices as the driver makes
// them for the copy engine.
#include "cuda/wgmma.cuh"

#include "cuda/launch.cuh"

namespace kdfast::cuda {

// As strict as the driver.
TensorMap tensor_map(const char* op, const BoxedRows& m, int box_rows) {
  const bool some = m.rows > 0 && m.columns > 0 && box_rows > 0 && box_rows <= 256;
  const bool placed = uintptr_t(m.start) % 16 == 0 && m.step * 2 % 16 == 0 && m.step >= m.columns;
  if (!some || !placed || m.type == Element::f32)
    throw std::runtime_error(std::string(op) + ": cuTensorMapEncodeTiled");
  const cuda_host::MappedRows of = {(const unsigned char*)m.start, m.rows, m.columns, 2 * m.step, box_rows};
  TensorMap map;
  static_assert(sizeof(of) <= sizeof(map));
  std::memcpy(map.bytes, &of, sizeof(of));
  return map;
}

namespace {

constexpr int kColumns = 128;

// Two squares for each operand, from a multiple of 1024 bytes on; `images`: a's and b's, as shared memory has them.
template <class T, bool kWideA, bool kWideB>
void multiply(const unsigned char* images, int k, float* sums) {
  unsigned char* squares = shared_memory() + (1024 - shared_address(shared_memory()) % 1024);
  if (threadIdx.x == 0) std::memcpy(squares, images, 4 * kSquare);
  __syncthreads();
  float c[1][kColumns / 2];
  std::memcpy(c, sums + threadIdx.x * (kColumns / 2), sizeof(c));
  const uint32_t at = shared_address(squares);
  products_begin();
  product<kWideA, kWideB>(T{}, c[0], operand(kWideA, at, k), operand(kWideB, at + 2 * kSquare, k));
  products_commit();
  products_wait<0>();
  sums_arrived(c);
  std::memcpy(sums + threadIdx.x * (kColumns / 2), c, sizeof(c));
}
// The box at (row, column) of a matrix, as it comes to shared memory.
void bring(TensorMap map, int column, int row, int bytes, unsigned char* image) {
  unsigned char* squares = shared_memory() + (1024 - shared_address(shared_memory()) % 1024);
  auto* barrier = (StageBarrier*)(squares + bytes);
  if (threadIdx.x == 0) {
    barrier_make(barrier, 1);
    barriers_made();
    barrier_expect(barrier, bytes);
    copy_box(squares, map, barrier, column, row);
  }
  __syncthreads();
  barrier_wait(barrier, 0);
  if (threadIdx.x == 0) std::memcpy(image, squares, size_t(bytes));
}

}  // namespace
}  // namespace kdfast::cuda

using namespace kdfast::cuda;
#define EXPORT extern "C" __attribute__((visibility("default")))

// c [128 threads][64] += a b over the numbers k to k + 15 of the squares' 64.
EXPORT void cuda_host_wgmma_product(int bf16, int wide_a, int wide_b, const unsigned char* images, int k, float* sums) {
  auto run = [&](auto type) {
    using T = decltype(type);
    const auto deep = wide_b ? multiply<T, false, true> : multiply<T, false, false>;
    const auto wide = wide_b ? multiply<T, true, true> : multiply<T, true, false>;
    launch("wgmma", wide_a ? wide : deep, Target{0, nullptr}, Grid{1, kWarpgroup, 5 * kSquare}, images, k, sums);
  };
  bf16 ? run(BFloat16{}) : run(Float16{});
}
EXPORT void cuda_host_bring_box(const void* start, int64_t rows, int64_t columns, int64_t step, int box_rows,
                                int column, int row, unsigned char* image) {
  const TensorMap map = tensor_map("box", {Element::bf16, start, rows, columns, step}, box_rows);
  const int bytes = 128 * box_rows;
  launch("box", bring, Target{0, nullptr}, Grid{1, 32, bytes + 2048}, map, column, row, bytes, image);
}

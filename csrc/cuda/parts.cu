// Live rows and columns of a matrix, packed side by side and put back. A thread keeps its columns, 16 bytes of the
// part, over some rows: their indices are read once. 16 bytes of the matrix too where the columns are neighbours, as
// those of whole heads; else one by one, from lines that other threads of the warp read as well.
#include "cuda/launch.cuh"
#include "cuda/parts.h"
#include "cuda/vector.cuh"

namespace kdfast::cuda {
namespace {

constexpr int kThreads = 128, kRows = 8;

KDFAST_DEVICE bool is_aligned(const void* p) { return uintptr_t(p) % 16 == 0; }

// Some columns of a row of the part: 16 bytes, or fewer at its end.
template <class T>
struct Columns {
  static constexpr int count = Vector<T>::count;
  int64_t first, at[count];  // of the part, of the matrix
  int n;
  bool neighbours;

  KDFAST_DEVICE Columns(const PartArgs& args, int64_t vector) : first(vector * count) {
    n = int(min(int64_t(count), args.column_count - first));
#pragma unroll
    for (int e = 0; e < count; ++e) at[e] = e < n ? (args.columns ? args.columns[first + e] : first + e) : 0;
    neighbours = n == count && at[count - 1] - at[0] == count - 1;
  }

  KDFAST_DEVICE void pack(const T* row, T* part) const {
    if (neighbours && is_aligned(row + at[0]) && is_aligned(part + first)) {
      store16(part + first, load16(row + at[0]));
      return;
    }
    alignas(16) T packed[count];
#pragma unroll
    for (int e = 0; e < count; ++e) {
      if (e < n) packed[e] = row[at[e]];
    }
    if (n == count && is_aligned(part + first)) return store16(part + first, *(const uint4*)packed);
#pragma unroll
    for (int e = 0; e < count; ++e) {
      if (e < n) part[first + e] = packed[e];
    }
  }

  template <bool kAdd>
  KDFAST_DEVICE void unpack(const T* part, T* row) const {
    using V = Vector<T>;
    const bool whole = n == count && is_aligned(part + first);
    if (whole && neighbours && is_aligned(row + at[0])) {
      uint4 v = load16(part + first);
      if constexpr (kAdd) {
        float sum[count], more[count];
        V::widen(*(const uint4*)(row + at[0]), sum);  // not load16: that is for memory nobody writes
        V::widen(v, more);
#pragma unroll
        for (int e = 0; e < count; ++e) sum[e] += more[e];
        v = V::narrow(sum);
      }
      return store16(row + at[0], v);
    }
#pragma unroll
    for (int e = 0; e < count; ++e) {
      if (e >= n) continue;
      const T x = part[first + e];
      row[at[e]] = kAdd ? V::narrow_one(V::widen_one(row[at[e]]) + V::widen_one(x)) : x;
    }
  }
};

template <class T, PartMove kMove>
__global__ void __launch_bounds__(kThreads) part_rows(const PartArgs args, int64_t column_blocks) {
  const int64_t vector = blockIdx.x % column_blocks * kThreads + threadIdx.x;
  if (vector * Vector<T>::count >= args.column_count) return;
  const Columns<T> columns(args, vector);
  const int64_t begin = blockIdx.x / column_blocks * kRows, end = min(begin + kRows, args.row_count);
  for (int64_t i = begin; i < end; ++i) {
    T* row = (T*)args.matrix + (args.rows ? args.rows[i] : i) * args.matrix_step;
    T* part = (T*)args.part + i * args.part_step;
    if constexpr (kMove == PartMove::pack) {
      columns.pack(row, part);
    } else {
      columns.template unpack<kMove == PartMove::add>(part, row);
    }
  }
}

template <class T>
void launch_of(const char* op, const Target& target, PartMove move, const PartArgs& args) {
  const int64_t per_block = kThreads * Vector<T>::count;
  const int64_t column_blocks = (args.column_count + per_block - 1) / per_block;
  const Grid grid{column_blocks * ((args.row_count + kRows - 1) / kRows), kThreads};
  if (move == PartMove::pack) return launch(op, part_rows<T, PartMove::pack>, target, grid, args, column_blocks);
  if (move == PartMove::set) return launch(op, part_rows<T, PartMove::set>, target, grid, args, column_blocks);
  launch(op, part_rows<T, PartMove::add>, target, grid, args, column_blocks);
}

}  // namespace

void launch_part(const char* op, const Target& target, PartMove move, const PartArgs& args) {
  if (args.row_count == 0 || args.column_count == 0) return;
  if (args.type == Element::f32) return launch_of<float>(op, target, move, args);
  if (args.type == Element::bf16) return launch_of<BFloat16>(op, target, move, args);
  launch_of<Float16>(op, target, move, args);
}

}  // namespace kdfast::cuda

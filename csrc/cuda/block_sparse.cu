// Products with a matrix of which some blocks live, on tensor cores. A block of threads makes 128 rows of a block row
// from its live blocks, or one live block's gradient from all rows: always the same sums in the same order, no atomics.
//
// A step is 32 numbers of the sums. Both panels of a step come by copies of 16 bytes while those of the step before are
// multiplied. 16-bit sums stay in the tensor cores, in float32; float32 numbers are three products of tf32 (mma.cuh).
#include "cuda/block_of.cuh"
#include "cuda/block_sparse.h"
#include "cuda/launch.cuh"
#include "cuda/mma.cuh"
#include "cuda/vector.cuh"

namespace kdfast::cuda {
namespace {

// ---- panels ----
// Rows of a step: 32 numbers of each side by side. Those from `live` on are zeros.
template <class T>
KDFAST_DEVICE void copy_deep(T* panel, const T* from, int64_t step, int rows, int live) {
  constexpr int kVectors = kBlockStep * int(sizeof(T)) / 16, kCount = Vector<T>::count;
  const int vector = threadIdx.x % kVectors * kCount;
#pragma unroll 1
  for (int row = threadIdx.x / kVectors; row < rows; row += kBlockThreads / kVectors) {
    T* to = panel + row * deep_row(sizeof(T)) + vector;
    if (row < live) {
      copy16_async(to, from + row * step + vector);
    } else {
      shared_store16(to, {0, 0, 0, 0});
    }
  }
}
// The 32 rows of a step, `width` numbers of each.
template <class T>
KDFAST_DEVICE void copy_wide(T* panel, const T* from, int64_t step, int width, int64_t live) {
  constexpr int kLanes = kBlockThreads / kBlockStep;
  const int row = threadIdx.x / kLanes;
#pragma unroll 1
  for (int at = threadIdx.x % kLanes * Vector<T>::count; at < width; at += kLanes * Vector<T>::count) {
    T* to = panel + row * wide_row(width) + at;
    if (row < live) {
      copy16_async(to, from + row * step + at);
    } else {
      shared_store16(to, {0, 0, 0, 0});
    }
  }
}

// ---- products ----
// c += a b over a step. `kDeepA`: a is [rows, step], else [step, rows]; `kDeepB`: b is [columns, step]. Rows and
// columns from the warp's first on; of row tiles the first `tiles` count.
template <bool kDeepA, bool kDeepB, int kM, int kN, class T>
KDFAST_DEVICE void multiply(float (&c)[kM][kN][4], const T* a_panel, int a_row, const T* b_panel, int b_row,
                            int tiles) {
  const int lane = threadIdx.x % 32, matrix = lane / 8, line = lane % 8;
  uint32_t a[kM][2][4];
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    if (m >= tiles) continue;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      if constexpr (kDeepA) {
        load_matrices(a[m][k], a_panel + (16 * m + matrix % 2 * 8 + line) * a_row + 16 * k + matrix / 2 * 8);
      } else {
        load_matrices_transposed(a[m][k], a_panel + (16 * k + matrix / 2 * 8 + line) * a_row + 16 * m + matrix % 2 * 8);
      }
    }
  }
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    uint32_t both[4];
    if constexpr (kDeepB) {
      load_matrices(both, b_panel + (8 * n + line) * b_row + matrix * 8);
    } else {
      load_matrices_transposed(both, b_panel + (matrix * 8 + line) * b_row + 8 * n);
    }
    const uint32_t b[2][2] = {{both[0], both[1]}, {both[2], both[3]}};
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      if (m >= tiles) continue;
      mma16(T{}, c[m][n], a[m][0], b[0]);
      mma16(T{}, c[m][n], a[m][1], b[1]);
    }
  }
}
template <bool kDeepA, bool kDeepB, int kM, int kN>
KDFAST_DEVICE void multiply(float (&c)[kM][kN][4], const float* a_panel, int a_row, const float* b_panel, int b_row,
                            int tiles) {
#pragma unroll 1
  for (int first = 0; first < kBlockStep; first += 16) {
    SplitA a[kM][2];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      if (m >= tiles) continue;
      if constexpr (kDeepA) {
        load_rows(a[m], a_panel + 16 * m * a_row + first, a_row);
      } else {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const float* at = a_panel + (first + 8 * k) * a_row + 16 * m;
          a[m][k].load([&](int row, int k) { return at[k * a_row + row]; });
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      SplitB b[2];
      if constexpr (kDeepB) {
        load_rows(b, b_panel + 8 * n * b_row + first, b_row);
      } else {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const float* at = b_panel + (first + 8 * k) * b_row + 8 * n;
          b[k].load([&](int column, int k) { return at[k * b_row + column]; });
        }
      }
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        if (m < tiles) multiply_split(c[m][n], a[m], b);
      }
    }
  }
}

// ---- results ----
// Through shared memory, so that memory is written 16 bytes at a time. `row`, `column`: the warp's first.
template <int kM, int kN, class T>
KDFAST_DEVICE void stage(const float (&c)[kM][kN][4], T* tile, int width, int row, int column, int tiles,
                         const T* bias) {
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    const int at = column + 8 * n + 2 * q;
    float add[2] = {0.f, 0.f};
    if (bias) add[0] = Vector<T>::widen_one(bias[at]), add[1] = Vector<T>::widen_one(bias[at + 1]);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      if (m >= tiles) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        T* to = tile + (row + 16 * m + 8 * half + g) * wide_row(width) + at;
        const float x = c[m][n][2 * half] + add[0], y = c[m][n][2 * half + 1] + add[1];
        if constexpr (sizeof(T) == 2) {
          *(uint32_t*)to = narrow_pair(T{}, x, y);
        } else {
          to[0] = x, to[1] = y;
        }
      }
    }
  }
}
template <class T>
KDFAST_DEVICE void write(const T* tile, T* to, int64_t step, int width, int rows) {
  constexpr int kLanes = 8;
  for (int row = threadIdx.x / kLanes; row < rows; row += kBlockThreads / kLanes) {
    for (int at = threadIdx.x % kLanes * Vector<T>::count; at < width; at += kLanes * Vector<T>::count) {
      store16(to + row * step + at, shared_load16(tile + row * wide_row(width) + at));
    }
  }
}

// ---- kernels ----
// Warps make 32 rows and half the columns each.
template <class T, bool kTurned, int kWidth>
__global__ void __launch_bounds__(kBlockThreads, sizeof(T) == 2 ? 2 : 1)
    block_products(const __grid_constant__ BlockArgs args) {
  constexpr int kN = kWidth / 16, kDeep = deep_row(sizeof(T)), kWide = wide_row(kWidth);
  constexpr int kLeft = kBlockTile * kDeep, kPanel = kLeft + (kTurned ? kWidth * kDeep : kBlockStep * kWide);
  const int64_t tiles = (args.rows + kBlockTile - 1) / kBlockTile;
  const int64_t outer = blockIdx.x / tiles, first = blockIdx.x % tiles * kBlockTile;
  const int live = int(min(int64_t(kBlockTile), args.rows - first));
  auto* panels = (T*)shared_memory();
  const T* x = (const T*)args.left + first * args.left_step;
  int block = int(args.begin[outer]);
  int depth = 0;  // of `block`, of the next step to copy
  auto copy = [&](int stage) {
    T* panel = panels + stage * kPanel;
    const T* values = (const T*)args.right + args.place[block] * (int64_t(kWidth) * args.depth);
    copy_deep(panel, x + args.index[block] * args.depth + depth, args.left_step, kBlockTile, live);
    if constexpr (kTurned) {
      copy_deep(panel + kLeft, values + depth, args.depth, kWidth, kWidth);
    } else {
      copy_wide(panel + kLeft, values + int64_t(depth) * kWidth, kWidth, kWidth, kBlockStep);
    }
    depth += kBlockStep;
    if (depth == args.depth) depth = 0, ++block;
  };
  const int warp = threadIdx.x / 32, row = warp / 2 * 32, column = warp % 2 * (kWidth / 2);
  float c[2][kN][4] = {};
  const int steps = (int(args.begin[outer + 1]) - block) * (args.depth / kBlockStep);
  if (steps > 0) copy(0);
  for (int step = 0; step < steps; ++step) {
    copies_arrived();
    __syncthreads();  // this step's panels are whole, and the other ones are multiplied
    if (step + 1 < steps) copy((step + 1) % kBlockStages);
    const T* panel = panels + step % kBlockStages * kPanel;
    const T* right = panel + kLeft + (kTurned ? column * kDeep : column);
    multiply<true, kTurned>(c, panel + row * kDeep, kDeep, right, kTurned ? kDeep : kWide, 2);
  }
  __syncthreads();  // panels become the result
  const int64_t width = args.outer * kWidth;
  const T* bias = args.bias ? (const T*)args.bias + outer * kWidth : nullptr;
  stage(c, panels, kWidth, row, column, 2, bias);
  __syncthreads();
  write(panels, (T*)args.to + first * width + outer * kWidth, width, kWidth, live);
}

// Warps make half the rows and a quarter of the columns each.
template <class T, int kColumns>
__global__ void __launch_bounds__(kBlockThreads, sizeof(T) == 2 ? 2 : 1)
    block_gradients(const __grid_constant__ BlockArgs args) {
  constexpr int kM = 4, kN = kColumns / 32, kRight = wide_row(kColumns);
  const int64_t n = blockIdx.x, outer = outer_of(args, n), inner = args.index[n];
  const int left_row = wide_row(args.width), panel_size = kBlockStep * (left_row + kRight);
  auto* panels = (T*)shared_memory();
  const T* left = (const T*)args.left + (args.by_rows ? outer : inner) * args.width;
  const T* right = (const T*)args.right + (args.by_rows ? inner : outer) * kColumns;
  auto copy = [&](int64_t first, int64_t step) {
    T* panel = panels + step % kBlockStages * panel_size;
    copy_wide(panel, left + first * args.left_step, args.left_step, args.width, args.rows - first);
    copy_wide(panel + kBlockStep * left_row, right + first * args.right_step, args.right_step, kColumns,
              args.rows - first);
  };
  const int warp = threadIdx.x / 32, tiles = args.width / 32;
  const int row = warp / 4 * (args.width / 2), column = warp % 4 * (kColumns / 4);
  float c[kM][kN][4] = {};
  if (args.rows > 0) copy(0, 0);
  for (int64_t first = 0, step = 0; first < args.rows; first += kBlockStep, ++step) {
    copies_arrived();
    __syncthreads();  // this step's panels are whole, and the other ones are multiplied
    if (first + kBlockStep < args.rows) copy(first + kBlockStep, step + 1);
    const T* panel = panels + step % kBlockStages * panel_size;
    multiply<false, false>(c, panel + row, left_row, panel + kBlockStep * left_row + column, kRight, tiles);
  }
  __syncthreads();  // panels become the result
  stage(c, panels, kColumns, row, column, tiles, (const T*)nullptr);
  __syncthreads();
  T* to = (T*)args.to + args.place[n] * (int64_t(args.width) * kColumns);
  write(panels, to, kColumns, kColumns, args.width);
}

template <class F>
void with_type(Element type, F f) {
  if (type == Element::f32) return f(float{});
  if (type == Element::bf16) return f(BFloat16{});
  f(Float16{});
}
template <class F>
void with_side(int side, F f) {  // f(a number that the compiler knows)
  if (side == 32) return f(std::integral_constant<int, 32>{});
  if (side == 64) return f(std::integral_constant<int, 64>{});
  if (side == 96) return f(std::integral_constant<int, 96>{});
  f(std::integral_constant<int, 128>{});
}

}  // namespace

void launch_block_product(const char* op, const Target& target, const BlockArgs& args, const BlockPlan& plan) {
  if (plan.blocks == 0) return;
  with_type(args.type, [&](auto type) {
    with_side(args.width, [&](auto width) {
      using T = decltype(type);
      const auto kernel = args.turned ? block_products<T, true, width()> : block_products<T, false, width()>;
      launch(op, kernel, target, {plan.blocks, plan.threads, plan.shared}, args);
    });
  });
}

void launch_block_gradient(const char* op, const Target& target, const BlockArgs& args, const BlockPlan& plan) {
  if (plan.blocks == 0) return;
  with_type(args.type, [&](auto type) {
    with_side(args.depth, [&](auto columns) {
      launch(op, block_gradients<decltype(type), columns()>, target, {plan.blocks, plan.threads, plan.shared}, args);
    });
  });
}

}  // namespace kdfast::cuda

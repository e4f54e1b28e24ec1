// Products with a matrix of which some blocks live, on Hopper: sides of 64 or 128, 16-bit numbers, sums in float32.
//
// A block of threads stays on its multiprocessor and makes one tile after the other: 256 rows of a block row from its
// live blocks, or the gradients of two live blocks from all rows. Of its three warpgroups one thread copies: each
// step's operands, as they lie in memory, into the next of a ring of stages, by the copy engine. Two warpgroups
// multiply: 128 rows, or one block. No operand is transposed by anything but the instructions, every stage is read by
// both, and nothing is waited for but a stage that is not there yet. Always the same sums in the same order, no
// atomics.
#include "cuda/block_of.cuh"
#include "cuda/block_sparse.h"
#include "cuda/launch.cuh"
#include "cuda/vector.cuh"
#include "cuda/wgmma.cuh"

namespace kdfast::cuda {
namespace {

constexpr int kSquareSide = kWgmmaStep;
constexpr int kConsumers = 2, kConsumerWarps = kConsumers * kWarpgroup / 32;
// A multiprocessor's 65536 registers: 168 for each of 384 threads at first, as the launch bound says.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

// ---- the ring ----
template <int kBytes>
struct Ring {
  static constexpr int kStages = wgmma_stages(kBytes);
  unsigned char* memory;
  StageBarrier *full, *empty;
  int stage = 0;
  unsigned phase = 0;

  KDFAST_DEVICE Ring() {
    unsigned char* shared = shared_memory();
    memory = shared + (1024 - shared_address(shared) % 1024) % 1024;  // operands are swizzled by their address
    full = (StageBarrier*)(memory + kStages * kBytes);
    empty = full + kStages;
  }
  KDFAST_DEVICE void make() {  // by all threads
    if (threadIdx.x == 0) {
      for (int i = 0; i < kStages; ++i) {
        barrier_make(full + i, 1);
        barrier_make(empty + i, kConsumerWarps);
      }
      barriers_made();
    }
    __syncthreads();
  }
  KDFAST_DEVICE void next() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
  // The next stage, once it is free to be filled with so many bytes.
  KDFAST_DEVICE unsigned char* begin(int bytes) {
    barrier_wait(empty + stage, phase ^ 1);
    barrier_expect(full + stage, bytes);
    return memory + stage * kBytes;
  }
  // A copy of one of its boxes.
  KDFAST_DEVICE void copy(unsigned char* to, const TensorMap& map, int64_t column, int64_t row) {
    copy_box(to, map, full + stage, int(column), int(row));
  }
};

// ---- sums ----
// c += a b over a step, by a warpgroup.
template <bool kWideA, bool kWideB, int kM, int kSums, class T>
KDFAST_DEVICE void multiply(T type, float (&c)[kM][kSums], uint32_t a, uint32_t b) {
  products_begin();
#pragma unroll
  for (int k = 0; k < kWgmmaStep; k += kDepth) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      product<kWideA, kWideB>(type, c[m], operand(kWideA, a + m * kSquare, k), operand(kWideB, b, k));
    }
  }
  products_commit();
}

// All steps of a tile; operands from bytes `a` and `b` of each stage on. A stage is free when the next one's products
// are under way.
template <bool kWideA, bool kWideB, int kM, int kSums, int kBytes, class T>
KDFAST_DEVICE void sum_steps(T type, float (&c)[kM][kSums], Ring<kBytes>& ring, int64_t steps, int a, int b) {
  auto release = [&](int stage) {
    if (threadIdx.x % 32 == 0) barrier_arrive(ring.empty + stage);
  };
  int before = 0;
#pragma unroll 1
  for (int64_t step = 0; step < steps; ++step) {
    barrier_wait(ring.full + ring.stage, ring.phase);
    const uint32_t stage = shared_address(ring.memory) + ring.stage * kBytes;
    multiply<kWideA, kWideB>(type, c, stage + a, stage + b);
    products_wait<1>();
    if (step > 0) release(before);
    before = ring.stage;
    ring.next();
  }
  products_wait<0>();
  sums_arrived(c);
  if (steps > 0) release(before);
}

// ---- results ----
// Among four neighbours, lane q gets the words q of all: w[i] is from lane i.
KDFAST_DEVICE void exchange_four(uint32_t (&w)[4]) {
#pragma unroll
  for (int apart = 1; apart < 4; apart *= 2) {
    const bool upper = threadIdx.x & apart;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & apart) continue;
      uint32_t &keep_low = w[i], &keep_high = w[i + apart];
      const uint32_t got = as_bits(__shfl_xor_sync(~0u, as_float(upper ? keep_low : keep_high), apart));
      (upper ? keep_low : keep_high) = got;
    }
  }
}

// The warpgroup's sums, and the bias of their columns if there is one, into the first `rows` rows of `to`.
template <class T, int kM, int kSums>
KDFAST_DEVICE void store_sums(const float (&c)[kM][kSums], T* to, int64_t step, int64_t rows, const T* bias) {
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4, first = threadIdx.x % kWarpgroup / 32 * 16 + g;
#pragma unroll
  for (int four = 0; four < kSums / 4; four += 4) {  // 32 columns
    float add[4][2] = {};
    if (bias) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const T* at = bias + 8 * (four + i) + 2 * q;
        add[i][0] = Vector<T>::widen_one(at[0]), add[i][1] = Vector<T>::widen_one(at[1]);
      }
    }
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t w[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* x = c[m] + 4 * (four + i) + 2 * half;
          w[i] = narrow_pair(T{}, x[0] + add[i][0], x[1] + add[i][1]);
        }
        exchange_four(w);
        const int row = 64 * m + 8 * half + first;
        if (row < rows) store16(to + row * step + 8 * (four + q), {w[0], w[1], w[2], w[3]});
      }
    }
  }
}

// ---- x times the blocks ----
// Of tile n: blocks of threads that run at the same time share rows of x and blocks of the weight in L2, eight tiles of
// rows and as many block rows as there are blocks of threads for.
struct ProductTile {
  int64_t outer, first, begin, end;  // block row, row, live blocks

  KDFAST_DEVICE ProductTile(const BlockArgs& args, int64_t n) {
    constexpr int64_t kTogether = 8;
    const int64_t tiles = (args.rows + kWgmmaTile - 1) / kWgmmaTile, most = kTogether * args.outer;
    const int64_t above = n / most * kTogether, together = min(kTogether, tiles - above), within = n % most;
    outer = within / together;
    first = (above + within % together) * kWgmmaTile;
    begin = args.begin[outer], end = args.begin[outer + 1];
  }
  KDFAST_DEVICE static int64_t count(const BlockArgs& args) {
    return (args.rows + kWgmmaTile - 1) / kWgmmaTile * args.outer;
  }
};

// A stage has four squares of x, 64 rows each, and those of the block. Blocks that are [width, depth] are deep.
template <bool kTurned, int kWidth, int kBytes>
KDFAST_DEVICE void copy_products(Ring<kBytes>& ring, const TensorMap& x, const TensorMap& values,
                                 const BlockArgs& args) {
  constexpr int kOfX = kWgmmaTile / kSquareSide * kSquare;
  for (int64_t n = blockIdx.x; n < ProductTile::count(args); n += gridDim.x) {
    const ProductTile tile(args, n);
    for (int64_t block = tile.begin; block < tile.end; ++block) {
      const int64_t column = args.index[block] * args.depth, row = args.place[block] * (kTurned ? kWidth : args.depth);
      for (int k = 0; k < args.depth; k += kWgmmaStep) {
        unsigned char* to = ring.begin(kBytes);
        ring.copy(to, x, column + k, tile.first);
        if constexpr (kTurned) {
          ring.copy(to + kOfX, values, k, row);
        } else {
#pragma unroll
          for (int square = 0; square < kWidth / kSquareSide; ++square) {
            ring.copy(to + kOfX + square * kSquare, values, square * kSquareSide, row + k);
          }
        }
        ring.next();
      }
    }
  }
}

template <class T, bool kTurned, int kWidth>
__global__ void __launch_bounds__(kWgmmaThreads, 1)
    wgmma_products(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap values,
                   const __grid_constant__ BlockArgs args) {
  constexpr int kOfX = kWgmmaTile / kSquareSide * kSquare, kRows = kWgmmaTile / kConsumers;
  Ring<wgmma_step_bytes(kWidth, 0, false)> ring;
  ring.make();
  const int group = threadIdx.x / kWarpgroup;
  if (group == kConsumers) {
    registers_down_to<kProducerRegisters>();
    if (threadIdx.x == kConsumers * kWarpgroup) copy_products<kTurned, kWidth>(ring, x, values, args);
  } else {
    registers_up_to<kConsumerRegisters>();
    for (int64_t n = blockIdx.x; n < ProductTile::count(args); n += gridDim.x) {
      const ProductTile tile(args, n);
      float c[kRows / kSquareSide][kWidth / 2] = {};
      const int64_t steps = (tile.end - tile.begin) * (args.depth / kWgmmaStep);
      sum_steps<false, !kTurned>(T{}, c, ring, steps, group * kOfX / kConsumers, kOfX);
      const int64_t row = tile.first + group * kRows, column = tile.outer * kWidth, step = args.outer * kWidth;
      const T* bias = args.bias ? (const T*)args.bias + column : nullptr;
      store_sums(c, (T*)args.to + row * step + column, step, args.rows - row, bias);
    }
  }
}

// ---- gradients of the blocks ----
// Pair n: two live blocks that follow each other, a warpgroup for each; after an odd number's last one comes itself.
struct GradientPair {
  int64_t block_0, block_1, outer_0, outer_1;

  KDFAST_DEVICE GradientPair(const BlockArgs& args, int64_t n) {
    block_0 = 2 * n, block_1 = min(2 * n + 1, args.live - 1);
    outer_0 = outer_of(args, block_0);
    outer_1 = block_1 < args.begin[outer_0 + 1] ? outer_0 : outer_of(args, block_1);
  }
  // Blocks of one block row, or column, have one operand: it is there once.
  KDFAST_DEVICE bool share() const { return outer_0 == outer_1; }
  KDFAST_DEVICE static int64_t count(const BlockArgs& args) { return (args.live + 1) / 2; }
};

// A stage has the squares of both upstream gradients, then those of both x: all are wide, 64 rows of memory each.
template <int kRows, int kColumns, int kBytes>
KDFAST_DEVICE void copy_gradients(Ring<kBytes>& ring, const TensorMap& grad, const TensorMap& x,
                                  const BlockArgs& args) {
  constexpr int kOfGrad = kRows / kSquareSide * kSquare, kOfX = kColumns / kSquareSide * kSquare;
  for (int64_t n = blockIdx.x; n < GradientPair::count(args); n += gridDim.x) {
    const GradientPair pair(args, n);
    const int64_t inner_0 = args.index[pair.block_0], inner_1 = args.index[pair.block_1];
    const int64_t grad_0 = (args.by_rows ? pair.outer_0 : inner_0) * kRows;
    const int64_t grad_1 = (args.by_rows ? pair.outer_1 : inner_1) * kRows;
    const int64_t x_0 = (args.by_rows ? inner_0 : pair.outer_0) * kColumns;
    const int64_t x_1 = (args.by_rows ? inner_1 : pair.outer_1) * kColumns;
    const int grads = pair.share() && args.by_rows ? 1 : 2, xs = pair.share() && !args.by_rows ? 1 : 2;
    for (int64_t first = 0; first < args.rows; first += kWgmmaStep) {
      unsigned char* to = ring.begin(grads * kOfGrad + xs * kOfX);
      auto copy = [&](unsigned char* to, const TensorMap& map, int64_t column, int columns) {
        for (int at = 0; at < columns; at += kSquareSide, to += kSquare) ring.copy(to, map, column + at, first);
      };
      copy(to, grad, grad_0, kRows);
      if (grads == 2) copy(to + kOfGrad, grad, grad_1, kRows);
      copy(to + 2 * kOfGrad, x, x_0, kColumns);
      if (xs == 2) copy(to + 2 * kOfGrad + kOfX, x, x_1, kColumns);
      ring.next();
    }
  }
}

template <class T, int kRows, int kColumns>
__global__ void __launch_bounds__(kWgmmaThreads, 1)
    wgmma_gradients(const __grid_constant__ TensorMap grad, const __grid_constant__ TensorMap x,
                    const __grid_constant__ BlockArgs args) {
  constexpr int kOfGrad = kRows / kSquareSide * kSquare, kOfX = kColumns / kSquareSide * kSquare;
  Ring<wgmma_step_bytes(kRows, kColumns, true)> ring;
  ring.make();
  const int group = threadIdx.x / kWarpgroup;
  if (group == kConsumers) {
    registers_down_to<kProducerRegisters>();
    if (threadIdx.x == kConsumers * kWarpgroup) copy_gradients<kRows, kColumns>(ring, grad, x, args);
  } else {
    registers_up_to<kConsumerRegisters>();
    const int64_t steps = (args.rows + kWgmmaStep - 1) / kWgmmaStep;
    for (int64_t n = blockIdx.x; n < GradientPair::count(args); n += gridDim.x) {
      const GradientPair pair(args, n);
      const int a = pair.share() && args.by_rows ? 0 : group, b = pair.share() && !args.by_rows ? 0 : group;
      float c[kRows / kSquareSide][kColumns / 2] = {};
      sum_steps<true, true>(T{}, c, ring, steps, a * kOfGrad, 2 * kOfGrad + b * kOfX);
      T* to = (T*)args.to + args.place[group ? pair.block_1 : pair.block_0] * (kRows * kColumns);
      store_sums(c, to, kColumns, 2 * n + group < args.live ? kRows : 0, (const T*)nullptr);
    }
  }
}

// ---- launches ----
template <class F>
void with_short_type(Element type, F f) {
  if (type == Element::bf16) return f(BFloat16{});
  f(Float16{});
}
template <class F>
void with_square_side(int side, F f) {  // f(a number that the compiler knows)
  if (side == 64) return f(std::integral_constant<int, 64>{});
  f(std::integral_constant<int, 128>{});
}

}  // namespace

void launch_wgmma_product(const char* op, const Target& target, const BlockArgs& args, const BlockPlan& plan) {
  if (plan.blocks == 0) return;
  const TensorMap x = tensor_map(op, {args.type, args.left, args.rows, args.left_columns, args.left_step}, kWgmmaTile);
  const int64_t rows = args.live * (args.turned ? args.width : args.depth);
  const TensorMap values = tensor_map(op, {args.type, args.right, rows, args.right_columns, args.right_step},
                                      args.turned ? args.width : kWgmmaStep);
  with_short_type(args.type, [&](auto type) {
    with_square_side(args.width, [&](auto width) {
      using T = decltype(type);
      const auto kernel = args.turned ? wgmma_products<T, true, width()> : wgmma_products<T, false, width()>;
      launch(op, kernel, target, {plan.blocks, plan.threads, plan.shared}, x, values, args);
    });
  });
}

void launch_wgmma_gradient(const char* op, const Target& target, const BlockArgs& args, const BlockPlan& plan) {
  if (plan.blocks == 0) return;
  const TensorMap grad =
      tensor_map(op, {args.type, args.left, args.rows, args.left_columns, args.left_step}, kWgmmaStep);
  const TensorMap x =
      tensor_map(op, {args.type, args.right, args.rows, args.right_columns, args.right_step}, kWgmmaStep);
  with_short_type(args.type, [&](auto type) {
    with_square_side(args.width, [&](auto rows) {
      with_square_side(args.depth, [&](auto columns) {
        launch(op, wgmma_gradients<decltype(type), rows(), columns()>, target, {plan.blocks, plan.threads, plan.shared},
               grad, x, args);
      });
    });
  });
}

}  // namespace kdfast::cuda

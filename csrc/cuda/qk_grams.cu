// The squared error of scores from Gram matrices, linear in L (csrc/cpu/qk_mse.cpp has the mathematics): G = X^T X and
// H = Y^T Y of every head, the loss's <G, H>, then dQs = 2 a X H[:, left] and dKs = 2 Y (G[:, left] + G[:, right]).
//
// Products are of float32, in three of tf32 (mma.cuh). q and k are read twice, by copies of 16 bytes; dq and dk are
// written once. 4.5 L d^2 multiply-adds for both matrices, of which the half above the diagonal is made, and 4 L d^2
// for the gradients, three times as many of tf32. Heads of up to 64 numbers have one tile for each matrix; wider ones
// are made of tiles of 64, and columns of X are in the order of these tiles: their left numbers, then their right ones.
#include "cuda/launch.cuh"
#include "cuda/qk_panels.cuh"

namespace kdfast::cuda {
namespace {

constexpr int kSumThreads = 256;
constexpr int64_t kSumShared = kSumThreads * int64_t(sizeof(double));
constexpr int kTokensOfBlock = 512;  // for the gradients: the block's matrix is read once for them

KDFAST_DEVICE float* gram_of(const QkArgs& args, int split, int64_t head, int matrix) {
  return args.grams + ((split * args.all_heads() + head) * 2 + matrix) * args.plan.numbers();
}

// ---- G and H ----
// What a block makes: tile (row, column) of a matrix of a head, from the tokens of a split.
struct GramBlock {
  int split, matrix, row, column;
  int64_t head;

  KDFAST_DEVICE explicit GramBlock(const QkArgs& args) {
    int64_t place = blockIdx.x;
    int pair = int(place % args.plan.pairs());
    place /= args.plan.pairs();
    matrix = int(place % 2);
    place /= 2;
    split = int(place % args.plan.splits);
    head = place / args.plan.splits;
    row = 0;
    for (int columns = args.plan.tiles; pair >= columns; --columns) pair -= columns, ++row;
    column = row + pair;
  }
};

// The 18 products of 16 x 8 of a tile of 128 x 128 that are warp `warp`'s: of the rows of two, one from above and one
// from below, all that reach the diagonal or lie to its right. Every warp has as many.
constexpr int kTriangle = 18;
template <int warp, class F>
KDFAST_DEVICE void each_of_triangle(F f) {  // f(whether in the lower row, column of products, which of the 18)
#pragma unroll
  for (int n = 2 * warp; n < 16; ++n) {
    f(false, n, n - 2 * warp);
    if (n >= 14 - 2 * warp) f(true, n, n + 2);
  }
}
constexpr int kTriangleRow = 128 + 8;  // 8 modulo 32: no two lanes of a fragment meet in a bank

template <int warp>
KDFAST_DEVICE void add_triangle(float (&c)[kTriangle][4], const float* panel) {
#pragma unroll 1
  for (int first = 0; first < kMet; first += 16) {
    SplitA a[2][2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float* at = panel + (first + 8 * k) * kTriangleRow;
      a[0][k].load([&](int row, int k) { return at[k * kTriangleRow + 16 * warp + row]; });
      a[1][k].load([&](int row, int k) { return at[k * kTriangleRow + 16 * (7 - warp) + row]; });
    }
    SplitB b[2];
    each_of_triangle<warp>([&](bool lower, int n, int which) {
#pragma unroll
      for (int k = 0; k < 2 && !lower; ++k) {
        const float* at = panel + (first + 8 * k) * kTriangleRow + 8 * n;
        b[k].load([&](int column, int k) { return at[k * kTriangleRow + column]; });
      }
      multiply_split(c[which], a[lower], b);
    });
  }
}
template <int warp>
KDFAST_DEVICE void write_triangle(const float (&c)[kTriangle][4], float* to) {
  each_of_triangle<warp>([&](bool lower, int n, int which) {
    float* at = to + (16 * (lower ? 7 - warp : warp) + lane_row()) * 128 + 8 * n + lane_column();
    store8(at, {as_bits(c[which][0]), as_bits(c[which][1])});
    store8(at + 8 * 128, {as_bits(c[which][2]), as_bits(c[which][3])});
  });
}
template <class F>
KDFAST_DEVICE void with_warp(F f) {  // f(a number that the compiler knows)
  switch (threadIdx.x / 32) {
    case 0:
      return f(std::integral_constant<int, 0>{});
    case 1:
      return f(std::integral_constant<int, 1>{});
    case 2:
      return f(std::integral_constant<int, 2>{});
    default:
      return f(std::integral_constant<int, 3>{});
  }
}

// The tokens of a split: whole steps.
struct Run {
  int begin, end;

  KDFAST_DEVICE Run(const QkArgs& args, int split) {
    const int steps = (args.length + kMet - 1) / kMet, each = (steps + args.plan.splits - 1) / args.plan.splits;
    begin = min(split * each * kMet, args.length);
    end = min(begin + each * kMet, args.length);
  }
};

// One tile is the matrix: the half of it from the diagonal on.
__global__ void __launch_bounds__(kThreads, 2) gram_triangles(const __grid_constant__ QkArgs args) {
  using Columns = Panel<64, kTriangleRow - 128>;
  const GramBlock block(args);
  const Head h(args, block.head);
  if (h.skipped) return;
  auto* panel = (float*)shared_memory();
  unsigned char* copies = shared_memory() + kMet * kTriangleRow * sizeof(float);
  const Columns columns(args, h, block.matrix == 1);
  float c[kTriangle][4] = {};
  const Run run(args, block.split);
  columns.copy(copies, run.begin, 0);
  for (int token = run.begin; token < run.end; token += kMet) {
    copies_arrived();
    __syncthreads();  // the panel before is multiplied
    columns.combine(copies, panel);
    if (token + kMet < run.end) columns.copy(copies, token + kMet, 0);
    __syncthreads();  // the panel is whole
    with_warp([&](auto warp) { add_triangle<warp()>(c, panel); });
  }
  float* to = gram_of(args, block.split, block.head, block.matrix);
  with_warp([&](auto warp) { write_triangle<warp()>(c, to); });
}
constexpr int64_t kTriangleShared = kMet * kTriangleRow * sizeof(float) + Panel<64, 8>::kCopies;

// Tiles of 64 x 64 numbers, a quarter for every warp.
using SquarePanel = Panel<32, 8>;
constexpr int64_t kSquareBytes = kMet * SquarePanel::kRow * sizeof(float);
constexpr int64_t kSquareShared = 2 * (kSquareBytes + SquarePanel::kCopies);

KDFAST_DEVICE void add_square(float (&c)[2][4][4], const float* rows, const float* columns) {
  const int warp = threadIdx.x / 32, row = warp / 2 * 32, column = warp % 2 * 32;
#pragma unroll 1
  for (int first = 0; first < kMet; first += 16) {
    SplitA a[2][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* at = rows + (first + i % 2 * 8) * SquarePanel::kRow + row + 16 * (i / 2);
      a[i / 2][i % 2].load([&](int row, int k) { return at[k * SquarePanel::kRow + row]; });
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      SplitB b[2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const float* at = columns + (first + 8 * k) * SquarePanel::kRow + column + 8 * n;
        b[k].load([&](int column, int k) { return at[k * SquarePanel::kRow + column]; });
      }
#pragma unroll
      for (int m = 0; m < 2; ++m) multiply_split(c[m][n], a[m], b);
    }
  }
}

__global__ void __launch_bounds__(kThreads, 4) gram_squares(const __grid_constant__ QkArgs args) {
  const GramBlock block(args);
  const Head h(args, block.head);
  if (h.skipped) return;
  unsigned char *panels = shared_memory(), *copies = panels + 2 * kSquareBytes;
  const bool on_diagonal = block.row == block.column;
  const SquarePanel of(args, h, block.matrix == 1);
  auto* rows = (float*)panels;
  auto* columns = on_diagonal ? rows : (float*)(panels + kSquareBytes);
  auto copy = [&](int token) {
    of.copy(copies, token, 32 * block.row);
    if (!on_diagonal) of.copy(copies + SquarePanel::kCopies, token, 32 * block.column);
  };
  float c[2][4][4] = {};
  const Run run(args, block.split);
  copy(run.begin);
  for (int token = run.begin; token < run.end; token += kMet) {
    copies_arrived();
    __syncthreads();  // the panels before are multiplied
    of.combine(copies, rows);
    if (!on_diagonal) of.combine(copies + SquarePanel::kCopies, columns);
    if (token + kMet < run.end) copy(token + kMet);
    __syncthreads();  // the panels are whole
    add_square(c, rows, columns);
  }
  const int warp = threadIdx.x / 32, width = args.plan.width();
  float* to = gram_of(args, block.split, block.head, block.matrix) +
              int64_t(64 * block.row + warp / 2 * 32 + lane_row()) * width + 64 * block.column + warp % 2 * 32 +
              lane_column();
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int m = i / 8, n = i / 2 % 4, half = i % 2;
    store8(to + (16 * m + 8 * half) * width + 8 * n, {as_bits(c[m][n][2 * half]), as_bits(c[m][n][2 * half + 1])});
  }
}

// A block for every head: the sums of the splits, written over the first of them on both sides of the diagonal, and the
// value.
__global__ void __launch_bounds__(kSumThreads, 2) gram_values(const __grid_constant__ QkArgs args) {
  const Head h(args, blockIdx.x);
  const int width = args.plan.width(), vectors = width / 4;
  const int64_t between = args.all_heads() * 2 * args.plan.numbers();
  double value = 0;
  for (int i = threadIdx.x; !h.skipped && i < width * vectors; i += kSumThreads) {
    const int row = i / vectors, column = i % vectors * 4;
    if (column + 3 < row) continue;
    float sums[2][4];
#pragma unroll
    for (int matrix = 0; matrix < 2; ++matrix) {
      float* to = gram_of(args, 0, h.index, matrix);
      for (int split = 0; split < args.plan.splits; ++split) {
        const auto v = *(const float4*)(to + split * between + int64_t(row) * width + column);
        const float x[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int c = 0; c < 4; ++c) sums[matrix][c] = split ? sums[matrix][c] + x[c] : x[c];
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (column + c < row) continue;
        to[int64_t(row) * width + column + c] = sums[matrix][c];
        to[int64_t(column + c) * width + row] = sums[matrix][c];
      }
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const double product = double(sums[0][c]) * sums[1][c];
      value += column + c < row ? 0. : column + c > row ? 2 * product : product;
    }
  }
  value = block_sum(value, (double*)shared_memory());
  if (threadIdx.x == 0) args.values[h.index] = h.skipped ? 0.f : float(h.weight * value);
}

// ---- gradients ----
// Of X's or Y's tokens, 32 at a time, times a matrix [2 columns, columns], which is part of a Gram matrix.
template <int columns, bool of_keys>
class GramGradient {
 public:
  using Tokens32 = Panel<columns, 4>;
  static constexpr int kRow = columns + 8;
  static constexpr int64_t kPanelBytes = kMet * Tokens32::kRow * sizeof(float);
  static constexpr int64_t kMatrixBytes = 2 * columns * kRow * sizeof(float);
  static constexpr int64_t shared() { return kPanelBytes + kMatrixBytes + Tokens32::kCopies; }

  KDFAST_DEVICE explicit GramGradient(const QkArgs& args) : args_(args) {
    own_ = int(blockIdx.x) % args.plan.tiles;
    const int64_t place = blockIdx.x / args.plan.tiles;
    const int runs = (args.length + kTokensOfBlock - 1) / kTokensOfBlock;
    begin_ = int(place % runs) * kTokensOfBlock;
    share_ = of_keys ? args.heads / args.key_heads : 1;
    first_head_ = place / runs * share_;
    panel_ = (float*)shared_memory();
    matrix_ = (float*)(shared_memory() + kPanelBytes);
    copies_ = shared_memory() + kPanelBytes + kMatrixBytes;
  }

  KDFAST_DEVICE void run() {
    const Head h(args_, first_head_);
    const TokenGradient to(args_, h, of_keys);
    const bool once = share_ == 1 && args_.plan.tiles == 1;
    if (once && !h.skipped) {
      const Tokens32 tokens(args_, h, of_keys);
      take_matrix(h, 0);
      tokens.copy(copies_, begin_, 0);
      for (int token = begin_; token < end(); token += kMet) {
        float c[kColumns][4] = {};
        copies_arrived();
        __syncthreads();  // the panel before is multiplied
        tokens.combine(copies_, panel_);
        if (token + kMet < end()) tokens.copy(copies_, token + kMet, 0);
        __syncthreads();  // the panel and the matrix are whole
        add(c);
        write(to, token, c);
      }
      return;
    }
    for (int token = begin_; token < end(); token += kMet) {
      float c[kColumns][4] = {};
      for (int i = 0; i < share_; ++i) add_head(c, Head(args_, first_head_ + i), token);
      write(to, token, c);
    }
  }

 private:
  static constexpr int kColumns = columns / 16;  // products of 16 x 8 of a warp, side by side

  KDFAST_DEVICE int end() const { return min(begin_ + kTokensOfBlock, args_.length); }
  KDFAST_DEVICE void add_head(float (&c)[kColumns][4], const Head& h, int token) {
    if (h.skipped) return;
    for (int tile = 0; tile < args_.plan.tiles; ++tile) {
      __syncthreads();  // the panel and the matrix before are multiplied
      take_matrix(h, tile);
      Tokens32(args_, h, of_keys).make(copies_, token, columns * tile, panel_);
      __syncthreads();  // both are whole
      add(c);
    }
  }
  // Of the rows of a tile the columns of the block's own, times the factor of the gradient.
  KDFAST_DEVICE void take_matrix(const Head& h, int tile) {
    const int width = args_.plan.width();
    const float factor = 2 * h.factor(args_) * (of_keys ? 1.f : args_.student_scale);
    const float* from = gram_of(args_, 0, h.index, !of_keys) + int64_t(2 * columns * tile) * width + 2 * columns * own_;
    for (int i = threadIdx.x; i < 2 * columns * columns / 4; i += kThreads) {
      const int row = i / (columns / 4), column = i % (columns / 4) * 4;
      float x[4], right[4];
      Vector<float>::widen(load16(from + int64_t(row) * width + column), x);
      if (of_keys) Vector<float>::widen(load16(from + int64_t(row) * width + columns + column), right);
#pragma unroll
      for (int c = 0; c < 4; ++c) x[c] = factor * (of_keys ? x[c] + right[c] : x[c]);
      shared_store16(matrix_ + row * kRow + column, Vector<float>::narrow(x));
    }
  }
  KDFAST_DEVICE void add(float (&c)[kColumns][4]) const {
    const int warp = threadIdx.x / 32, column = warp % 2 * (columns / 2);
    const float* tokens = panel_ + warp / 2 * 16 * Tokens32::kRow;
#pragma unroll 2
    for (int first = 0; first < 2 * columns; first += 16) {
      SplitA a[2];
      load_rows(a, tokens + first, Tokens32::kRow);
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        SplitB b[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          b[k].load([&](int j, int i) { return matrix_[(first + 8 * k + i) * kRow + column + 8 * n + j]; });
        }
        multiply_split(c[n], a, b);
      }
    }
  }
  KDFAST_DEVICE void write(const TokenGradient& to, int token, const float (&c)[kColumns][4]) const {
    const int warp = threadIdx.x / 32, column = columns * own_ + warp % 2 * (columns / 2);
#pragma unroll
    for (int n = 0; n < kColumns; ++n) to.write(token + warp / 2 * 16, column + 8 * n, c[n], 1.f);
  }

  const QkArgs& args_;
  int own_, begin_, share_;
  int64_t first_head_;
  float *panel_, *matrix_;
  unsigned char* copies_;
};

template <int columns, bool of_keys>
__global__ void __launch_bounds__(kThreads, 3) gram_gradients(const __grid_constant__ QkArgs args) {
  GramGradient<columns, of_keys>(args).run();
}

template <int columns>
void launch_gradients(const char* op, const Target& target, const QkArgs& args) {
  constexpr int64_t shared = GramGradient<columns, false>::shared();
  const int64_t blocks = (args.length + kTokensOfBlock - 1) / kTokensOfBlock * args.plan.tiles;
  const int64_t heads = args.all_heads(), key_heads = heads / args.heads * args.key_heads;
  launch(op, gram_gradients<columns, false>, target, {heads * blocks, kThreads, shared}, args);
  launch(op, gram_gradients<columns, true>, target, {key_heads * blocks, kThreads, shared}, args);
}

}  // namespace

void launch_grams(const char* op, const Target& target, const QkArgs& args) {
  const int64_t heads = args.all_heads(), blocks = heads * 2 * args.plan.splits * args.plan.pairs();
  const bool one_tile = args.plan.columns == 64;
  launch(op, one_tile ? gram_triangles : gram_squares, target,
         {blocks, kThreads, one_tile ? kTriangleShared : kSquareShared}, args);
  launch(op, gram_values, target, {heads, kSumThreads, kSumShared}, args);
  if (!args.layer[0].dq) return;
  one_tile ? launch_gradients<64>(op, target, args) : launch_gradients<32>(op, target, args);
}

std::vector<NamedKernel> gram_kernels() {
  return {{"qk, Gram matrices of one tile", (const void*)gram_triangles},
          {"qk, Gram matrices of tiles", (const void*)gram_squares},
          {"qk, values of Gram matrices", (const void*)gram_values},
          {"qk, gradients of Gram matrices", (const void*)gram_gradients<64, true>},
          {"qk, gradients of Gram matrices, tiles", (const void*)gram_gradients<32, true>}};
}

}  // namespace kdfast::cuda

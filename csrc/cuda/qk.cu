// Losses between the scores of queries and keys (csrc/cpu/qk_mse.cpp and qk_kl.cpp have the mathematics). Products are
// tiles of 64 x 64 in registers, 4 x 4 of a thread, from panels of 16 in shared memory; their operands are read through
// functions, so that no intermediate of a product is ever written.
//
// grams: two matrices [2d, 2d] of every head, then one product for dq and one for dk: 24 L d^2 multiply-adds, memory
// 16 d^2 floats per head. scores: tiles of scores are made for the values, again for dq and again for dk: 10 L^2 d and
// more; short sequences, causal masks, head sizes that differ, and softmaxes.
#include "cuda/launch.cuh"
#include "cuda/qk.h"
#include "cuda/qk_tile.cuh"

namespace kdfast::cuda {
namespace {

// ---- scores ----
// Made of differences where the head sizes agree, so that a student near its teacher loses nothing.
struct MseScores {
  Tile of;

  KDFAST_DEVICE MseScores(const QkArgs& args, const Head& h, int query, int key) {
    if (args.student_size == args.teacher_size) {
      of.add(
          2 * args.student_size, [&](int r, int p) { return h.x(query + r, p); },
          [&](int c, int p) { return h.y(key + c, p); });
    } else {
      of.add(
          args.student_size, [&](int r, int k) { return h.student_q(query + r, k); },
          [&](int c, int k) { return h.student_k(key + c, k); });
      of.add(
          args.teacher_size, [&](int r, int k) { return -h.teacher_q(query + r, k); },
          [&](int c, int k) { return h.teacher_k(key + c, k); });
    }
    if (!args.causal) return;
    of.each([&](int r, int c, float& x) { x = key + c > query + r ? 0.f : x; });
  }
  // What the loss's derivative by the scores is, but for the factor.
  KDFAST_DEVICE Tile& derivative(const QkArgs&, const Head&, int, int) {
    of.each([](int, int, float& x) { x *= 2.f; });
    return of;
  }
};

struct KlScores {
  Tile student, teacher;

  KDFAST_DEVICE KlScores(const QkArgs& args, const Head& h, int query, int key) {
    student.add(
        args.student_size, [&](int r, int k) { return h.student_q(query + r, k); },
        [&](int c, int k) { return h.student_k(key + c, k); });
    teacher.add(
        args.teacher_size, [&](int r, int k) { return h.teacher_q(query + r, k); },
        [&](int c, int k) { return h.teacher_k(key + c, k); });
    auto hide = [&](int, int c, float& x) {
      if (key + c >= args.length || (h.keys && !h.keys[key + c])) x = -INFINITY;
    };
    student.each(hide);
    teacher.each(hide);
  }
  // p_s - p_t, from the rows' maxima and sums.
  KDFAST_DEVICE Tile& derivative(const QkArgs& args, const Head& h, int query, int) {
    const float k = float(kLog2e);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int q = query + row_of(i);
      const bool counted = h.counts(args, q);
      const float* m = args.maxima + (h.index * args.length + (counted ? q : 0)) * 4;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float& s = student.at[i][j];
        s = counted ? exp2_fast((s - m[0]) * k) / m[1] - exp2_fast((teacher.at[i][j] - m[2]) * k) / m[3] : 0.f;
      }
    }
    return student;
  }
};

// The sum of what the block's threads have goes to the head's part of these queries.
KDFAST_DEVICE void write_part(const QkArgs& args, int64_t part, double sum) {
  __syncthreads();
  sum = block_sum(sum, (double*)shared_memory());
  if (threadIdx.x == 0) args.parts[part] = float(sum);
}

// A block for every head and 64 queries.
__global__ void __launch_bounds__(kThreads) mse_values(const __grid_constant__ QkArgs args) {
  const Head h(args, blockIdx.x / args.tiles());
  const int query = int(blockIdx.x % args.tiles()) * kTile;
  double sum = 0;
  for (int key = 0; !h.skipped && key < args.length && !(args.causal && key > query); key += kTile) {
    MseScores scores(args, h, query, key);
    scores.of.each([&](int, int, float x) { sum += double(x) * x; });
  }
  write_part(args, blockIdx.x, sum);
}

__global__ void __launch_bounds__(kThreads) kl_values(const __grid_constant__ QkArgs args) {
  using Terms = KlDiv<ColumnMath>;
  const Head h(args, blockIdx.x / args.tiles());
  const int query = int(blockIdx.x % args.tiles()) * kTile;
  const float k = float(kLog2e);
  RowState<float> rows[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) rows[i] = no_columns<float>();
  for (int key = 0; !h.skipped && key < args.length; key += kTile) {
    const KlScores scores(args, h, query, key);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float *s = scores.student.at[i], *t = scores.teacher.at[i];
      RowState<float> tile = no_columns<float>();
      tile.max_s = fmaxf(kNoMaximum, warp_max<16>(fmaxf(fmaxf(s[0], s[1]), fmaxf(s[2], s[3]))));
      tile.max_t = fmaxf(kNoMaximum, warp_max<16>(fmaxf(fmaxf(t[0], t[1]), fmaxf(t[2], t[3]))));
#pragma unroll
      for (int j = 0; j < 4; ++j) count<Terms>(tile, s[j], t[j], k);
      tile.sum_s = warp_sum<16>(tile.sum_s);
      tile.sum_t = warp_sum<16>(tile.sum_t);
      tile.moment_t = warp_sum<16>(tile.moment_t);
      merge<Terms>(rows[i], tile, k);
    }
  }
  double sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int q = query + row_of(i);
    if (h.skipped || threadIdx.x % 16 || !h.counts(args, q)) continue;
    sum += KlDiv<RowMath>::loss(rows[i], k, {});
    float* m = args.maxima + (h.index * args.length + q) * 4;
    m[0] = rows[i].max_s, m[1] = rows[i].sum_s, m[2] = rows[i].max_t, m[3] = rows[i].sum_t;
  }
  write_part(args, blockIdx.x, sum);
}

// A thread for every head.
__global__ void __launch_bounds__(kThreads) head_values(const __grid_constant__ QkArgs args) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= args.all_heads()) return;
  const Head h(args, index);
  double sum = 0;
  for (int i = 0; i < args.tiles(); ++i) sum += args.parts[index * args.tiles() + i];
  args.values[index] = h.skipped ? 0.f : float(h.weight * sum);
}

KDFAST_HD int tiles_of(int size) { return (size + kTile - 1) / kTile; }

// A block for every head, 64 queries and 64 of their numbers.
template <class Scores>
__global__ void __launch_bounds__(kThreads) scores_dq(const __grid_constant__ QkArgs args) {
  const int wide = tiles_of(args.student_size), first = int(blockIdx.x) % wide * kTile;
  const int64_t place = blockIdx.x / wide;
  const Head h(args, place / args.tiles());
  const int query = int(place % args.tiles()) * kTile;
  Tile dq;
  for (int key = 0; !h.skipped && key < args.length && !(args.causal && key > query); key += kTile) {
    Scores scores(args, h, query, key);
    scores.derivative(args, h, query, key).keep();
    dq.add(
        kTile, [&](int r, int c) { return shared().scores[r][c]; },
        [&](int n, int c) { return h.student_k(key + c, first + n); });
  }
  write_gradient(args, args.layer[h.layer].dq, args.heads, h.batch, h.head, dq, query, first,
                 h.factor(args) * args.student_scale);
}

// A block for every head of keys, 64 keys and 64 of their numbers; the heads that share them in turn.
template <class Scores>
__global__ void __launch_bounds__(kThreads) scores_dk(const __grid_constant__ QkArgs args) {
  const int wide = tiles_of(args.student_size), first = int(blockIdx.x) % wide * kTile;
  const int64_t place = blockIdx.x / wide, of_keys = place / args.tiles();
  const int key = int(place % args.tiles()) * kTile, share = args.heads / args.key_heads;
  Tile dk;
  for (int i = 0; i < share; ++i) {
    const Head h(args, of_keys * share + i);
    const float factor = h.factor(args);
    for (int query = args.causal ? key : 0; !h.skipped && query < args.length; query += kTile) {
      Scores scores(args, h, query, key);
      scores.derivative(args, h, query, key).keep();
      dk.add(
          kTile, [&](int r, int q) { return shared().scores[q][r]; },
          [&](int n, int q) { return factor * h.student_q(query + q, first + n); });
    }
  }
  const Head h(args, of_keys * share);
  write_gradient(args, args.layer[h.layer].dk, args.key_heads, h.batch, h.head / share, dk, key, first, 1.f);
}

// ---- grams: G = X^T X, then H = Y^T Y of every head ----
KDFAST_DEVICE float* gram_of(const QkArgs& args, int64_t head, int which) {
  const int64_t width = 2 * args.student_size;
  return args.grams + (head * 2 + which) * width * width;
}

// A block for every head, matrix, and tile on or above the diagonal.
__global__ void __launch_bounds__(kThreads) make_grams(const __grid_constant__ QkArgs args) {
  const int width = 2 * args.student_size, wide = tiles_of(width);
  int64_t place = blockIdx.x;
  const int column = int(place % wide) * kTile;
  place /= wide;
  const int row = int(place % wide) * kTile;
  place /= wide;
  const Head h(args, place / 2);
  if (h.skipped || column < row) return;
  Tile tile;
  if (place % 2 == 0) {
    tile.add(
        args.length, [&](int r, int l) { return row + r < width ? h.x(l, row + r) : 0.f; },
        [&](int c, int l) { return column + c < width ? h.x(l, column + c) : 0.f; });
  } else {
    tile.add(
        args.length, [&](int r, int l) { return row + r < width ? h.y(l, row + r) : 0.f; },
        [&](int c, int l) { return column + c < width ? h.y(l, column + c) : 0.f; });
  }
  float* to = gram_of(args, h.index, int(place % 2));
  tile.each([&](int r, int c, float x) {
    if (row + r >= width || column + c >= width) return;
    to[int64_t(row + r) * width + column + c] = x;
    to[int64_t(column + c) * width + row + r] = x;
  });
}

// A block for every head.
__global__ void __launch_bounds__(kThreads) gram_values(const __grid_constant__ QkArgs args) {
  const Head h(args, blockIdx.x);
  const int64_t width = 2 * args.student_size;
  const float *g = gram_of(args, h.index, 0), *y = gram_of(args, h.index, 1);
  double sum = 0;
  for (int64_t i = threadIdx.x; !h.skipped && i < width * width; i += kThreads) sum += double(g[i]) * y[i];
  sum = block_sum(sum, (double*)shared_memory());
  if (threadIdx.x == 0) args.values[h.index] = float(h.weight * sum);
}

__global__ void __launch_bounds__(kThreads) grams_dq(const __grid_constant__ QkArgs args) {
  const int d = args.student_size, wide = tiles_of(d), first = int(blockIdx.x) % wide * kTile;
  const int64_t place = blockIdx.x / wide;
  const Head h(args, place / args.tiles());
  const int query = int(place % args.tiles()) * kTile;
  const float* of_keys = gram_of(args, h.index, 1);
  Tile dq;
  if (!h.skipped) {
    dq.add(
        2 * d, [&](int r, int p) { return h.x(query + r, p); },
        [&](int n, int p) { return first + n < d ? of_keys[int64_t(p) * 2 * d + first + n] : 0.f; });
  }
  write_gradient(args, args.layer[h.layer].dq, args.heads, h.batch, h.head, dq, query, first,
                 2 * h.factor(args) * args.student_scale);
}

__global__ void __launch_bounds__(kThreads) grams_dk(const __grid_constant__ QkArgs args) {
  const int d = args.student_size, wide = tiles_of(d), first = int(blockIdx.x) % wide * kTile;
  const int64_t place = blockIdx.x / wide, of_keys = place / args.tiles();
  const int key = int(place % args.tiles()) * kTile, share = args.heads / args.key_heads;
  Tile dk;
  for (int i = 0; i < share; ++i) {
    const Head h(args, of_keys * share + i);
    if (h.skipped) continue;
    const float factor = 2 * h.factor(args);
    const float* g = gram_of(args, h.index, 0);
    dk.add(
        2 * d, [&](int r, int p) { return h.y(key + r, p); },
        [&](int n, int p) {
          const float* row = g + int64_t(p) * 2 * d + first + n;
          return first + n < d ? factor * (row[0] + row[d]) : 0.f;
        });
  }
  const Head h(args, of_keys * share);
  write_gradient(args, args.layer[h.layer].dk, args.key_heads, h.batch, h.head / share, dk, key, first, 1.f);
}

}  // namespace

void launch_qk(const char* op, const Target& target, QkForm form, const QkArgs& args) {
  const int64_t heads = args.all_heads(), wide = tiles_of(args.student_size);
  auto run = [&](void (*kernel)(QkArgs), int64_t blocks) {
    launch(op, kernel, target, {blocks, kThreads, kShared}, args);
  };
  if (form == QkForm::grams) {
    const int64_t tiles = tiles_of(2 * args.student_size);
    run(make_grams, heads * 2 * tiles * tiles);
    run(gram_values, heads);
  } else {
    run(form == QkForm::scores_kl ? kl_values : mse_values, heads * args.tiles());
    run(head_values, (heads + kThreads - 1) / kThreads);
  }
  if (!args.layer[0].dq) return;
  const int64_t queries = heads * args.tiles() * wide, keys = heads / args.heads * args.key_heads * args.tiles() * wide;
  const bool kl = form == QkForm::scores_kl, grams = form == QkForm::grams;
  run(grams ? grams_dq : kl ? scores_dq<KlScores> : scores_dq<MseScores>, queries);
  run(grams ? grams_dk : kl ? scores_dk<KlScores> : scores_dk<MseScores>, keys);
}

std::vector<NamedKernel> qk_kernels() {
  return {{"qk, squared scores", (const void*)mse_values},
          {"qk, rows of softmaxes", (const void*)kl_values},
          {"qk, gradients of scores", (const void*)scores_dk<MseScores>},
          {"qk, gradients of softmaxes", (const void*)scores_dk<KlScores>},
          {"qk, Gram matrices", (const void*)make_grams},
          {"qk, gradients of Gram matrices", (const void*)grams_dk}};
}

}  // namespace kdfast::cuda

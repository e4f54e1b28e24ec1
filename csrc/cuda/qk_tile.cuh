// Products of the losses of queries and keys (qk.cu), as tiles of 64 x 64, 4 x 4 of a thread, from panels of 16 in
// shared memory, whose operands are read through functions; and the tokens of a head as such functions.
#pragma once
#include "cuda/block.cuh"
#include "cuda/divergence_rows.cuh"
#include "cuda/qk.h"

namespace kdfast::cuda {

constexpr int kTile = 64, kPanel = 16, kThreads = 256, kRow = kTile + 1;

struct Shared {
  float a[kPanel][kRow], b[kPanel][kRow];
  float scores[kTile][kRow];
};
KDFAST_DEVICE Shared& shared() { return *(Shared*)shared_memory(); }
constexpr int64_t kShared = sizeof(Shared);
static_assert(sizeof(Shared) >= kThreads * sizeof(double));

// Rows 4 y + i and columns 4 x + j of a tile are this thread's.
KDFAST_DEVICE int row_of(int i) { return threadIdx.x / 16 * 4 + i; }
KDFAST_DEVICE int column_of(int j) { return threadIdx.x % 16 * 4 + j; }

struct Tile {
  float at[4][4];

  KDFAST_DEVICE Tile() {
#pragma unroll
    for (int i = 0; i < 16; ++i) at[i / 4][i % 4] = 0.f;
  }
  // += sum over k < size of a(row, k) * b(column, k). What is there already is added last: one rounding at its size for
  // every panel.
  template <class A, class B>
  KDFAST_DEVICE void add(int size, A a, B b) {
    Shared& s = shared();
    for (int first = 0; first < size; first += kPanel) {
      __syncthreads();  // the panels before, and what the caller keeps in shared memory, are read
#pragma unroll
      for (int turn = 0; turn < kTile * kPanel / kThreads; ++turn) {
        const int i = turn * kThreads + threadIdx.x, k = i % kPanel, row = i / kPanel;
        const bool exists = first + k < size;
        s.a[k][row] = exists ? a(row, first + k) : 0.f;
        s.b[k][row] = exists ? b(row, first + k) : 0.f;
      }
      __syncthreads();
      Tile part;
#pragma unroll
      for (int k = 0; k < kPanel; ++k) {
        float x[4], y[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = s.a[k][row_of(i)], y[i] = s.b[k][column_of(i)];
#pragma unroll
        for (int i = 0; i < 16; ++i) part.at[i / 4][i % 4] = fmaf(x[i / 4], y[i % 4], part.at[i / 4][i % 4]);
      }
#pragma unroll
      for (int i = 0; i < 16; ++i) at[i / 4][i % 4] += part.at[i / 4][i % 4];
    }
  }
  // f(row, column, value)
  template <class F>
  KDFAST_DEVICE void each(F f) {
#pragma unroll
    for (int i = 0; i < 16; ++i) f(row_of(i / 4), column_of(i % 4), at[i / 4][i % 4]);
  }
  // For an operand of add(), whose first barrier makes it visible.
  KDFAST_DEVICE void keep() {
    __syncthreads();  // the scores before are read
    each([](int r, int c, float x) { shared().scores[r][c] = x; });
  }
};

// The tokens of a head: 0 where one does not count.
struct Tokens {
  const void* data;
  Element type;
  int64_t token, number;
  const bool* counted;
  int length, size;
  float scale;

  KDFAST_DEVICE float operator()(int i, int c) const {
    if (i >= length || c >= size || (counted && !counted[i])) return 0.f;
    return scale * load_any(type, data, i * token + c * number);
  }
};

struct Head {
  Tokens student_q, student_k, teacher_q, teacher_k;
  const bool *queries, *keys;
  int64_t index;  // of all heads
  int batch, layer, head;
  float weight;  // over the divisor, without the upstream factor
  bool skipped;

  KDFAST_DEVICE Head(const QkArgs& args, int64_t index) : index(index) {
    head = int(index % args.heads);
    batch = int(index / args.heads % args.batch);
    layer = int(index / args.heads / args.batch);
    const int entry = layer * args.heads + head, of_teacher = args.table.teacher[entry];
    skipped = of_teacher < 0;
    const int teacher = skipped ? 0 : of_teacher;
    const float divisor = args.divisor ? *args.divisor : 1.f;
    weight = divisor > 0.f ? args.table.weight[entry] / divisor : 0.f;
    queries = args.query_mask ? args.query_mask + int64_t(batch) * args.length : nullptr;
    keys = args.key_mask ? args.key_mask + int64_t(batch) * args.length : nullptr;
    const QkLayer& from = args.layer[layer];
    auto tokens = [&](const QkMemory& m, Element type, int h, const bool* counted, int size, float scale) {
      const int64_t offset = batch * m.batch + h * m.head;
      const void* at = (const char*)m.data + offset * size_of(type);
      return Tokens{at, type, m.token, m.number, counted, args.length, size, scale};
    };
    student_q = tokens(from.student_q, args.student_type, head, queries, args.student_size, args.student_scale);
    student_k =
        tokens(from.student_k, args.student_type, head / (args.heads / args.key_heads), keys, args.student_size, 1.f);
    teacher_q = tokens(from.teacher_q, args.teacher_type, teacher, queries, args.teacher_size, args.teacher_scale);
    teacher_k = tokens(from.teacher_k, args.teacher_type, teacher / args.teacher_shared, keys, args.teacher_size, 1.f);
  }
  KDFAST_DEVICE float factor(const QkArgs& args) const {
    return args.upstream ? weight * args.upstream[args.per_head ? index : 0] : weight;
  }
  KDFAST_DEVICE bool counts(const QkArgs& args, int query) const {
    return query < args.length && (!queries || queries[query]);
  }
  // The columns of X = [a Qs - b Qt, b Qt] and of Y = [Ks, Ks - Kt].
  KDFAST_DEVICE float x(int i, int p) const {
    const int d = student_q.size;
    return p < d ? student_q(i, p) - teacher_q(i, p) : teacher_q(i, p - d);
  }
  KDFAST_DEVICE float y(int i, int p) const {
    const int d = student_k.size;
    return p < d ? student_k(i, p) : student_k(i, p - d) - teacher_k(i, p - d);
  }
};

// A tile of the gradient of queries or keys of `heads` heads.
KDFAST_DEVICE void write_gradient(const QkArgs& args, void* to, int heads, int batch, int head, Tile& tile, int token,
                                  int first, float factor) {
  tile.each([&](int r, int c, float x) {
    if (token + r >= args.length || first + c >= args.student_size) return;
    const int64_t row = (int64_t(batch) * heads + head) * args.length + token + r;
    store_any(args.student_type, to, row * args.student_size + first + c, factor * x);
  });
}

}  // namespace kdfast::cuda

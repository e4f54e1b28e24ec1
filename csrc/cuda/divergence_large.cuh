// Rows of more columns than registers hold: kept in shared memory between the two looks, or read twice.
#pragma once
#include "cuda/cluster.cuh"
#include "cuda/divergence_rows.cuh"

namespace kdfast::cuda {

// The 16-byte vectors of a row that a block takes. Student, teacher and gradient rows are misaligned alike, so columns
// up to the first boundary and after the last are the same on all; threads take those one by one, and odd vocabularies
// and odd addresses need no other path.
template <class T>
struct Share {
  static constexpr int kWidth = Vector<T>::count;
  const T *student, *teacher;  // the row
  T* gradient;                 // null: not wanted
  int first, vectors;          // column of the share's first vector, and their number
  int edge = -1;               // this thread's own column at an edge of the row

  KDFAST_DEVICE Share(const DivergenceArgs& args, int64_t row, int rank)
      : student((const T*)args.student + args.student_rows(row)),
        teacher((const T*)args.teacher + args.teacher_rows(row)),
        gradient((T*)gradient_of(args, row, sizeof(T))) {
    const int columns = int(args.columns), thread = threadIdx.x, last = (1 << args.log_cluster) - 1;
    const int head = min(columns, int((0 - uintptr_t(student) / sizeof(T)) & (kWidth - 1)));
    const int body = (columns - head) / kWidth, tail = columns - head - body * kWidth;
    const int each = (body + last) >> args.log_cluster, before = min(body, rank * each);
    first = head + before * kWidth;
    vectors = min(body - before, each);
    if (rank == 0 && thread < head) edge = thread;
    if (rank == last && thread >= kWidth && thread - kWidth < tail) edge = columns - tail + thread - kWidth;
  }
  KDFAST_DEVICE Logits<1> edge_logits() const {
    if (edge < 0) return {{-INFINITY}, {-INFINITY}};
    return {{Vector<T>::widen_one(student[edge])}, {Vector<T>::widen_one(teacher[edge])}};
  }
  template <class Gradient>
  KDFAST_DEVICE void write_edge(const Logits<1>& z, Gradient of) const {
    if (edge >= 0) gradient[edge] = Vector<T>::narrow_one(of(z.s[0], z.t[0]));
  }
  template <class Gradient>
  KDFAST_DEVICE void write(int vector, uint4 s, uint4 t, Gradient of) const {
    float x[kWidth], y[kWidth], g[kWidth];
    Vector<T>::widen(s, x);
    Vector<T>::widen(t, y);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) g[e] = of(x[e], y[e]);
    store16(gradient + first + int64_t(vector) * kWidth, Vector<T>::narrow(g));
  }
};

// A block's share in its shared memory. A thread reads back only what it copied itself: no barrier.
template <class T>
struct OnChip {
  const Share<T>& share;
  uint4 *s, *t;

  KDFAST_DEVICE explicit OnChip(const Share<T>& share) : share(share) {
    s = (uint4*)(shared_memory() + kExchangeBytes);
    t = s + share.vectors;
#pragma unroll 4
    for (int v = threadIdx.x; v < share.vectors; v += blockDim.x) {
      const int64_t at = share.first + int64_t(v) * Share<T>::kWidth;
      copy16_async(s + v, share.student + at);
      copy16_async(t + v, share.teacher + at);
    }
  }
  template <class F>
  KDFAST_DEVICE void each(F f) const {
#pragma unroll 2
    for (int v = threadIdx.x; v < share.vectors; v += blockDim.x) f(v, s[v], t[v]);
  }

  // The state of the thread's warp: maxima first, so that no sum is ever rescaled.
  template <class Terms>
  KDFAST_DEVICE RowState<float> first_look(const Logits<1>& edge, float k) const {
    using V = Vector<T>;
    uint4 most_s = V::lowest(), most_t = most_s;
    each([&](int, uint4 a, uint4 b) {
      most_s = V::maximum(most_s, a);
      most_t = V::maximum(most_t, b);
    });
    RowState<float> warp;
    warp.max_s = fmaxf(kNoMaximum, warp_max(fmaxf(V::top(most_s), edge.s[0])));
    warp.max_t = fmaxf(kNoMaximum, warp_max(fmaxf(V::top(most_t), edge.t[0])));
    auto count = [&](float x, float y) { Terms::count(warp, x - warp.max_s, y - warp.max_t, k); };
    count(edge.s[0], edge.t[0]);
    each([&](int, uint4 a, uint4 b) {
      float x[V::count], y[V::count];
      V::widen(a, x);
      V::widen(b, y);
#pragma unroll
      for (int e = 0; e < V::count; ++e) count(x[e], y[e]);
    });
    warp.sum_s = warp_sum(warp.sum_s);
    warp.sum_t = warp_sum(warp.sum_t);
    warp.dot = warp_sum(warp.dot);
    return warp;
  }
};

// The gradient of a column from its logits.
template <class Terms>
KDFAST_DEVICE auto gradient_from(const RowState<float>& state, const RowFactors& factors) {
  return [of = typename Terms::Gradient(state, factors.gradient), k = factors.k, max_s = state.max_s,
          max_t = state.max_t](float x, float y) { return of(x - max_s, y - max_t, k); };
}

// One row per block or cluster: read once, written once.
template <class Terms, class T>
__global__ void __launch_bounds__(kMaxRowThreads, 2) rows_on_chip(const __grid_constant__ DivergenceArgs args) {
  const int cluster = 1 << args.log_cluster, rank = cluster > 1 ? cluster_rank() : 0;
  const int64_t row = blockIdx.x >> args.log_cluster;
  const int thread = rank * blockDim.x + threadIdx.x;
  const bool counted = is_counted(args, row);
  clear_gradient(args, row, sizeof(T), counted ? args.columns : 0, thread, cluster * blockDim.x);
  if (!counted) {  // nor do the other blocks of the cluster wait for this one
    if (thread == 0) write_masked(args, row);
    return;
  }
  auto* exchange = (Exchange*)shared_memory();
  row_begin(exchange, cluster);
  const Share<T> share(args, row, rank);
  const OnChip<T> chip(share);
  const Logits<1> edge = share.edge_logits();
  const RowFactors factors = factors_of(args, row);
  copies_arrived();
  const auto warp = chip.template first_look<Terms>(edge, factors.k);
  const RowState<float> state = row_merge(warp, factors.k, exchange, cluster);
  if (thread == 0) write_results(args, row, factors.coefficient * Terms::loss(state, factors.k), state);
  if (!args.gradient) return;
  const auto of = gradient_from<Terms>(state, factors);
  chip.each([&](int v, uint4 s, uint4 t) { share.write(v, s, t, of); });
  share.write_edge(edge, of);
}

// ---- two reads ----
// Both kinds of columns call `f` with the thread's own logits, a few at a time, loaded before the first is used.

template <class T>
struct VectorColumns {
  static constexpr int kBatch = 2;
  Share<T> share;
  KDFAST_DEVICE VectorColumns(const DivergenceArgs& args, int64_t row) : share(args, row, 0) {}

  template <class F>
  KDFAST_DEVICE void each_vector(F f) const {
    const T *student = share.student + share.first, *teacher = share.teacher + share.first;
    for (int begin = threadIdx.x; begin < share.vectors; begin += kBatch * blockDim.x) {
      uint4 s[kBatch], t[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int v = begin + u * blockDim.x;
        s[u] = t[u] = Vector<T>::lowest();
        if (v >= share.vectors) continue;
        s[u] = load16(student + int64_t(v) * Share<T>::kWidth);
        t[u] = load16(teacher + int64_t(v) * Share<T>::kWidth);
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) f(begin + u * int(blockDim.x), s[u], t[u]);
    }
  }
  template <class F>
  KDFAST_DEVICE void look(F f) const {
    f(share.edge_logits());
    each_vector([&](int, uint4 s, uint4 t) {
      Logits<Share<T>::kWidth> z;
      Vector<T>::widen(s, z.s);
      Vector<T>::widen(t, z.t);
      f(z);
    });
  }
  template <class Gradient>
  KDFAST_DEVICE void write(Gradient of) const {
    share.write_edge(share.edge_logits(), of);
    each_vector([&](int v, uint4 s, uint4 t) {
      if (v < share.vectors) share.write(v, s, t, of);
    });
  }
};

// Column by column, with dtypes and strides known only at run time.
struct AnyColumns {
  static constexpr int kBatch = 4;
  const DivergenceArgs& args;
  const char *student, *teacher;
  char* gradient;

  KDFAST_DEVICE static int size_of(Element type) { return type == Element::f32 ? 4 : 2; }
  KDFAST_DEVICE static float load(Element type, const char* row, int64_t at) {
    if (type == Element::f32) return ((const float*)row)[at];
    if (type == Element::bf16) return Vector<BFloat16>::widen_one(((const BFloat16*)row)[at]);
    return Vector<Float16>::widen_one(((const Float16*)row)[at]);
  }
  KDFAST_DEVICE static void store(Element type, char* row, int64_t at, float x) {
    if (type == Element::f32) {
      ((float*)row)[at] = x;
    } else if (type == Element::bf16) {
      ((BFloat16*)row)[at] = Vector<BFloat16>::narrow_one(x);
    } else {
      ((Float16*)row)[at] = Vector<Float16>::narrow_one(x);
    }
  }

  KDFAST_DEVICE AnyColumns(const DivergenceArgs& args, int64_t row)
      : args(args),
        student((const char*)args.student + args.student_rows(row) * size_of(args.student_type)),
        teacher((const char*)args.teacher + args.teacher_rows(row) * size_of(args.teacher_type)),
        gradient(gradient_of(args, row, size_of(args.student_type))) {}

  template <class F>
  KDFAST_DEVICE void each_batch(F f) const {
    for (int64_t begin = threadIdx.x; begin < args.columns; begin += kBatch * blockDim.x) {
      Logits<kBatch> z;
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int64_t at = begin + u * blockDim.x;
        const bool exists = at < args.columns;
        z.s[u] = exists ? load(args.student_type, student, at * args.student_stride) : -INFINITY;
        z.t[u] = exists ? load(args.teacher_type, teacher, at * args.teacher_stride) : -INFINITY;
      }
      f(begin, z);
    }
  }
  template <class F>
  KDFAST_DEVICE void look(F f) const {
    each_batch([&](int64_t, const Logits<kBatch>& z) { f(z); });
  }
  template <class Gradient>
  KDFAST_DEVICE void write(Gradient of) const {
    each_batch([&](int64_t begin, const Logits<kBatch>& z) {
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int64_t at = begin + u * blockDim.x;
        if (at < args.columns) store(args.student_type, gradient, at, of(z.s[u], z.t[u]));
      }
    });
  }
};

// Adds columns to a thread's state, whose maxima rise as it goes.
template <class Terms, int n>
KDFAST_DEVICE void count_logits(RowState<float>& state, const Logits<n>& z, float k) {
  float top_s = z.s[0], top_t = z.t[0];
#pragma unroll
  for (int e = 1; e < n; ++e) top_s = fmaxf(top_s, z.s[e]), top_t = fmaxf(top_t, z.t[e]);
  top_s = fmaxf(state.max_s, top_s);
  top_t = fmaxf(state.max_t, top_t);
  if (top_s > state.max_s || top_t > state.max_t) state = referred(state, top_s, top_t, k);
#pragma unroll
  for (int e = 0; e < n; ++e) Terms::count(state, z.s[e] - state.max_s, z.t[e] - state.max_t, k);
}

// One row per block, read once for its state (unless that is given) and once more for its gradient (if it is wanted).
template <class Terms, class Columns>
__global__ void __launch_bounds__(kMaxRowThreads, 2) rows_in_two_reads(const __grid_constant__ DivergenceArgs args) {
  const int64_t row = blockIdx.x;
  const bool counted = is_counted(args, row);
  const int element_size = AnyColumns::size_of(args.student_type);
  clear_gradient(args, row, element_size, counted ? args.columns : 0, threadIdx.x, blockDim.x);
  if (!counted) {
    if (threadIdx.x == 0) write_masked(args, row);
    return;
  }
  const Columns columns(args, row);
  const RowFactors factors = factors_of(args, row);
  RowState<float> state;
  if (args.given) {
    state = given_state(args, row);
  } else {
    columns.look([&](const auto& z) { count_logits<Terms>(state, z, factors.k); });
    state = row_merge(warp_merge(state, factors.k), factors.k, (Exchange*)shared_memory(), 1);
    if (threadIdx.x == 0) write_results(args, row, factors.coefficient * Terms::loss(state, factors.k), state);
  }
  if (args.gradient) columns.write(gradient_from<Terms>(state, factors));
}

}  // namespace kdfast::cuda

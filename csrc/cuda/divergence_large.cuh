// Rows of more columns than registers hold: kept in shared memory between the two looks, or read twice.
#pragma once
#include "cuda/cluster.cuh"
#include "cuda/divergence_any.cuh"
#include "cuda/divergence_rows.cuh"

namespace kdfast::cuda {

// The 16-byte vectors of a row that a block takes. Student, teacher and gradient rows are misaligned alike, so columns
// up to the first boundary and after the last are the same on all; threads take those one by one, and odd vocabularies
// and odd addresses need no other path. Vectors of float32 may be made of 16-bit logits on either side or both: then
// boundaries are those of four elements.
template <class T>
struct Share {
  static constexpr int kWidth = Vector<T>::count;
  const T *student, *teacher;  // the row; where `several`, of these types
  char* gradient;              // null: not wanted
  Element gradient_type, student_type, teacher_type;
  bool several;
  int first, vectors;  // column of the share's first vector, and their number
  int edge = -1;       // this thread's own column at an edge of the row

  KDFAST_DEVICE Share(const DivergenceArgs& args, int64_t row, int rank)
      : gradient(gradient_of(args, row)),
        gradient_type(args.gradient_type),
        student_type(args.student_type),
        teacher_type(args.teacher_type),
        several(sizeof(T) == 4 && (args.student_type != Element::f32 || args.teacher_type != Element::f32)) {
    const int64_t size_s = several ? size_of(student_type) : sizeof(T),
                  size_t = several ? size_of(teacher_type) : sizeof(T);
    student = (const T*)((const char*)args.student + offset(args.student_rows, row) * size_s);
    teacher = (const T*)((const char*)args.teacher + offset(args.teacher_rows, row) * size_t);
    const int columns = int(args.columns), thread = threadIdx.x, last = (1 << args.log_cluster) - 1;
    const int head = min(columns, int((0 - uintptr_t(student) / size_s) & (kWidth - 1)));
    const int body = (columns - head) / kWidth, tail = columns - head - body * kWidth;
    const int each = (body + last) >> args.log_cluster, before = min(body, rank * each);
    first = head + before * kWidth;
    vectors = min(body - before, each);
    if (rank == 0 && thread < head) edge = thread;
    if (rank == last && thread >= kWidth && thread - kWidth < tail) edge = columns - tail + thread - kWidth;
  }
  KDFAST_DEVICE float student_at(int column) const {
    return several ? load_any(student_type, student, column) : Vector<T>::widen_one(student[column]);
  }
  KDFAST_DEVICE float teacher_at(int column) const {
    return several ? load_any(teacher_type, teacher, column) : Vector<T>::widen_one(teacher[column]);
  }
  // Four or eight of each, from a column that starts a vector.
  KDFAST_DEVICE void load(int64_t column, uint4& s, uint4& t) const {
    if (sizeof(T) == 4 && several) {
      s = load_four(student_type, student, column);
      t = load_four(teacher_type, teacher, column);
    } else {
      s = load16(student + column);
      t = load16(teacher + column);
    }
  }
  KDFAST_DEVICE Logits<1> edge_logits() const {
    if (edge < 0) return {{-INFINITY}, {-INFINITY}};
    return {{student_at(edge)}, {teacher_at(edge)}};
  }
  template <class Gradient>
  KDFAST_DEVICE void write_edge(const Logits<1>& z, Gradient of) const {
    if (edge >= 0) store_one<T>(gradient_type, gradient, edge, of(z.s[0], z.t[0]));
  }
  template <class Gradient>
  KDFAST_DEVICE void write(int vector, uint4 s, uint4 t, Gradient of) const {
    float x[kWidth], y[kWidth], g[kWidth];
    Vector<T>::widen(s, x);
    Vector<T>::widen(t, y);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) g[e] = of(x[e], y[e]);
    store_vector<T>(gradient_type, gradient, first + int64_t(vector) * kWidth, g);
  }
  // The label's column again, `less` lower: by the thread that has written it, so that no other need wait.
  template <class Gradient>
  KDFAST_DEVICE void write_label(int column, Gradient of, float less) const {
    const int vector = (column - first) / kWidth;
    const bool mine = column >= first && vector < vectors && vector % int(blockDim.x) == int(threadIdx.x);
    if (!mine && column != edge) return;
    store_one<T>(gradient_type, gradient, column, of(student_at(column), teacher_at(column)) - less);
  }
};

template <class T>
KDFAST_DEVICE Logits<Vector<T>::count> widened(uint4 s, uint4 t) {
  Logits<Vector<T>::count> z;
  Vector<T>::widen(s, z.s);
  Vector<T>::widen(t, z.t);
  return z;
}

// The kernels see the columns of a row through three functions. look(f) calls f(logits, n) with the thread's own, of
// which the first n exist; write(of) writes the gradient of(s, t) of each; write_label writes a label's again.

// A block's share in its shared memory. A thread reads back only what it copied itself: no barrier.
template <class T>
struct OnChip {
  const Share<T>& share;
  uint4 *s, *t;
  Logits<1> edge;

  KDFAST_DEVICE explicit OnChip(const Share<T>& share) : share(share) {
    s = (uint4*)(shared_memory() + exchange_bytes(blockDim.x));
    t = s + share.vectors;
    edge = share.edge_logits();
    if (sizeof(T) == 4 && share.several) {
      widen();
    } else {
      copy();
    }
  }
  KDFAST_DEVICE void copy() {
#pragma unroll 4
    for (int v = threadIdx.x; v < share.vectors; v += blockDim.x) {
      const int64_t at = share.first + int64_t(v) * Share<T>::kWidth;
      copy16_async(s + v, share.student + at);
      copy16_async(t + v, share.teacher + at);
    }
  }
  // Through registers.
  KDFAST_DEVICE void widen() {
#pragma unroll 4
    for (int v = threadIdx.x; v < share.vectors; v += blockDim.x) {
      uint4 a, b;
      share.load(share.first + int64_t(v) * Share<T>::kWidth, a, b);
      s[v] = a, t[v] = b;
    }
  }
  template <int unroll = 2, class F>
  KDFAST_DEVICE void each(F f) const {
#pragma unroll unroll
    for (int v = threadIdx.x; v < share.vectors; v += blockDim.x) f(v, s[v], t[v]);
  }
  template <class F>
  KDFAST_DEVICE void look(F f) const {
    f(edge, share.edge >= 0);
    each<1>([&](int, uint4 a, uint4 b) { f(widened<T>(a, b), Vector<T>::count); });
  }
  template <class Gradient>
  KDFAST_DEVICE void write(Gradient of) const {
    each([&](int v, uint4 a, uint4 b) { share.write(v, a, b, of); });
    share.write_edge(edge, of);
  }
  template <class Gradient>
  KDFAST_DEVICE void write_label(int column, Gradient of, float less) const {
    share.write_label(column, of, less);
  }

  // The state of the thread's warp: maxima first, so that no sum is ever rescaled.
  template <class Terms>
  KDFAST_DEVICE RowState<float> first_look(float k, bool labels, bool smooth) const {
    using V = Vector<T>;
    uint4 most_s = V::lowest(), most_t = most_s;
    each([&](int, uint4 a, uint4 b) {
      most_s = V::maximum(most_s, a);
      most_t = V::maximum(most_t, b);
    });
    RowState<float> warp = no_columns<float>();
    warp.max_s = fmaxf(kNoMaximum, warp_max(fmaxf(V::top(most_s), edge.s[0])));
    warp.max_t = fmaxf(kNoMaximum, warp_max(fmaxf(V::top(most_t), edge.t[0])));
    count<Terms>(warp, edge.s[0], edge.t[0], k);
    each([&](int, uint4 a, uint4 b) {
      const auto z = widened<T>(a, b);
#pragma unroll
      for (int e = 0; e < V::count; ++e) count<Terms>(warp, z.s[e], z.t[e], k);
    });
    if (labels) {
      count_at_one(warp, edge.s[0], smooth && share.edge >= 0);
      for (int v = threadIdx.x; v < share.vectors; v += blockDim.x) {
        float x[V::count];
        V::widen(s[v], x);
#pragma unroll
        for (int e = 0; e < V::count; ++e) count_at_one(warp, x[e], smooth);
      }
    }
    warp_sums<Terms>(warp, labels);
    return warp;
  }
};

// Adds to the state what a second look of the row's threads makes.
template <template <class> class Divergence, class Columns>
KDFAST_DEVICE void look_again(const DivergenceArgs& args, const Columns& columns, float k, Exchange* exchange,
                              int blocks, RowState<float>& state) {
  const Normalised<Divergence<ColumnMath>> to(state, k, 1.f);
  SecondSums<Divergence> mine{args.settings};
  columns.look([&](const auto& z, int) {
#pragma unroll
    for (int e = 0; e < z.count; ++e) mine.count(to, z.s[e], z.t[e]);
  });
  const float2 sums = row_merge_again({mine.loss, mine.mean_u}, exchange, blocks);
  state.moment_t = sums.x;
  state.moment_s = sums.y;
}

// One row per block or cluster: read once, written once.
template <template <class> class Divergence, class T>
__global__ void __launch_bounds__(kMaxRowThreads, 2) rows_on_chip(const __grid_constant__ DivergenceArgs args) {
  using Terms = Divergence<ColumnMath>;
  const int cluster = 1 << args.log_cluster, rank = cluster > 1 ? cluster_rank() : 0;
  const int64_t row = blockIdx.x >> args.log_cluster;
  const int thread = rank * blockDim.x + threadIdx.x;
  const bool counted = is_counted(args, row), labels = args.labels.data;
  clear_gradient(args, row, counted ? args.columns : 0, thread, cluster * blockDim.x);
  if (!counted) {  // nor do the other blocks of the cluster wait for this one
    if (thread == 0) write_masked(args, row);
    return;
  }
  auto* exchange = (Exchange*)shared_memory();
  row_begin<Terms>(exchange, cluster, labels);
  const Share<T> share(args, row, rank);
  const OnChip<T> chip(share);
  const RowFactors factors = factors_of(args, row);
  copies_arrived();
  const auto warp = chip.template first_look<Terms>(factors.k, labels, args.smoothing > 0.f);
  RowState<float> state = row_merge<Terms>(warp, factors.k, exchange, cluster, labels);
  if constexpr (Terms::kSecondLook) look_again<Divergence>(args, chip, factors.k, exchange, cluster, state);
  if (thread == 0) write_results<Divergence>(args, row, factors, state);
  if (args.gradient) write_gradient<Divergence>(args, chip, factors, state);
}

// ---- two reads ----
// Logits come a few at a time, loaded before the first is used.

template <class T>
struct VectorColumns {
  static constexpr int kBatch = 2;
  Share<T> share;
  KDFAST_DEVICE VectorColumns(const DivergenceArgs& args, int64_t row, float) : share(args, row, 0) {}

  template <class F>
  KDFAST_DEVICE void each_vector(F f) const {
    for (int begin = threadIdx.x; begin < share.vectors; begin += kBatch * blockDim.x) {
      uint4 s[kBatch], t[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int v = begin + u * blockDim.x;
        s[u] = t[u] = Vector<T>::lowest();
        if (v >= share.vectors) continue;
        share.load(share.first + int64_t(v) * Share<T>::kWidth, s[u], t[u]);
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) f(begin + u * int(blockDim.x), s[u], t[u]);
    }
  }
  template <class F>
  KDFAST_DEVICE void look(F f) const {
    f(share.edge_logits(), share.edge >= 0);
    each_vector([&](int v, uint4 s, uint4 t) { f(widened<T>(s, t), v < share.vectors ? Vector<T>::count : 0); });
  }
  template <class Gradient>
  KDFAST_DEVICE void write(Gradient of) const {
    share.write_edge(share.edge_logits(), of);
    each_vector([&](int v, uint4 s, uint4 t) {
      if (v < share.vectors) share.write(v, s, t, of);
    });
  }
  template <class Gradient>
  KDFAST_DEVICE void write_label(int column, Gradient of, float less) const {
    share.write_label(column, of, less);
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
  if (top_s > state.max_s || top_t > state.max_t) state = referred<Terms>(state, top_s, top_t, k);
#pragma unroll
  for (int e = 0; e < n; ++e) count<Terms>(state, z.s[e], z.t[e], k);
}

// The state of a thread.
template <class Terms, class Columns>
KDFAST_DEVICE RowState<float> first_look(const Columns& columns, float k, bool labels, bool smooth) {
  RowState<float> state = no_columns<float>();
  if (!labels) {
    columns.look([&](const auto& z, int) { count_logits<Terms>(state, z, k); });
    return state;
  }
  columns.look([&](const auto& z, int n) {
    count_logits<Terms>(state, z, k);
#pragma unroll
    for (int e = 0; e < z.count; ++e) count_at_one(state, z.s[e], smooth && e < n);
  });
  return state;
}

// One row per block, read once for its state (unless that is given), again where the divergence looks again, and once
// more for its gradient (if it is wanted).
template <template <class> class Divergence, class Columns>
__global__ void __launch_bounds__(kMaxRowThreads, 2) rows_in_two_reads(const __grid_constant__ DivergenceArgs args) {
  using Terms = Divergence<ColumnMath>;
  const int64_t row = blockIdx.x;
  const bool counted = is_counted(args, row), labels = args.labels.data;
  clear_gradient(args, row, counted ? args.columns : 0, threadIdx.x, blockDim.x);
  if (!counted) {
    if (threadIdx.x == 0) write_masked(args, row);
    return;
  }
  auto* exchange = (Exchange*)shared_memory();
  const RowFactors factors = factors_of(args, row);
  const Columns columns(args, row, factors.k);
  RowState<float> state;
  if (args.given) {
    state = state_at(args.given, row);
  } else {
    state = first_look<Terms>(columns, factors.k, labels, args.smoothing > 0.f);
    state = row_merge<Terms>(warp_merge<Terms>(state, factors.k, labels), factors.k, exchange, 1, labels);
  }
  if constexpr (Terms::kSecondLook) {
    if (args.known != Known::everything) look_again<Divergence>(args, columns, factors.k, exchange, 1, state);
  }
  if (threadIdx.x == 0) write_results<Divergence>(args, row, factors, state);
  if (args.gradient) write_gradient<Divergence>(args, columns, factors, state);
}

}  // namespace kdfast::cuda

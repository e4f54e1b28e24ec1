// Rows whose teacher is known in some columns: -inf in all others, and not stored there.
//
// Student logits are read once and the gradient is written once, as those of other rows: on chip in a block or a
// cluster, or read again for the gradient. Of the teacher k log-probabilities and indices are read for each look. A bit
// per column in shared memory tells which ones the teacher has: threads go through the student's as if there were none,
// and share the teacher's among themselves.
#pragma once
#include "cuda/divergence_large.cuh"

namespace kdfast::cuda {

// What a block takes of a student's row: single columns up to a 16-byte boundary, vectors, and single ones after the
// last; all single where logits and gradient are misaligned unlike, or lie in strides.
template <class T>
struct TopkShare {
  static constexpr int kWidth = Vector<T>::count;
  const DivergenceArgs& args;
  const T* student;
  char* gradient;
  int begin, lead, vectors, trail;  // the first column; single ones, vectors, single ones

  KDFAST_DEVICE TopkShare(const DivergenceArgs& args, int64_t row, int rank)
      : args(args), student((const T*)args.student + offset(args.student_rows, row)), gradient(gradient_of(args, row)) {
    const int columns = int(args.columns), last = (1 << args.log_cluster) - 1;
    const int to_boundary = int((0 - uintptr_t(student) / sizeof(T)) & (kWidth - 1));
    const int head = takes_vectors(to_boundary) ? min(columns, to_boundary) : columns;
    const int body = (columns - head) / kWidth, each = (body + last) >> args.log_cluster;
    const int before = min(body, rank * each);
    lead = rank == 0 ? head : 0;
    begin = head + before * kWidth - lead;
    vectors = min(body - before, each);
    trail = rank == last ? columns - head - body * kWidth : 0;
  }
  KDFAST_DEVICE bool takes_vectors(int head) const {
    if (args.student_stride != 1) return false;
    if (!gradient) return true;
    const int size = size_of(args.gradient_type);
    const bool writable = args.gradient_type == args.student_type || sizeof(T) == 4;
    return writable && uintptr_t(gradient + head * size) % unsigned(kWidth * size) == 0;
  }
  KDFAST_DEVICE int columns() const { return lead + vectors * kWidth + trail; }
  KDFAST_DEVICE int column_of_vector(int v) const { return begin + lead + v * kWidth; }
  KDFAST_DEVICE int column_of_single(int i) const { return begin + i + (i < lead ? 0 : vectors * kWidth); }
  KDFAST_DEVICE float student_at(int column) const {
    return Vector<T>::widen_one(student[column * args.student_stride]);
  }
  KDFAST_DEVICE void store(int column, float x) const { store_any(args.gradient_type, gradient, column, x); }
  // Whether this thread has the column.
  KDFAST_DEVICE bool is_mine(int column) const {
    const int i = column - begin, inside = i - lead;
    if (inside < 0) return i % int(blockDim.x) == int(threadIdx.x);
    const int vector = inside / kWidth, single = i - vectors * kWidth;
    return (vector < vectors ? vector : single) % int(blockDim.x) == int(threadIdx.x);
  }
};

// `kHeld`: the vectors are kept in shared memory.
template <class T, bool kHeld>
struct TopkColumns {
  static constexpr int kWidth = Vector<T>::count;
  TopkShare<T> share;
  const char* log_probabilities;
  const int64_t* indices;
  uint4* held;
  uint32_t* bits;
  int first_bit;
  float temperature;
  bool wrong;  // a column comes twice, or is none of the vocabulary: nothing else can tell of it without a wait

  KDFAST_DEVICE TopkColumns(const DivergenceArgs& args, int64_t row, int rank, float k)
      : share(args, row, rank),
        log_probabilities((const char*)args.teacher + offset(args.teacher_rows, row) * size_of(args.teacher_type)),
        indices(args.indices.data + offset(args.indices.offsets, row)),
        held((uint4*)(shared_memory() + exchange_bytes(blockDim.x))),
        bits((uint32_t*)(held + (kHeld ? share.vectors : 0))),
        first_bit(-share.lead & 7),  // a vector's bits lie in one word
        temperature(float(kLog2e) / k) {
    if constexpr (kHeld) {
#pragma unroll 4
      for (int v = threadIdx.x; v < share.vectors; v += blockDim.x) {
        copy16_async(held + v, share.student + share.column_of_vector(v));
      }
    }
    mark();
  }
  KDFAST_DEVICE void mark() {
    const TopkIndices& all = share.args.indices;
    const int words = (first_bit + share.columns() + 31) / 32;
    for (int i = threadIdx.x; i <= words; i += blockDim.x) bits[i] = 0;
    __syncthreads();  // no bit is set
    for (int e = threadIdx.x; e < all.count; e += blockDim.x) {
      const int64_t index = indices[e * all.stride];
      const bool none = log_probability(e) == -INFINITY, foreign = index < 0 || index >= all.vocabulary;
      const int column = none ? -1 : here(index), bit = first_bit + column - share.begin;
      const bool again = column >= 0 && shared_or(bits + bit / 32, 1u << bit % 32);
      if (again || (foreign && !none)) shared_or(bits + words, 1u);
    }
    __syncthreads();  // all are
    wrong = bits[words] != 0;
  }
  KDFAST_DEVICE float log_probability(int64_t entry) const {
    return load_any(share.args.teacher_type, log_probabilities, entry * share.args.teacher_stride);
  }
  // The column of these logits, or -1 where this block does not have it.
  KDFAST_DEVICE int here(int64_t index) const {
    const int64_t column = index - share.args.indices.vocab_start, inside = column - share.begin;
    return inside >= 0 && inside < share.columns() ? int(column) : -1;
  }
  // As many bits as columns are asked for from there on, all in one word.
  KDFAST_DEVICE uint32_t bits_from(int column) const {
    const int bit = first_bit + column - share.begin;
    return bits[bit / 32] >> bit % 32;
  }

  // f(column, student's logits, bits) of this thread's columns, a vector or one.
  template <class OfVector, class OfSingle>
  KDFAST_DEVICE void each(OfVector of_vector, OfSingle of_single) const {
#pragma unroll 2
    for (int v = threadIdx.x; v < share.vectors; v += blockDim.x) {
      const int column = share.column_of_vector(v);
      of_vector(column, kHeld ? held[v] : load16(share.student + column));
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < share.lead + share.trail; i += blockDim.x) of_single(share.column_of_single(i));
  }
  // f(column, student's logit, teacher's) of those of the teacher's columns that are this thread's.
  template <class F>
  KDFAST_DEVICE void each_entry(F f) const {
    const TopkIndices& all = share.args.indices;
#pragma unroll 1
    for (int e = threadIdx.x; e < all.count; e += blockDim.x) {
      const float of_entry = log_probability(e);
      const int column = of_entry == -INFINITY ? -1 : here(indices[e * all.stride]);
      if (column >= 0) f(column, share.student_at(column), temperature * counted_log_probability(of_entry));
    }
  }

  // The state of a thread, whose maximum rises as it goes. Where the rest is asked for it comes first, by itself: up to
  // there it is all that the thread has seen.
  template <class Terms>
  KDFAST_DEVICE RowState<float> first_look(float k, bool labels, bool smooth) const {
    RowState<float> state = no_columns<float>();
    auto raise = [&](float s) {
      if (s > state.max_s) state = referred<Terms>(state, s, state.max_t, k);
    };
    auto count_student = [&](float s) { state.sum_s += exp2_fast((s - state.max_s) * k); };
    each(
        [&](int column, uint4 raw) {
          float s[kWidth], top = Vector<T>::top(raw);
          Vector<T>::widen(raw, s);
          const uint32_t known = Terms::kRest ? bits_from(column) & ((1u << kWidth) - 1) : 0u;
          if (known) top = take_out(known, s);
          raise(top);
#pragma unroll
          for (int e = 0; e < kWidth; ++e) count_student(s[e]);
          if (!labels) return;
#pragma unroll
          for (int e = 0; e < kWidth; ++e) count_at_one(state, s[e], smooth && !(known >> e & 1));
        },
        [&](int column) {
          if (Terms::kRest && (bits_from(column) & 1)) return;
          const float s = share.student_at(column);
          raise(s);
          count_student(s);
          if (labels) count_at_one(state, s, smooth);
        });
    if constexpr (Terms::kRest) state.max_t = state.max_s, state.moment_s = state.sum_s;
    each_entry([&](int, float s, float t) {
      raise(s);
      if constexpr (Terms::kRest) {
        count_student(s);
        if (labels) count_at_one(state, s, smooth);
      }
      const float et = exp2_fast(t * k);
      state.sum_t += et;
      state.moment_t = fmaf(et, Terms::of_teacher(s - state.max_s, t), state.moment_t);
    });
    if (wrong) state.sum_t = NAN;
    return state;
  }
  // Columns of a vector that the teacher has, as -inf; returns the greatest of the others.
  KDFAST_DEVICE static float take_out(uint32_t known, float* s) {
    float top = -INFINITY;
#pragma unroll
    for (int e = 0; e < kWidth; ++e) top = fmaxf(top, s[e] = known >> e & 1 ? -INFINITY : s[e]);
    return top;
  }
  template <class Gradient>
  KDFAST_DEVICE void write(Gradient of) const {
    each(
        [&](int column, uint4 raw) {
          float s[kWidth], g[kWidth];
          Vector<T>::widen(raw, s);
#pragma unroll
          for (int e = 0; e < kWidth; ++e) g[e] = of.missing(s[e]);
          store_vector<T>(share.args.gradient_type, share.gradient, column, g);
        },
        [&](int column) { share.store(column, of.missing(share.student_at(column))); });
    __syncthreads();  // the teacher's columns are written too, as if they were none
    each_entry([&](int column, float s, float t) { share.store(column, of(s, t)); });
  }
  template <class Gradient>
  KDFAST_DEVICE void write_label(int column, Gradient of, float less) const {
    const int inside = column - share.begin;
    if (inside < 0 || inside >= share.columns()) return;
    if (bits_from(column) & 1) {
      each_entry([&](int entry, float s, float t) {
        if (entry == column) share.store(column, of(s, t) - less);
      });
    } else if (share.is_mine(column)) {
      share.store(column, of.missing(share.student_at(column)) - less);
    }
  }
};

// One row per block or cluster, which keeps the student's logits; or per block, which reads them again for the
// gradient.
template <template <class> class Divergence, class T, bool kHeld>
__global__ void __launch_bounds__(kMaxRowThreads, 2) rows_of_topk(const __grid_constant__ DivergenceArgs args) {
  using Terms = Divergence<ColumnMath>;
  const int cluster = kHeld ? 1 << args.log_cluster : 1, rank = cluster > 1 ? cluster_rank() : 0;
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
  const RowFactors factors = factors_of(args, row);
  const TopkColumns<T, kHeld> columns(args, row, rank, factors.k);
  if constexpr (kHeld) copies_arrived();
  RowState<float> state;
  if (args.given) {
    state = state_at(args.given, row);
  } else {
    state = columns.template first_look<Terms>(factors.k, labels, args.smoothing > 0.f);
    state = row_merge<Terms>(warp_merge<Terms>(state, factors.k, labels), factors.k, exchange, cluster, labels);
  }
  if (thread == 0) write_results<Divergence>(args, row, factors, state);
  if (args.gradient) write_gradient<Divergence>(args, columns, factors, state);
}

}  // namespace kdfast::cuda

// Rows whose teacher is known in some columns: -inf in all others, and not stored there.
//
// Student logits are read once per look and the gradient is written once; of the teacher k log-probabilities and
// indices are read per look. A bit per column in shared memory tells which ones the teacher has: threads take the other
// columns as they come, and share the teacher's among themselves.
#pragma once
#include "cuda/divergence_large.cuh"

namespace kdfast::cuda {

struct TopkColumns {
  AnyColumns any;
  const int64_t* indices;
  uint32_t* bits;
  float temperature;
  bool wrong = false;  // a column comes twice, or is none of the vocabulary: nothing else can tell of it without a wait

  KDFAST_DEVICE TopkColumns(const DivergenceArgs& args, int64_t row, float k)
      : any(args, row, k),
        indices(args.indices.data + offset(args.indices.offsets, row)),
        bits((uint32_t*)(shared_memory() + exchange_bytes(blockDim.x))),
        temperature(float(kLog2e) / k) {
    const int words = int((args.columns + 31) / 32);
    for (int i = threadIdx.x; i <= words; i += blockDim.x) bits[i] = 0;
    __syncthreads();  // no bit is set
    for (int e = threadIdx.x; e < args.indices.count; e += blockDim.x) {
      const int64_t index = indices[e * args.indices.stride];
      const bool none = any.teacher_at(e) == -INFINITY, foreign = index < 0 || index >= args.indices.vocabulary;
      const int column = none ? -1 : here(index);
      const bool again = column >= 0 && shared_or(bits + column / 32, 1u << column % 32);
      if (again || (foreign && !none)) shared_or(bits + words, 1u);
    }
    __syncthreads();  // all are
    wrong = bits[words] != 0;
  }
  // The column of these logits, or -1.
  KDFAST_DEVICE int here(int64_t index) const {
    const int64_t column = index - any.args.indices.vocab_start;
    return column >= 0 && column < any.args.columns ? int(column) : -1;
  }
  KDFAST_DEVICE bool has(int64_t column) const { return bits[column / 32] >> column % 32 & 1; }

  // f(column, student's logit, teacher's) of those of the teacher's columns that are this thread's.
  template <class F>
  KDFAST_DEVICE void each_entry(F f) const {
    const TopkIndices& all = any.args.indices;
    for (int e = threadIdx.x; e < all.count; e += blockDim.x) {
      const float log_probability = any.teacher_at(e);
      const int column = log_probability == -INFINITY ? -1 : here(indices[e * all.stride]);
      if (column < 0) continue;
      const float t = temperature * counted_log_probability(log_probability);
      f(column, any.student_at(column), wrong ? NAN : t);
    }
  }
  template <class F>
  KDFAST_DEVICE void look(F f) const {
    any.each_student([&](int64_t column, float s, bool exists) {
      const bool counts = exists && !has(column);
      f(Logits<1>{{counts ? s : -INFINITY}, {-INFINITY}}, int(counts));
    });
    each_entry([&](int, float s, float t) { f(Logits<1>{{s}, {t}}, 1); });
  }
  template <class Gradient>
  KDFAST_DEVICE void write(Gradient of) const {
    any.each_student([&](int64_t column, float s, bool exists) {
      if (exists) any.store(column, of(s, -INFINITY));
    });
    __syncthreads();  // the teacher's columns are written too, as if they were none
    each_entry([&](int column, float s, float t) { any.store(column, of(s, t)); });
  }
  template <class Gradient>
  KDFAST_DEVICE void write_label(int column, Gradient of, float less) const {
    if (has(column)) {
      each_entry([&](int entry, float s, float t) {
        if (entry == column) any.store(column, of(s, t) - less);
      });
    } else if (column % int(blockDim.x) == int(threadIdx.x)) {
      any.store(column, of(any.student_at(column), -INFINITY) - less);
    }
  }
};

}  // namespace kdfast::cuda

// What the kernels of the divergences share: of a row its factors and results, of a column what it adds to the row and
// its gradient.
#pragma once
#include "cuda/cluster.cuh"
#include "cuda/divergence.h"
#include "cuda/vector.cuh"

namespace kdfast::cuda {

// The numbers of common/divergence_terms.h: of columns, and of rows, where accuracy costs nothing.
struct ColumnMath {
  using V = float;
  using Real = float;
  KDFAST_DEVICE static float exp2(float x) { return exp2_fast(x); }
  KDFAST_DEVICE static float log2(float x) { return log2_fast(x); }
  KDFAST_DEVICE static float reciprocal(float x) { return reciprocal_fast(x); }
};
struct RowMath {
  using V = float;
  using Real = float;
  KDFAST_HD_MEMBER static float exp2(float x) { return exp2_of(x); }
  KDFAST_HD_MEMBER static float log2(float x) { return log2_of(x); }
};

// Logits that a thread holds. Columns that do not exist are -inf on both sides: they count nothing.
template <int n>
struct Logits {
  static constexpr int count = n;
  float s[n], t[n];
};

// ---- columns ----
KDFAST_DEVICE float difference(float s, float t, float k) { return s == t ? 0.f : k * (s - t); }

// A column's part in the sums of the first look. A power of 0 counts nothing, whatever the other side holds.
template <class Terms>
KDFAST_DEVICE void count(RowState<float>& row, float s, float t, float k) {
  if constexpr (Terms::kDifference) {
    const float d = difference(s, t, k);
    row.moment_t = fmaf(d, d, row.moment_t);
  } else {
    const float x = s - row.max_s, y = t - row.max_t, es = exp2_fast(x * k), et = exp2_fast(y * k);
    row.sum_s += es;
    row.sum_t += et;
    if constexpr (Terms::kOfTeacher) row.moment_t = fmaf(et, et > 0.f ? Terms::of_teacher(x, y) : 0.f, row.moment_t);
    if constexpr (Terms::kOfStudent) row.moment_s = fmaf(es, es > 0.f ? Terms::of_student(x, y) : 0.f, row.moment_s);
  }
}
// The same for the cross-entropy of a label.
KDFAST_DEVICE void count_at_one(RowState<float>& row, float s, bool in_total) {
  row.sum_one += exp2_fast((s - row.max_s) * float(kLog2e));
  row.total += in_total ? s : 0.f;
}

// The terms of a column once the row's sums are known, times a factor of the row: u and the like are made of the
// probabilities like a sum, so that what scales these scales them, and the factor goes into the normalisers. They stay
// factors: in the exponents they would cost accuracy at large logits.
template <class Terms>
struct Normalised {
  float k, max_s, max_t, n_s, n_t, shift;

  KDFAST_DEVICE Normalised(const RowState<float>& row, float k, float factor)
      : k(k),
        max_s(row.max_s),
        max_t(Terms::kTopk ? 0.f : row.max_t),
        n_s(factor / row.sum_s),
        n_t(factor / row.sum_t),
        shift(Terms::kLogRatio ? log2_of(row.sum_t / row.sum_s) : 0.f) {}
  // f(p_s, p_t, d, es) of a column.
  template <class F>
  KDFAST_DEVICE auto operator()(float s, float t, F f) const {
    const float x = s - max_s, y = t - max_t, es = exp2_fast(x * k), et = exp2_fast(y * k);
    return f(n_s * es, n_t * et, Terms::kLogRatio ? terms::bounded(fmaf(k, x - y, shift)) : 0.f, es);
  }
};

// A thread's two sums of a second look.
template <template <class> class Divergence>
struct SecondSums {
  using Terms = Divergence<ColumnMath>;
  Settings<float> with;
  float loss = 0.f, mean_u = 0.f;

  KDFAST_DEVICE void count(const Normalised<Terms>& to, float s, float t) {
    to(s, t, [&](float p_s, float p_t, float d, float) {
      loss += Terms::value(p_s, p_t, d, with);
      mean_u += Terms::u(p_s, p_t, d, with);
    });
  }
};

// The gradient of a column from its logits.
template <template <class> class Divergence>
struct Gradient {
  using Terms = Divergence<ColumnMath>;
  Normalised<Terms> to;
  Settings<float> with;
  float factor, mean_term;
  float max_rest = 0.f;  // of columns that a top-k's teacher does not have

  KDFAST_DEVICE Gradient(const RowState<float>& row, float k, float factor, const Settings<float>& with)
      : to(row, k, factor), with(with), factor(factor), mean_term(to.n_s * Divergence<RowMath>::mean_u(row, k, with)) {
    if constexpr (Terms::kOfRow) this->with.kept = Divergence<RowMath>::kept(row);
    if constexpr (Terms::kRest) {
      max_rest = row.max_t;
      this->with.rest = factor * Divergence<RowMath>::rest(row, k);
    } else if constexpr (Terms::kTopk) {  // NaN where no column is another
      max_rest = row.max_s;
      this->with.rest = Terms::u(0.f, to.n_t * 0.f, 0.f, this->with) - mean_term;
    }
  }
  KDFAST_DEVICE float operator()(float s, float t) const {
    if constexpr (Terms::kDifference) return factor * Terms::u(0.f, 0.f, difference(s, t, to.k), with);
    return to(s, t,
              [&](float p_s, float p_t, float d, float es) { return Terms::u(p_s, p_t, d, with) - mean_term * es; });
  }
  // The same where the teacher's logit is -inf: without its power.
  KDFAST_DEVICE float missing(float s) const { return with.rest * exp2_fast((s - max_rest) * to.k); }
};

// The same with that of the cross-entropy, but for the label's own column.
template <template <class> class Divergence>
struct GradientBesideLabel {
  Gradient<Divergence> of;
  float n_one, even;

  KDFAST_DEVICE float operator()(float s, float t) const { return of(s, t) + hard(s); }
  KDFAST_DEVICE float missing(float s) const { return of.missing(s) + hard(s); }
  KDFAST_DEVICE float hard(float s) const { return fmaf(n_one, exp2_fast((s - of.to.max_s) * float(kLog2e)), -even); }
};

// ---- rows ----
// Inlined, the 64-bit divisions of every row input would be most of a kernel.
KDFAST_DEVICE_CALL int64_t far_offset(const RowOffsets& of, int64_t row) { return of(row); }
// One stride tells of rows that are contiguous or expanded.
KDFAST_DEVICE int64_t offset(const RowOffsets& of, int64_t row) {
  return of.dims > 1 ? far_offset(of, row) : of.dims ? row * of.stride[0] : 0;
}

struct RowFactors {
  float k;                     // log2(e) / temperature, of row_state.h
  float divergence, gradient;  // of the divergence in its component, and of its gradient
  float cross_entropy, hard;   // the same of the cross-entropy
  int label;                   // its column; -1 where it is none of these
};

KDFAST_DEVICE bool is_counted(const DivergenceArgs& args, int64_t row) {
  return !args.mask.data || args.mask.data[offset(args.mask.offsets, row)];
}

// A label that is neither ignored nor of the vocabulary makes its row NaN: nothing else can tell of it without a wait.
KDFAST_DEVICE void take_label(const DivergenceArgs& args, int64_t row, RowFactors& factors) {
  const int64_t label = args.labels.data[offset(args.labels.offsets, row)], column = label - args.labels.vocab_start;
  if (label == args.labels.ignored) {
    factors.cross_entropy = factors.hard = 0.f;
  } else if (label < 0 || label >= args.labels.vocabulary) {
    factors.cross_entropy = factors.hard = NAN;
  } else if (column >= 0 && column < args.columns) {
    factors.label = int(column);
  }
}

KDFAST_DEVICE RowFactors factors_of(const DivergenceArgs& args, int64_t row) {
  auto value = [&](const RowNumbers& x, float missing) { return x.data ? x.data[offset(x.offsets, row)] : missing; };
  auto divided = [](float x, const float* by) { return !by ? x : *by > 0.f ? x / *by : 0.f; };
  const float temperature = value(args.row_temperature, args.temperature);
  const float common = value(args.weight, 1.f) * value(args.upstream, 1.f) * args.scale;
  const float squared = args.distillation ? temperature * temperature : 1.f;
  RowFactors factors = {float(kLog2e) / temperature, 0.f, 0.f, 0.f, 0.f, -1};
  factors.divergence = divided(common * squared, args.divergence_divisor);
  factors.gradient = args.divergence_share * factors.divergence / temperature;
  if (args.labels.data) {
    factors.cross_entropy = divided(common, args.cross_entropy_divisor);
    factors.hard = args.cross_entropy_share * factors.cross_entropy;
    take_label(args, row, factors);
  }
  return factors;
}

KDFAST_DEVICE RowState<float> state_at(const float* states, int64_t row) {
  const float* at = states + row * kRowStateSize;
  return {at[0], at[1], at[2], at[3], at[4], at[5], at[6], at[7], at[8]};
}

KDFAST_DEVICE float student_logit(const DivergenceArgs& args, int64_t row, int column) {
  return load_any(args.student_type, args.student, offset(args.student_rows, row) + column * args.student_stride);
}

// The maximum is taken out of every term first: all of them are differences then, exact also where logits are large.
KDFAST_DEVICE float cross_entropy_of(const DivergenceArgs& args, const RowState<float>& state) {
  float to_label = state.max_s - state.label;
  if (args.smoothing > 0.f) {
    const float to_all = state.max_s - state.total * args.settings.per_vocabulary;
    to_label = (1.f - args.smoothing) * to_label + args.smoothing * to_all;
  }
  return logf(state.sum_one) + to_label;
}

KDFAST_DEVICE void write_state(float* states, int64_t row, const RowState<float>& state) {
  float* at = states + row * kRowStateSize;
  at[0] = state.max_s, at[1] = state.sum_s;
  at[2] = state.max_t, at[3] = state.sum_t;
  at[4] = state.moment_t, at[5] = state.moment_s;
  at[6] = state.sum_one, at[7] = state.total, at[8] = state.label;
}
KDFAST_DEVICE void write_losses(const DivergenceArgs& args, int64_t row, float divergence, float cross_entropy) {
  if (args.components) {
    args.components[2 * row] = divergence;
    args.components[2 * row + 1] = cross_entropy;
  }
  if (!args.losses) return;
  const float soft = args.divergence_share * divergence;
  args.losses[row] = args.labels.data ? soft + args.cross_entropy_share * cross_entropy : soft;
}

// One thread of a row.
template <template <class> class Divergence>
KDFAST_DEVICE void write_results(const DivergenceArgs& args, int64_t row, const RowFactors& factors,
                                 RowState<float> state) {
  float cross_entropy = 0.f;
  if (args.labels.data) {
    if (!args.given) state.label = factors.label < 0 ? 0.f : student_logit(args, row, factors.label);
    if (factors.cross_entropy != 0.f) cross_entropy = factors.cross_entropy * cross_entropy_of(args, state);
  }
  if (args.states) write_state(args.states, row, state);
  if (!args.losses) return;
  write_losses(args, row, factors.divergence * Divergence<RowMath>::loss(state, factors.k, args.settings),
               cross_entropy);
}
KDFAST_DEVICE void write_masked(const DivergenceArgs& args, int64_t row) {
  if (args.states) write_state(args.states, row, {});
  write_losses(args, row, 0.f, 0.f);
}

// `Columns` write those of a thread (divergence_large.cuh, divergence_small.cuh).
template <template <class> class Divergence, class Columns>
KDFAST_DEVICE void write_gradient(const DivergenceArgs& args, const Columns& columns, const RowFactors& factors,
                                  const RowState<float>& state) {
  const Gradient<Divergence> of(state, factors.k, factors.gradient, args.settings);
  if (!args.labels.data) return columns.write(of);
  const float n_one = factors.hard == 0.f ? 0.f : factors.hard / state.sum_one;
  const GradientBesideLabel<Divergence> both{of, n_one, factors.hard * args.even_smoothing};
  columns.write(both);
  if (factors.label >= 0) columns.write_label(factors.label, both, factors.hard * (1.f - args.smoothing));
}

// Where the gradient of a row starts: rows of gradient_columns elements.
KDFAST_DEVICE char* gradient_of(const DivergenceArgs& args, int64_t row) {
  return args.gradient ? (char*)args.gradient + row * args.gradient_columns * size_of(args.gradient_type) : nullptr;
}

// The columns of a row's gradient from `from` on: padding, or all of a masked row. Shared among the row's threads.
KDFAST_DEVICE void clear_gradient(const DivergenceArgs& args, int64_t row, int64_t from, int thread, int threads) {
  if (!args.gradient || from >= args.gradient_columns) return;
  const int units = size_of(args.gradient_type) / 2;
  clear((uint16_t*)gradient_of(args, row) + from * units, (args.gradient_columns - from) * units, thread, threads);
}

}  // namespace kdfast::cuda

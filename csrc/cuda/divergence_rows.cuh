// What the kernels of the divergences share: a row's factors and results, and the terms of each divergence.
#pragma once
#include "common/rowmath.h"
#include "cuda/divergence.h"
#include "cuda/vector.cuh"

namespace kdfast::cuda {

// KL(teacher || student). A divergence is what a column adds to the row's state, the loss of a state, and the gradient
// of a column; the kernels know nothing else of it.
struct KlDiv {
  // x and y: logits less their maxima. A teacher's 0 counts nothing, whatever the student holds.
  KDFAST_DEVICE static void count(RowState<float>& row, float x, float y, float k) {
    const float es = exp2_fast(x * k), et = exp2_fast(y * k);
    row.sum_s += es;
    row.sum_t += et;
    row.dot = fmaf(et, et > 0.f ? y - x : 0.f, row.dot);
  }
  KDFAST_DEVICE static float loss(const RowState<float>& row, float k) { return kl_of(row, k); }

  // The normalisers stay factors: in the exponents they would cost accuracy at large logits.
  struct Gradient {
    float factor_s, factor_t;
    KDFAST_DEVICE Gradient(const RowState<float>& row, float factor)
        : factor_s(factor / row.sum_s), factor_t(factor / row.sum_t) {}
    KDFAST_DEVICE float operator()(float x, float y, float k) const {
      return fmaf(factor_s, exp2_fast(x * k), -factor_t * exp2_fast(y * k));
    }
  };
};

// Logits that a thread holds. Columns that do not exist are -inf on both sides and count nothing.
template <int n>
struct Logits {
  static constexpr int count = n;
  float s[n], t[n];
};

struct RowFactors {
  float k;            // log2(e) / temperature, of rowmath.h
  float coefficient;  // of the row's divergence in the result
  float gradient;     // coefficient / temperature
};

KDFAST_DEVICE bool is_counted(const DivergenceArgs& args, int64_t row) {
  return !args.mask.data || args.mask.data[args.mask.offsets(row)];
}

KDFAST_DEVICE RowFactors factors_of(const DivergenceArgs& args, int64_t row) {
  auto value = [&](const RowNumbers& x, float missing) { return x.data ? x.data[x.offsets(row)] : missing; };
  const float temperature = value(args.row_temperature, args.temperature);
  float coefficient = args.factor * value(args.weight, 1.f) * value(args.upstream, 1.f);
  // A denominator of 0 counts nothing.
  if (args.denominator) coefficient = *args.denominator > 0.f ? coefficient / *args.denominator : 0.f;
  return {float(kLog2e) / temperature, coefficient, coefficient / temperature};
}

KDFAST_DEVICE RowState<float> given_state(const DivergenceArgs& args, int64_t row) {
  const float* at = args.given + row * kRowStateSize;
  return {at[0], at[1], at[2], at[3], at[4]};
}

// One thread of a row.
KDFAST_DEVICE void write_results(const DivergenceArgs& args, int64_t row, float loss, const RowState<float>& state) {
  if (args.losses) args.losses[row] = loss;
  if (!args.states) return;
  float* at = args.states + row * kRowStateSize;
  at[0] = state.max_s;
  at[1] = state.sum_s;
  at[2] = state.max_t;
  at[3] = state.sum_t;
  at[4] = state.dot;
}

KDFAST_DEVICE void write_masked(const DivergenceArgs& args, int64_t row) {
  write_results(args, row, 0.f, {0.f, 0.f, 0.f, 0.f, 0.f});
}

// Where the gradient of a row starts, in bytes: rows of gradient_columns elements of the student's dtype.
KDFAST_DEVICE char* gradient_of(const DivergenceArgs& args, int64_t row, int element_size) {
  return args.gradient ? (char*)args.gradient + row * args.gradient_columns * element_size : nullptr;
}

// Of a row's gradient the columns from `from` on: padding, or all of a masked row. Shared among the row's threads.
KDFAST_DEVICE void clear_gradient(const DivergenceArgs& args, int64_t row, int element_size, int64_t from, int thread,
                                  int threads) {
  if (!args.gradient || from >= args.gradient_columns) return;
  const int units = element_size / 2;
  clear((uint16_t*)gradient_of(args, row, element_size) + from * units, (args.gradient_columns - from) * units, thread,
        threads);
}

}  // namespace kdfast::cuda

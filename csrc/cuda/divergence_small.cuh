// Classification heads: several rows per block, each held in the registers of a group of lanes; loss and gradient in
// one launch, no shared memory, no barrier.
#pragma once
#include "cuda/cluster.cuh"
#include "cuda/divergence_rows.cuh"

namespace kdfast::cuda {

// How `lanes` neighbours share a row of at most lanes * held columns: in 16-byte vectors where every row is aligned,
// else column by column.
template <class T, int lanes, int held, bool vectors>
struct InLanes {
  static constexpr int kWidth = vectors ? Vector<T>::count : 1, kSteps = held / kWidth;
  const T *student, *teacher;
  char* gradient;
  Element gradient_type;
  int lane, columns;
  Logits<held> z;

  KDFAST_DEVICE InLanes(const DivergenceArgs& args, int64_t row, bool counted)
      : student((const T*)args.student + offset(args.student_rows, row)),
        teacher((const T*)args.teacher + offset(args.teacher_rows, row)),
        gradient(gradient_of(args, row)),
        gradient_type(args.gradient_type),
        lane(threadIdx.x % lanes),
        columns(int(args.columns)) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int at = column(step), first = step * kWidth;
      const bool exists = counted && at < columns;
      if constexpr (vectors) {
        Vector<T>::widen(exists ? load16(student + at) : Vector<T>::lowest(), z.s + first);
        Vector<T>::widen(exists ? load16(teacher + at) : Vector<T>::lowest(), z.t + first);
      } else {
        z.s[first] = exists ? Vector<T>::widen_one(student[at]) : -INFINITY;
        z.t[first] = exists ? Vector<T>::widen_one(teacher[at]) : -INFINITY;
      }
    }
  }
  // First column of the lane's step-th vector (or its only one).
  KDFAST_DEVICE int column(int step) const { return (step * lanes + lane) * kWidth; }

  template <class Terms>
  KDFAST_DEVICE RowState<float> first_look(float k, bool labels, bool smooth) const {
    float top_s = z.s[0], top_t = z.t[0];
#pragma unroll
    for (int e = 1; e < held; ++e) top_s = fmaxf(top_s, z.s[e]), top_t = fmaxf(top_t, z.t[e]);
    RowState<float> state = no_columns<float>();
    state.max_s = fmaxf(kNoMaximum, warp_max<lanes>(top_s));
    state.max_t = fmaxf(kNoMaximum, warp_max<lanes>(top_t));
#pragma unroll
    for (int e = 0; e < held; ++e) count<Terms>(state, z.s[e], z.t[e], k);
    if (labels) {
#pragma unroll
      for (int e = 0; e < held; ++e) count_at_one(state, z.s[e], smooth && column(e / kWidth) < columns);
    }
    warp_sums<Terms, lanes>(state, labels);
    return state;
  }
  template <template <class> class Divergence>
  KDFAST_DEVICE void look_again(const Settings<float>& with, float k, RowState<float>& state) const {
    const Normalised<Divergence<ColumnMath>> to(state, k, 1.f);
    SecondSums<Divergence> sums{with};
#pragma unroll
    for (int e = 0; e < held; ++e) sums.count(to, z.s[e], z.t[e]);
    state.moment_t = warp_sum<lanes>(sums.loss);
    state.moment_s = warp_sum<lanes>(sums.mean_u);
  }

  template <class Gradient>
  KDFAST_DEVICE void write(Gradient of) const {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int at = column(step), first = step * kWidth;
      if (at >= columns) continue;
      if constexpr (vectors) {
        float g[kWidth];
#pragma unroll
        for (int e = 0; e < kWidth; ++e) g[e] = of(z.s[first + e], z.t[first + e]);
        store_vector<T>(gradient_type, gradient, at, g);
      } else {
        store_one<T>(gradient_type, gradient, at, of(z.s[first], z.t[first]));
      }
    }
  }
  // The label's column again, `less` lower, by the lane that has written it.
  template <class Gradient>
  KDFAST_DEVICE void write_label(int column, Gradient of, float less) const {
    if (column / kWidth % lanes != lane) return;
    const float s = Vector<T>::widen_one(student[column]), t = Vector<T>::widen_one(teacher[column]);
    store_one<T>(gradient_type, gradient, column, of(s, t) - less);
  }
};

template <template <class> class Divergence, class T, int lanes, int held, bool vectors>
__global__ void __launch_bounds__(kRegisterThreads) rows_in_registers(const __grid_constant__ DivergenceArgs args) {
  using Terms = Divergence<ColumnMath>;
  const int64_t place = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / lanes;
  const bool exists = place < args.rows, labels = args.labels.data;
  // Lanes beyond the last row stay for the shuffles and write nothing.
  const int64_t row = exists ? place : args.rows - 1;
  const bool counted = exists && is_counted(args, row);
  const InLanes<T, lanes, held, vectors> in(args, row, counted);
  const RowFactors factors = factors_of(args, row);
  RowState<float> state =
      args.given ? state_at(args.given, row) : in.template first_look<Terms>(factors.k, labels, args.smoothing > 0.f);
  if constexpr (Terms::kSecondLook) {
    if (args.known != Known::everything) in.template look_again<Divergence>(args.settings, factors.k, state);
  }
  if (!exists) return;
  clear_gradient(args, row, counted ? args.columns : 0, in.lane, lanes);
  if (!counted) {
    if (in.lane == 0) write_masked(args, row);
    return;
  }
  if (in.lane == 0) write_results<Divergence>(args, row, factors, state);
  if (args.gradient) write_gradient<Divergence>(args, in, factors, state);
}

}  // namespace kdfast::cuda

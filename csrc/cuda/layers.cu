// Distances between the rows of layers, all layers in one launch.
//
// Least traffic: 3 x elements x size with the gradient (both sides read once, the gradient written once), 2 x without.
// A group of 8, 16 or 32 lanes has a row, as few as can keep it in registers between the looks (512 numbers of float32,
// 1024 of 16 bits); longer rows are looked at again in L1 or L2. Squared distances take one look, which writes the
// gradient too, those of vectors two, kl three. No more blocks are launched than the multiprocessors hold: each goes
// through the rows with the grid's stride. Masks, floors and gradients are templates: elements meet no branch.
// docs/kernels.md has the numbers of instructions.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cuda/divergence_rows.cuh"
#include "cuda/launch.cuh"
#include "cuda/layer_row.cuh"

namespace kdfast::cuda {
namespace {

// 128 registers per thread: with five blocks they would spill.
constexpr int kThreads = 128, kBlocksPerMultiprocessor = 4;

// ---- distances of a row: the value, and where it is wanted the gradient times factor ----
// The value is right in the first lane of each group. `kHidden` stands on both sides where columns do not count.

template <bool kFloor>
struct SquaredOf {
  static constexpr bool kMaskable = true;
  static constexpr float kHidden = 0.f;

  template <bool kGradient, class Row>
  KDFAST_DEVICE static float run(Row& row, const LayerArgs& args, float factor) {
    const float twice = 2 * factor, floor = args.floor;
    float sum[1] = {0.f};
    row.template look<kGradient>([&](float s, float t) {
      const float from = kFloor && s <= floor ? 0.f : s, to = kFloor && t <= floor ? 0.f : t;
      const float d = from == to ? 0.f : from - to;  // inf - inf would be NaN
      sum[0] = fmaf(d, d, sum[0]);
      return kFloor && s <= floor ? 0.f : twice * d;
    });
    group_sums(sum, row.lanes);
    return sum[0];
  }
};

// Both distances of vectors, which differ in what one lane does.
struct VectorsOf {
  static constexpr bool kMaskable = false;
  static constexpr float kHidden = 0.f;

  template <bool kGradient, class Row>
  KDFAST_DEVICE static float run(Row& row, const LayerArgs& args, float factor) {
    float sums[5] = {};
    row.template look<false>([&](float s, float t) {
      const float d = t - s;
      sums[0] = fmaf(s, s, sums[0]);
      sums[1] = fmaf(t, t, sums[1]);
      sums[2] = fmaf(s, t, sums[2]);
      sums[3] = fmaf(s, d, sums[3]);
      sums[4] = fmaf(d, d, sums[4]);
      return 0.f;
    });
    group_sums(sums, row.lanes);
    // float64 is slow on most devices: one lane is enough.
    float value = 0.f, of_student = 0.f, of_difference = 0.f, of_teacher = 0.f;
    if (row.lane == 0) {
      const VectorSums all{sums[0], sums[1], sums[2], sums[3], sums[4]};
      const bool normalized = args.kind == Distance::normalized;
      const DistanceResult result = normalized ? NormalizedDistance::of(all) : CosineDistance::of(all);
      value = float(result.value);
      of_student = float(factor * result.of_student);
      (result.near ? of_difference : of_teacher) = float(factor * result.of_other);
    }
    if constexpr (kGradient) {
      of_student = group_first(of_student, row.lanes);
      of_difference = group_first(of_difference, row.lanes);
      of_teacher = group_first(of_teacher, row.lanes);
      row.template look<true>(
          [&](float s, float t) { return of_student * s + of_difference * (s - t) + of_teacher * t; });
    }
    return value;
  }
};

struct KlOf {
  static constexpr bool kMaskable = true;
  static constexpr float kHidden = -INFINITY;

  template <bool kGradient, class Row>
  KDFAST_DEVICE static float run(Row& row, const LayerArgs&, float factor) {
    using Terms = KlDiv<ColumnMath>;
    const float k = float(kLog2e);
    float top_s = kNoMaximum, top_t = kNoMaximum;
    row.template look<false>([&](float s, float t) {
      top_s = fmaxf(top_s, s);
      top_t = fmaxf(top_t, t);
      return 0.f;
    });
    RowState<float> state = no_columns<float>();
    state.max_s = group_max(top_s, row.lanes);
    state.max_t = group_max(top_t, row.lanes);
    row.template look<false>([&](float s, float t) {
      count<Terms>(state, s, t, k);
      return 0.f;
    });
    float sums[3] = {state.sum_s, state.sum_t, state.moment_t};
    group_sums(sums, row.lanes);
    state.sum_s = sums[0], state.sum_t = sums[1], state.moment_t = sums[2];
    if constexpr (kGradient) {
      const Gradient<KlDiv> of(state, k, factor, {});
      row.template look<true>([&](float s, float t) { return of(s, t); });
    }
    return KlDiv<RowMath>::loss(state, k, {});
  }
};

// ---- kernels ----
template <class Of, class Sides, bool kMasked, bool kGradient>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    layer_rows(const __grid_constant__ LayerArgs args) {
  const int lanes = 1 << args.log_lanes, lane = threadIdx.x & (lanes - 1);
  const float scale = !args.divisor ? 1.f : *args.divisor > 0.f ? 1.f / *args.divisor : 0.f;
  const float upstream = args.upstream && !args.per_row ? *args.upstream : 1.f;
  const uint32_t own = (blockIdx.x * kThreads + threadIdx.x) >> args.log_lanes,
                 step = gridDim.x * kThreads >> args.log_lanes;
  const uint32_t of_warp = own & ~((32u >> args.log_lanes) - 1u);
  double sum = 0;
  // Lanes of a last warp that have no row stay for the shuffles.
  for (uint32_t begin = 0; begin + of_warp < args.all_rows; begin += step) {
    const uint32_t index = min(begin + own, args.all_rows - 1);
    const bool exists = index == begin + own;
    const RowPlace at(args, index);
    const float weight = scale * at.weight;
    const float factor = weight * (args.upstream && args.per_row ? args.upstream[index] : upstream);
    LayerRow<Sides, kMasked> row(args, at, exists && at.counted, lane, Of::kHidden);
    const float distance = Of::template run<kGradient>(row, args, factor);
    if (!exists) continue;
    if (kGradient && !at.counted) {
      const int size = size_of(args.student_type);
      clear((uint16_t*)((char*)at.pair.gradient + at.gradient_offset * size), args.columns * size / 2, lane, lanes);
    }
    if (lane != 0) continue;
    const float value = at.counted ? weight * distance : 0.f;
    if (args.per_row) {
      args.values[index] = value;
    } else {
      sum += value;
    }
  }
  if (args.per_row) return;
  sum = block_sum(sum, (double*)shared_memory());
  if (threadIdx.x == 0) args.values[blockIdx.x] = float(sum);
}

using Kernel = void (*)(const LayerArgs);

// What a call is compiled for.
struct Form {
  Distance kind;
  bool floor, same;  // `same`: one type on both sides, neighbouring columns
  Element type;
  bool masked, gradient;
};

template <class Of, class Sides>
Kernel kernel_of(bool masked, bool gradient) {
  if constexpr (Of::kMaskable) {
    if (masked) return gradient ? layer_rows<Of, Sides, true, true> : layer_rows<Of, Sides, true, false>;
  }
  // Of any types there is one that finds out whether there is a mask: fewer kernels, of what is rare.
  constexpr bool kMasked = Of::kMaskable && std::is_same_v<Sides, AnyTypes>;
  return gradient ? layer_rows<Of, Sides, kMasked, true> : layer_rows<Of, Sides, kMasked, false>;
}
template <class Of>
Kernel kernel_of(const Form& form) {
  if (form.type == Element::f32) return kernel_of<Of, OneType<float>>(form.masked, form.gradient);
  if (form.type == Element::bf16) return kernel_of<Of, OneType<BFloat16>>(form.masked, form.gradient);
  return kernel_of<Of, OneType<Float16>>(form.masked, form.gradient);
}
template <class Of, class OfAny = Of>
Kernel kernel_in(const Form& form) {
  return form.same ? kernel_of<Of>(form) : kernel_of<OfAny, AnyTypes>(form.masked, form.gradient);
}

Kernel kernel_for(const Form& form) {
  if (form.kind == Distance::kl) return kernel_in<KlOf>(form);
  if (form.kind != Distance::squared) return kernel_in<VectorsOf>(form);
  // A floor of NaN is none.
  return form.floor ? kernel_in<SquaredOf<true>>(form) : kernel_in<SquaredOf<false>, SquaredOf<true>>(form);
}

Form form_of(const LayerArgs& args) {
  bool same = args.student_type == args.teacher_type;
  for (int i = 0; i < args.layers; ++i) {
    same = same && args.layer[i].student.column == 1 && args.layer[i].teacher.column == 1;
  }
  const bool gradient = args.layer[0].gradient != nullptr;
  return {args.kind, !std::isnan(args.floor), same, args.student_type, args.column_mask != nullptr, gradient};
}

// As few lanes as hold a row: short rows leave none without work, and a warp has several of them in flight.
int log_lanes_of(const LayerArgs& args) {
  const bool wide = args.student_type == Element::f32 && args.teacher_type == Element::f32;
  const int64_t held = wide ? OneType<float>::kHeld * OneType<float>::kWidth : 2 * AnyTypes::kWidth;
  const int64_t lanes = (args.columns + held - 1) / held;
  return lanes <= 8 ? 3 : lanes <= 16 ? 4 : 5;
}

int64_t rows_of(const LayerArgs& args) { return int64_t(args.layers) * args.batch * args.heads * args.rows; }

int64_t blocks_of(const LayerArgs& args, int multiprocessors) {
  const int64_t each = kThreads >> log_lanes_of(args);
  const int64_t most = int64_t(multiprocessors) * kBlocksPerMultiprocessor;
  return std::clamp<int64_t>((rows_of(args) + each - 1) / each, 1, most);
}

}  // namespace

int64_t layer_values(const LayerArgs& args, int multiprocessors) {
  return args.per_row ? rows_of(args) : blocks_of(args, multiprocessors);
}

int64_t launch_layers(const char* op, const Target& target, LayerArgs args, int multiprocessors) {
  args.by_rows = Divider(args.rows);
  args.by_heads = Divider(args.heads);
  args.by_batch = Divider(args.batch);
  args.all_rows = uint32_t(rows_of(args));
  args.rows_of_layer = uint32_t(args.batch * args.heads * args.rows);
  args.log_lanes = log_lanes_of(args);
  const Grid grid{blocks_of(args, multiprocessors), kThreads, kThreads * int64_t(sizeof(double))};
  launch(op, kernel_for(form_of(args)), target, grid, args);
  return layer_values(args, multiprocessors);
}

std::vector<NamedKernel> layer_kernels() {
  const char* const names[] = {"squared", "cosine", "normalized", "kl"};
  std::vector<NamedKernel> all;
  for (int kind = 0; kind < int(Distance::count); ++kind) {
    for (bool same : {true, false}) {
      const Form form{Distance(kind), kind == 0, same, Element::bf16, kind == 0 || kind == 3, true};
      const char* layout = same ? ", bfloat16" : ", any types";
      all.push_back({std::string("layer distance, ") + names[kind] + layout, (const void*)kernel_for(form)});
    }
  }
  return all;
}

}  // namespace kdfast::cuda

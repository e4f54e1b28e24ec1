// Rows of the divergences on the CPU: one source, compiled once per processor variant.
//
// Per row, 3 x columns x element size of traffic: student and teacher are read, the gradient is written. Every look
// takes a block of columns several times while it lies in L1, as floats, and leaves the block's float sums to a double
// state, so that rounding does not grow with the vocabulary. Where they are asked for again the powers of the first
// look are kept, relative to the block's maxima: half of the exponentials, which are what bounds these loops. The
// normalisers stay factors of the gradient: folded into the exponents they would cost accuracy at large logits and save
// nothing.
#include "cpu/divergence_rows.h"

#include "cpu/divergence_blocks.h"
#include "cpu/divergence_lanes.h"
#include "cpu/layer_rows.h"

namespace kdfast::KDFAST_VARIANT {

extern const LayerKernels kLayers;

namespace {

template <bool x>
struct Constant {
  static constexpr bool value = x;
};

// Up to this power of two the student's rest (csrc/common/row_state.h) may be less likely than other columns for its
// powers to be relative to the maximum of all: then they also serve the cross-entropy of labels.
constexpr int kWithinReach = 64;

template <class T, bool kTeacher, class Real>
void find_maxima(Block<Real>& block, Real k) {
  using V = Vector<Real>;
  const V none = broadcast(Real(-__builtin_inff()));
  V s[2] = {none, none}, t[2] = {none, none};
  for_vectors<Real>(block.n, [&](int64_t i, int count, int u) __attribute__((always_inline)) {
    const V z_s = load(block.s + i, count);
    s[u] = maximum(s[u], z_s);
    if constexpr (kTeacher) {
      const V z_t = load(block.t + i, count);
      t[u] = maximum(t[u], T::kRest ? (z_t == none ? z_s : none) : z_t);
    }
  });
  block.max_s = maximum(Real(kNoMaximum), top(maximum(s[0], s[1])));
  block.max_t = maximum(Real(kNoMaximum), top(maximum(t[0], t[1])));
  if (T::kRest && (!kTeacher || (block.max_s - block.max_t) * k <= kWithinReach)) block.max_t = block.max_s;
}

// Whether all of a block's powers are relative to one maximum.
template <class T, class Real>
bool of_one_maximum(const Block<Real>& block) {
  return !T::kDifference && (!T::kRest || block.max_t == block.max_s);
}

KDFAST_LOCAL double moved(double exponent) { return exponent == 0 ? 1 : ::exp2(exponent); }

// Logits less the maxima that their powers are relative to.
template <class T, class Real>
struct LessMaxima {
  using V = Vector<Real>;
  V x, y;
  KDFAST_HD_MEMBER LessMaxima(const Block<Real>& block, V z_s, V z_t)
      : x(z_s - block.max_s), y(T::kTopk ? z_t : z_t - block.max_t) {
    if constexpr (T::kRest) x = z_t == V{} - Real(__builtin_inff()) ? z_s - block.max_t : x;
  }
};

// The powers of a block and their sums, and the moments of divergences that make them in the first look. A power
// of 0 counts nothing, whatever the other side holds. A teacher without a column in the block is not looked at.
template <class T, bool kTeacher, class Real>
RowState<double> look_at_block(const Block<Real>& block, Real k, int bytes_s, int bytes_t) {
  using V = Vector<Real>;
  const V none = broadcast(Real(-__builtin_inff()));
  const Scale<Real> scale(broadcast(k));
  V s[2]{}, t[2]{}, a[2]{}, b[2]{};
  for_vectors<Real>(block.n, [&](int64_t i, int count, int u) __attribute__((always_inline)) {
    // The next block comes from memory while this one keeps the arithmetic busy.
    __builtin_prefetch(block.next_s + i * bytes_s);
    __builtin_prefetch(block.next_t + i * bytes_t);
    const V z_s = load(block.s + i, count), z_t = kTeacher ? load(block.t + i, count) : none;
    if constexpr (T::kDifference) {
      const V d = z_s == z_t ? V{} : k * (z_s - z_t);
      a[u] += d * d;
      return;
    }
    const LessMaxima<T, Real> less(block, z_s, z_t);
    const V es = scale.power(less.x), et = kTeacher ? scale.power(less.y) : V{};
    store(block.es + i, es);
    store(block.et + i, et);
    if constexpr (T::kRest) {
      s[u] += z_t == none ? V{} : es;
      b[u] += z_t == none ? es : V{};
    } else {
      s[u] += es;
    }
    t[u] += et;
    if constexpr (T::kOfTeacher) a[u] += et * (et > 0 ? T::of_teacher(less.x, less.y) : V{});
    if constexpr (T::kOfStudent) b[u] += es * (es > 0 ? T::of_student(less.x, less.y) : V{});
  });
  auto all = [](const V* v) { return sum(v[0] + v[1]); };
  RowState<double> state = {block.max_s, all(s), block.max_t, all(t), all(a), all(b), 0, 0, 0};
  if constexpr (T::kRest) state.sum_s += state.moment_s * moved((state.max_t - state.max_s) * k);
  return state;
}

// The powers alone, relative to the row's maxima.
template <class T, class Real>
void make_powers(const Block<Real>& block, Real k) {
  using V = Vector<Real>;
  const Scale<Real> scale(broadcast(k));
  for_vectors<Real>(block.n, [&](int64_t i, int count, int) __attribute__((always_inline)) {
    const V z_t = block.teacher ? load(block.t + i, count) : broadcast(Real(-__builtin_inff()));
    const LessMaxima<T, Real> less(block, load(block.s + i, count), z_t);
    store(block.es + i, scale.power(less.x));
    store(block.et + i, block.teacher ? scale.power(less.y) : V{});
  });
}

// What makes a block's powers probabilities, and logits less the block's maxima d of divergence_terms.h.
template <class T, class Real>
struct Normalised {
  Real n_s, n_t, k, shift;

  Normalised(const DivergenceRow& row, const Block<Real>& block) : k(Real(row.k)) {
    const RowState<double>& r = row.state;
    const double move_s = (block.max_s - r.max_s) * row.k, move_t = T::kTopk ? 0 : (block.max_t - r.max_t) * row.k;
    n_s = Real(moved(move_s) / r.sum_s);
    n_t = Real(moved(move_t) / r.sum_t);
    shift = Real(::log2(r.sum_t / r.sum_s) + move_s - move_t);
  }
  KDFAST_HD_MEMBER Vector<Real> log_ratio(const Block<Real>& block, int64_t i, int count) const {
    const Vector<Real> x = load(block.s + i, count) - block.max_s, y = load(block.t + i, count) - block.max_t;
    return terms::bounded(k * (x - y) + shift);
  }
};

template <class Real>
Settings<Vector<Real>> settings_of(const DivergenceShape& shape) {
  return {broadcast(Real(shape.settings.mixing)), broadcast(Real(shape.settings.per_vocabulary))};
}
template <template <class> class Terms, class Real>
Settings<Vector<Real>> settings_of(const DivergenceShape& shape, const DivergenceRow& row) {
  using T = Terms<Lanes<double>>;
  Settings<Vector<Real>> with = settings_of<Real>(shape);
  if constexpr (T::kOfRow) with.kept = broadcast(Real(T::kept(row.state)));
  if constexpr (T::kRest) with.rest = broadcast(Real(T::rest(row.state, row.k)));
  return with;
}

// Calls f(begin, columns) for the blocks of [begin, end).
template <class F>
KDFAST_LOCAL void for_blocks(int64_t begin, int64_t end, F f) {
  for (int64_t at = begin; at < end; at += kBlock) f(at, end - at < kBlock ? end - at : kBlock);
}

// Loss and gradient of a difference of logits in one look, which reads 16 bits where they lie.
template <class T>
void look_at_difference(const DivergenceShape& shape, DivergenceRow& row, int64_t begin, int64_t end) {
  auto at = [&](const void* from, int64_t stride, Element type) {
    return from ? (char*)from + begin * stride * size_of(type) : nullptr;
  };
  double value = 0;
  const LayerRun run{at(row.student, shape.student_stride, shape.student),
                     at(row.teacher, shape.teacher_stride, shape.teacher),
                     0,
                     0,
                     1,
                     row.counted ? row.counted + begin : nullptr,
                     at(row.gradient, 1, shape.gradient),
                     row.factor * row.k * T::u(0, 0, 1, shape.settings) / 2,
                     nullptr,
                     &value};
  const double floor = __builtin_nan("");  // none
  const LayerShape layer{shape.student, shape.teacher, end - begin, shape.student_stride, shape.teacher_stride, floor};
  kLayers.distance[int(Distance::squared)](layer, run);
  row.state = no_columns<double>();
  row.state.moment_t = row.k * row.k * value;
}

template <template <class> class Terms, class Real>
void look(const DivergenceShape& shape, DivergenceRow& row, int64_t begin, int64_t end) {
  using T = Terms<Lanes<Real>>;
  if constexpr (T::kDifference) {
    if (writes_at_once(shape)) return look_at_difference<Terms<Lanes<double>>>(shape, row, begin, end);
  }
  Workspace<Real> work;
  row.state = no_columns<double>();  // a shard may have none
  const int bytes_s = int(shape.student_stride * size_of(shape.student));
  const int bytes_t = int(shape.teacher_stride * size_of(shape.teacher));
  for_blocks(begin, end, [&](int64_t at, int64_t n) {
    Block<Real> block = read_block(shape, row, at, n, work);
    auto look_at = [&](auto teacher) {
      find_maxima<T, teacher.value>(block, Real(row.k));
      return look_at_block<T, teacher.value>(block, Real(row.k), bytes_s, bytes_t);
    };
    RowState<double> state;
    if constexpr (T::kTopk) {
      state = block.teacher ? look_at(Constant<true>()) : look_at(Constant<false>());
    } else {
      state = look_at(Constant<true>());
    }
    if (BlockPowers<Real>* powers = powers_at<Real>(row, at)) {
      powers->maxima[0] = block.max_s;
      powers->maxima[1] = block.max_t;
    }
    if (shape.labels) look_for_labels(block, row.k, of_one_maximum<T>(block), shape.smoothing != 0, state);
    at == begin ? void(row.state = state) : merge<Terms<Lanes<double>>>(row.state, state, row.k);
  });
}

// Adds a block's share of the loss and of mean_u, which take the moments' places. From kept powers, whose place u then
// takes; else from the logits, with one power for the larger probability and one for the ratio to it: without a
// gradient, keeping would cost more than calculating.
template <class T, bool kKept, class Real>
void look_again_at_block(const Block<Real>& block, const Settings<Vector<Real>>& with, DivergenceRow& row) {
  using V = Vector<Real>;
  const Normalised<T, Real> to(row, block);
  const Real log_s = Real(-::log2(row.state.sum_s)), log_t = Real(-::log2(row.state.sum_t));
  V loss[2]{}, mean_u[2]{};
  for_vectors<Real>(block.n, [&](int64_t i, int count, int which) __attribute__((always_inline)) {
    const V d = to.log_ratio(block, i, count);
    V p_s, p_t;
    if constexpr (kKept) {
      p_s = to.n_s * load(block.es + i);
      p_t = to.n_t * load(block.et + i);
    } else {
      const V l_s = to.k * (load(block.s + i, count) - block.max_s) + log_s;
      const V l_t = to.k * (load(block.t + i, count) - block.max_t) + log_t;
      const V larger = exp2(maximum(l_s, l_t)), smaller = larger * exp2(d > V{} ? -d : d);
      p_s = d > V{} ? larger : smaller;
      p_t = d > V{} ? smaller : larger;
    }
    const V u = T::u(p_s, p_t, d, with);
    loss[which] += T::value(p_s, p_t, d, with);
    mean_u[which] += u;
    if constexpr (kKept) store(block.et + i, u);
  });
  row.state.moment_t += sum(loss[0] + loss[1]);
  row.state.moment_s += sum(mean_u[0] + mean_u[1]);
}

template <template <class> class Terms, class Real>
void look_again(const DivergenceShape& shape, DivergenceRow& row, int64_t begin, int64_t end) {
  using T = Terms<Lanes<Real>>;
  if constexpr (T::kSecondLook) {
    Workspace<Real> work;
    const Settings<Vector<Real>> with = settings_of<Real>(shape);
    row.state.moment_t = row.state.moment_s = 0;
    for_blocks(begin, end, [&](int64_t at, int64_t n) {
      const Block<Real> block = read_block(shape, row, at, n, work);
      row.powers ? look_again_at_block<T, true>(block, with, row) : look_again_at_block<T, false>(block, with, row);
    });
  }
}

template <template <class> class Terms>
void finish(const DivergenceShape& shape, DivergenceRow& row) {
  row.loss = Terms<Lanes<double>>::loss(row.state, row.k, shape.settings);
  if (shape.labels) row.log_sum_one = ::log(row.state.sum_one);
}

template <class T, class Real>
void gradient_of_block(const DivergenceRow& row, const Block<Real>& block, const Settings<Vector<Real>>& with,
                       double mean_u, Real* g) {
  using V = Vector<Real>;
  const Real factor = Real(row.factor);
  if constexpr (T::kDifference) {
    const Real k = Real(row.k);
    for_vectors<Real>(block.n, [&](int64_t i, int count, int) __attribute__((always_inline)) {
      const V z_s = load(block.s + i, count), z_t = load(block.t + i, count);
      store(g + i, factor * T::u(V{}, V{}, z_s == z_t ? V{} : k * (z_s - z_t), with), count);
    });
    return;
  }
  const Normalised<T, Real> to(row, block);
  // u is made of the probabilities like a sum: what scales them scales it.
  const Real n_s = factor * to.n_s, n_t = factor * to.n_t, mean_term = n_s * Real(mean_u);
  const V rest = T::kRest ? with.rest * Real(row.factor * moved((block.max_t - row.state.max_t) * row.k)) : V{};
  const bool have_u = T::kSecondLook && row.powers;
  for_vectors<Real>(block.n, [&](int64_t i, int count, int) __attribute__((always_inline)) {
    const V es = load(block.es + i), et = load(block.et + i);
    if (have_u) return store(g + i, factor * et - mean_term * es, count);
    const V d = T::kLogRatio ? to.log_ratio(block, i, count) : V{};
    const V all = T::u(n_s * es, n_t * et, d, with) - mean_term * es;
    store(g + i, T::kRest ? (et == V{} ? rest * es : all) : all, count);
  });
}

template <template <class> class Terms, class Real>
void gradient(const DivergenceShape& shape, const DivergenceRow& row, int64_t begin, int64_t end) {
  using T = Terms<Lanes<Real>>;
  Workspace<Real> work;
  const Settings<Vector<Real>> with = settings_of<Terms, Real>(shape, row);
  const double mean_u = Terms<Lanes<double>>::mean_u(row.state, row.k, shape.settings);
  const bool need_powers = !T::kDifference && !row.powers;
  const bool need_logits = need_powers || T::kDifference || (T::kLogRatio && !T::kSecondLook) || shape.labels;
  // Backwards: what the looks have left in L2 is the end.
  for (int64_t at = begin + (end - begin - 1) / kBlock * kBlock; at >= begin; at -= kBlock) {
    const int64_t n = end - at < kBlock ? end - at : kBlock;
    Block<Real> block = read_block(shape, row, at, need_logits ? n : 0, work);
    block.n = n;
    if (need_powers) make_powers<T>(block, Real(row.k));
    // A gradient in the place of the logits must wait until the label has seen them.
    const bool apart = shape.labels && row.gradient == row.student;
    Real* g = apart ? work.g : gradient_place(shape.gradient, row.gradient, at, work.g);
    gradient_of_block<T>(row, block, with, mean_u, g);
    if (shape.labels) add_label_gradient(shape, row, block, of_one_maximum<T>(block), at, g);
    write(shape.gradient, g, n, row.gradient, at);
  }
}

// Top-k columns are not in lanes.
template <template <class> class Terms>
constexpr auto narrow_of() -> void (*)(const DivergenceShape&, DivergenceRow*, int64_t, Known) {
  if constexpr (Terms<Lanes<float>>::kTopk) {
    return nullptr;
  } else {
    return [](const DivergenceShape& shape, DivergenceRow* rows, int64_t count, Known known) {
      (shape.student == Element::f64 ? narrow<Terms, double> : narrow<Terms, float>)(shape, rows, count, known);
    };
  }
}

template <template <class> class Terms>
constexpr DivergenceKernels kernels_of() {
  return {
      Terms<Lanes<float>>::kSecondLook,
      Terms<Lanes<float>>::kDifference,
      [](const DivergenceShape& shape, DivergenceRow& row, int64_t begin, int64_t end) {
        (shape.student == Element::f64 ? look<Terms, double> : look<Terms, float>)(shape, row, begin, end);
      },
      [](const DivergenceShape& shape, DivergenceRow& row, int64_t begin, int64_t end) {
        (shape.student == Element::f64 ? look_again<Terms, double> : look_again<Terms, float>)(shape, row, begin, end);
      },
      [](DivergenceRow& into, const DivergenceRow& other) {
        merge<Terms<Lanes<double>>>(into.state, other.state, into.k);
      },
      finish<Terms>,
      [](const DivergenceShape& shape, const DivergenceRow& row, int64_t begin, int64_t end) {
        (shape.student == Element::f64 ? gradient<Terms, double> : gradient<Terms, float>)(shape, row, begin, end);
      },
      narrow_of<Terms>(),
  };
}

}  // namespace

#define KDFAST_KERNELS(name, Terms) kernels_of<Terms>(),
extern const DivergenceKernels kDivergences[] = {KDFAST_DIVERGENCES(KDFAST_KERNELS)};
#undef KDFAST_KERNELS

}  // namespace kdfast::KDFAST_VARIANT

// Products of two dense matrices on the CPU: one source, compiled once per processor variant.
//
// A panel of B, some columns of a part of the inner dimension, is packed to stay in the second-level cache, while rows
// of A pass by, some at a time: where they lie, where a word is what is there, or packed too. Whatever the matrix is a
// part of, numbers next to it are never read. A number's sum has the same order whatever the threads and the other
// columns.
#include "cpu/matmul_rows.h"

#include "cpu/block_pack.h"
#include "cpu/blocks.h"
#include "cpu/matmul_amx.h"

namespace kdfast::KDFAST_VARIANT {
namespace {

constexpr int64_t kCached = 640 << 10;  // bytes of a packed panel
constexpr int64_t kMostWords = 768;     // of a panel's inner dimension
constexpr int64_t kLeastWords = 256;    // of a panel that has all columns
// Columns of a panel: of more, the rows' sums would not stay beside it. AMX has larger caches.
template <class P>
constexpr int64_t kMostColumns = P::kAmx ? 640 : 512;
// Words that are summed before they join the rest: roundings stay small. Sums of pairs of short numbers need no care;
// so much of AMX's tiles stays in the first-level cache, where they are read again.
template <class P>
constexpr int64_t kDepth = P::kAmx            ? 128
                           : P::kNumbers == 1 ? 256
                                              : kMostWords;
template <class P>
constexpr int64_t kRows = P::kAmx ? 64 : 48;  // of A that pass by at a time: whole tiles of any shape
template <class P>
constexpr int64_t kSumRows = 5 * kRows<P>;  // whose sums wait for the next part of the inner dimension
constexpr int64_t kSlabRows = 480;          // the same, where C itself has the sums

// ---- packing ----
// The word of a number and, of pairs, its neighbour in the inner dimension, if there is one.
template <class P>
KDFAST_LOCAL typename P::Word word_of(const typename P::Number* at, [[maybe_unused]] const typename P::Number* next) {
  if constexpr (P::kNumbers == 1) {
    return widened(*at);
  } else {
    const uint32_t bits = at->bits | (next ? uint32_t(next->bits) << 16 : 0);
    typename P::Word word;
    memcpy(&word, &bits, sizeof word);
    return word;
  }
}

// Words of so many numbers of the inner dimension: whole tiles of AMX.
template <class P>
int64_t words_of(int64_t depth) {
  const int64_t words = (depth + P::kNumbers - 1) / P::kNumbers;
  return P::kAmx ? rounded_up(words, 16) : words;
}

// `width` numbers along `step` and `depth` along `inner` to [words, all_width], zeros beyond what is there.
template <class P>
void pack(const typename P::Number* from, int64_t step, int64_t inner, int64_t width, int64_t depth,
          typename P::Word* to, int64_t all_width) {
  const int64_t words = (depth + P::kNumbers - 1) / P::kNumbers, all_words = words_of<P>(depth);
  const Steps steps = steps_of<P>(all_width, all_words);
  int64_t p_done = 0, q_done = 0;  // so many of the first words of so many numbers
  if (step == 1) {
    p_done = width / 16 * 16, q_done = words;
    pack_rows<P>(from, inner, depth, p_done, to, steps);
  } else if (inner == 1) {
    p_done = width / 16 * 16, q_done = depth / P::kNumbers / 16 * 16;
    pack_turned<P>(from, step, p_done, q_done, to, steps);
  }
  for (int64_t q = 0; q < all_words; ++q) {
    const typename P::Number* at = from + q * P::kNumbers * inner;
    const bool whole = (q + 1) * P::kNumbers <= depth;
    for (int64_t p = q < q_done ? p_done : 0; p < all_width; ++p) {
      const bool there = q < words && p < width;
      to[q * steps.row + p / 16 * steps.group + p % 16] =
          there ? word_of<P>(at + p * step, whole ? at + p * step + inner : nullptr) : 0;
    }
  }
}

// ---- a product ----
// How a product's columns and inner dimension are cut.
struct Cut {
  int64_t depth, columns;  // of a panel: numbers of the inner dimension; columns, in steps of kBlockStep
  bool several;            // panels of the inner dimension
};
template <class P>
Cut cut_of(const Product& p) {
  constexpr int64_t size = sizeof(typename P::Word), widest = kMostColumns<P>;
  constexpr int64_t step = P::kAmx ? kDepth<P> : 16;  // where sums join others does not depend on the columns
  const int64_t words = words_of<P>(p.inner);
  int64_t most = kMostWords;
  if (P::kAmx && p.columns <= widest) {  // A, which is packed for every strip, once
    const int64_t fit = kCached / (rounded_up(p.columns, 64) * size) / step * step;
    most = fit < kLeastWords ? kLeastWords : fit < most ? fit : most;
  }
  const int64_t panels = (words + most - 1) / most;
  const int64_t deep = panels > 1 ? rounded_up((words + panels - 1) / panels, step) : words;
  const int64_t fit = kCached / ((deep ? deep : 1) * size) / 64 * 64;
  return {deep * P::kNumbers, fit < 64 ? 64 : fit > widest ? widest : fit, panels > 1};
}
template <class P>
bool through_sums(const Product& p, int64_t width) {
  return P::kAmx || (p.narrow && sizeof(typename P::Number) < sizeof(typename P::Sum)) || width % kBlockStep;
}

// Words of packed rows of A.
template <class A>
int64_t rows_room(const Cut& cut) {
  int64_t parts = 1;
  if constexpr (A::kAmx) parts = A::kParts;
  return parts * kRows<A> * words_of<A>(cut.depth);
}
// Packed rows of A, a panel of B, sums.
template <class A, class P>
int64_t room(const Product& p) {
  const Cut cut = cut_of<P>(p);
  const int64_t words = rows_room<A>(cut) + words_of<P>(cut.depth) * cut.columns;
  return (words + (cut.several ? kSumRows<P> : kRows<P>)*cut.columns) * int64_t(sizeof(typename P::Sum));
}

// Some columns of C: `width` of them, from panels of `to_row`; where their sums are, and from row to row of these.
template <class P>
struct Strip {
  int64_t from, width, to_row;
  typename P::Word *a, *panel;
  typename P::Sum* sums;
  int64_t sums_row;
  bool add;                     // to the sums
  const typename P::Sum* bias;  // that the sums begin with
};

// Rows m..m + some of A, at k..k + depth of the inner dimension, as they lie or in `to`. A packs A's numbers.
template <class A, class P>
Tile<P> rows_of(const Product& p, int64_t m, int64_t some, int64_t k, int64_t depth, typename P::Word* to) {
  constexpr int64_t size = sizeof(typename P::Word);
  const auto* a = (const typename A::Number*)p.a.data + m * p.a.row + k * p.a.column;
  Tile<P> t{};
  t.count = 1;
  if constexpr (A::kAmx) {
    static const int64_t parts[] = {0, 1};  // one after another, of the same panel of B
    const int64_t words = words_of<A>(depth);
    pack_tiles<A>(a, p.a.row, p.a.column, some, depth, to, kRows<A>, words);
    t.a = (const char*)to, t.a_row = words * size, t.a_word = size;
    t.index = parts, t.count = A::kParts, t.a_block = kRows<A> * t.a_row;
  } else if (!A::kReadsInPlace || p.a.column != 1 || depth % A::kNumbers) {
    pack<A>(a, p.a.row, p.a.column, some, depth, to, kRows<A>);
    t.a = (const char*)to, t.a_row = size, t.a_word = kRows<A> * size;
  } else {
    t.a = (const char*)a, t.a_row = p.a.row * int64_t(sizeof *a), t.a_word = size;
  }
  return t;
}

// Rows m..m + some of C, of the strip's panel at k..k + depth of the inner dimension.
template <class A, class P>
void multiply(const Product& p, const Strip<P>& s, int64_t m, int64_t some, int64_t k, int64_t depth) {
  Tile<P> t = rows_of<A, P>(p, m, some, k, depth, s.a);
  t.w = s.panel, t.w_step = steps_of<P>(s.to_row, words_of<P>(depth));
  t.c = s.sums, t.c_row = s.sums_row, t.add = s.add, t.bias = s.bias;
  const int64_t words = words_of<P>(depth);
  for (int64_t q = 0; q == 0 || q < words; q += kDepth<P>) {
    t.words = words - q < kDepth<P> ? words - q : kDepth<P>;
    products(t, some, s.to_row);
    t.add = true, t.bias = nullptr;
    t.a += kDepth<P> * t.a_word, t.w += kDepth<P> * t.w_step.row;
  }
}

// Sums, with a bias or what is there, to C.
template <class Sum, class E>
void finish(const Sum* from, int64_t from_row, int64_t rows, int64_t width, const E* bias, bool add, E* to,
            int64_t to_row) {
  constexpr int L = VectorOf<Sum>::count;
  auto some = [](const E* at, int count)
                  __attribute__((always_inline)) { return count == L ? load(at) : load_some(at, count, 0); };
  for (int64_t r = 0; r < rows; ++r, from += from_row, to += to_row) {
    for_vectors<Sum>(width, [&](int64_t i, int count, int) __attribute__((always_inline)) {
      auto v = load(from + i);
      if (bias) v += some(bias + i, count);
      if (add) v += some(to + i, count);
      count == L ? store(to + i, v) : store_some(to + i, v, count);
    });
  }
}

template <class A, class P>
void run_strip(const Product& p, const Cut& cut, Strip<P> s) {
  using Sum = typename P::Sum;
  using Number = typename P::Number;
  const bool through = through_sums<P>(p, s.width);
  const int64_t step = !cut.several ? p.rows : through ? kSumRows<P> : kSlabRows;
  Sum *sums = s.sums, *c = (Sum*)p.c + s.from;
  const auto* b = (const Number*)p.b.data + s.from * p.b.column;
  for (int64_t from = 0; from < p.rows; from += step) {
    const int64_t until = p.rows - from < step ? p.rows : from + step;
    for (int64_t k = 0; k == 0 || k < p.inner; k += cut.depth ? cut.depth : 1) {
      const int64_t depth = p.inner - k < cut.depth ? p.inner - k : cut.depth;
      const bool last = k + depth >= p.inner;
      pack<P>(b + k * p.b.row, p.b.column, p.b.row, s.width, depth, s.panel, s.to_row);
      for (int64_t m = from; m < until; m += kRows<P>) {
        const int64_t some = until - m < kRows<P> ? until - m : kRows<P>;
        s.sums = through ? sums + (cut.several ? (m - from) * s.to_row : 0) : c + m * p.c_row;
        s.sums_row = through ? s.to_row : p.c_row;
        s.add = k > 0 || (p.add && !through);
        s.bias = p.bias && k == 0 && !through ? (const Sum*)p.bias + s.from : nullptr;
        multiply<A>(p, s, m, some, k, depth);
        if (!through || !last) continue;
        const int64_t at = m * p.c_row + s.from;
        if (p.narrow) {
          const auto* bias = p.bias ? (const Number*)p.bias + s.from : nullptr;
          finish(s.sums, s.to_row, some, s.width, bias, p.add, (Number*)p.c + at, p.c_row);
        } else {
          const auto* bias = p.bias ? (const Sum*)p.bias + s.from : nullptr;
          finish(s.sums, s.to_row, some, s.width, bias, p.add, (Sum*)p.c + at, p.c_row);
        }
      }
    }
  }
}

template <class A, class P>
void run(const Product& p) {
  [[maybe_unused]] const Registers<P> registers;
  const Cut cut = cut_of<P>(p);
  Strip<P> s{};
  s.a = (typename P::Word*)p.room;
  s.panel = s.a + rows_room<A>(cut);
  s.sums = (typename P::Sum*)(s.panel + words_of<P>(cut.depth) * cut.columns);
  for (; s.from < p.columns; s.from += s.width) {
    const int64_t left = p.columns - s.from, whole = left / kBlockStep * kBlockStep;
    s.width = whole > cut.columns ? cut.columns : whole ? whole : left;
    s.to_row = rounded_up(s.width, kBlockStep);
    run_strip<A>(p, cut, s);
  }
}

template <class A, class P = A>
constexpr ProductKernels kKernelsOf = {room<A, P>, run<A, P>};
constexpr ProductKernels kFloats = kKernelsOf<Direct<float>>, kDoubles = kKernelsOf<Direct<double>>,
                         kHalves = kKernelsOf<Widened<Float16>>,
                         kWithHalves = kKernelsOf<Direct<float>, Widened<Float16>>,
                         kWithBFloat16s = kKernelsOf<Direct<float>, Widened<BFloat16>>;

}  // namespace

// By Operands. Of float32 with bfloat16, this is widened: for dot products A would have to be split in two, and two of
// them take as long as products of float32. Not so with AMX.
extern const ProductKernels kProducts[] = {kFloats,    kKernelsOf<Widened<BFloat16>>, kHalves, kDoubles, kWithBFloat16s,
                                           kWithHalves};
#if defined(__AVX512BF16__)
extern const ProductKernels kPairProducts[] = {kFloats,  kKernelsOf<Pairs>, kHalves,
                                               kDoubles, kWithBFloat16s,    kWithHalves};
extern const ProductKernels kAmxProducts[] = {kFloats,  kKernelsOf<Whole, AmxPairs>, kHalves,
                                              kDoubles, kKernelsOf<Split, AmxPairs>, kWithHalves};
#endif

}  // namespace kdfast::KDFAST_VARIANT

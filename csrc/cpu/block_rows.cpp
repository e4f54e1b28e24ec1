// Products with a matrix of which some blocks live, on the CPU: one source, compiled once per processor variant.
//
// A product keeps a cache's worth of W's blocks in packed form while rows of A pass by, some at a time, so that A's and
// the result's lines are touched once and in order. A gradient takes a panel of rows at a time: the side of which W's
// other blocks are reached is packed when a block is first needed, the other one block row's panel at a time; packed
// panels also keep rows that lie a multiple of 1 KB apart out of a few sets of the cache. What is packed is never
// written out to memory, which would cost more than the products. A number's sum has the same order whatever the
// threads.
#include "cpu/amx.h"
#include "cpu/block_pack.h"
#include "cpu/variant.h"

namespace kdfast::KDFAST_VARIANT {
namespace {

constexpr int64_t kCached = 640 << 10;  // bytes of packed blocks, or panels, that stay in the second-level cache
// Rows of A that pass by every cache of blocks in turn: of more, the last-level cache would lose the first ones.
constexpr int64_t kSlab = 512;

// ---- y and dx ----
template <class P>
bool packs(const Blocks& b) {
  return b.turned || !P::kInPlace;
}
// Bytes of a packed block.
template <class P>
int64_t bytes_of(const Blocks& b) {
  return b.width * b.depth / P::kNumbers * int64_t(sizeof(typename P::Word));
}
// Bytes of rows of A that are copied, widened or as whole tiles of AMX, and of sums that are narrowed.
template <class P>
int64_t rows_bytes(int64_t columns) {
  return !P::kReadsInPlace ? P::kChunk * columns * 4 : P::kAmx ? P::kChunk * columns * 2 : 0;
}
template <class P>
constexpr int64_t kSumsBytes = P::kInPlace ? 0 : P::kChunk * kLargestBlock * 4;

// Copied rows, sums, packed blocks.
template <class P>
int64_t product_room(const Blocks& b, int64_t a_columns, int64_t most) {
  const int64_t row = most * bytes_of<P>(b), packed = row > kCached ? row : kCached;
  return rows_bytes<P>(a_columns) + kSumsBytes<P> + (packs<P>(b) ? packed : 0);
}

// Rows m..m + some of A as they lie, or in the room.
template <class P>
Tile<P> rows_of(const BlockProduct& call, int64_t m, int64_t some) {
  using Number = typename P::Number;
  constexpr int64_t size = sizeof(Number);
  const auto* from = (const Number*)call.a + m * call.a_row;
  Tile<P> t{};
  t.a = (const char*)from, t.a_row = call.a_row * size;
  if constexpr (!P::kReadsInPlace) {
    auto* to = (float*)call.room;
    for (int64_t r = 0; r < some; ++r, from += call.a_row, to += call.a_columns) {
      pack_rows<P>(from, 0, 1, call.a_columns, to, Steps{call.a_columns, 16});
    }
    t.a = call.room, t.a_row = call.a_columns * 4;
  } else if (P::kAmx && some % 32) {
    t.a = call.room, t.a_row = call.a_columns * size;
    for (int64_t r = 0; r < some; ++r) memcpy(call.room + r * t.a_row, from + r * call.a_row, t.a_row);
    memset(call.room + some * t.a_row, 0, (rounded_up(some, 32) - some) * t.a_row);
  }
  return t;
}

// Block row i of rows m..m + some, of which `t` has A and the blocks.
template <class P>
void block_row(const BlockProduct& call, Tile<P> t, int64_t i, int64_t m, int64_t some) {
  using Number = typename P::Number;
  const int64_t width = call.blocks->width;
  const auto* bias = call.bias ? (const Number*)call.bias + i * width : nullptr;
  Number* c = (Number*)call.c + m * call.c_row + i * width;
  if constexpr (P::kInPlace) {
    t.c = c, t.c_row = call.c_row, t.bias = bias;
    products(t, some, width);
  } else {
    t.c = (float*)(call.room + rows_bytes<P>(call.a_columns)), t.c_row = width;
    for (int64_t r = 0; r < some; ++r) {
      for (int64_t p = 0; p < width; p += kBlockStep) __builtin_prefetch(c + r * call.c_row + p, 1, 3);
    }
    products(t, some, width);
    narrow_rows(t.c, width, some, width, bias, c, call.c_row);
  }
}

// Rows from..until of block rows first..last, whose packed blocks fit the cache.
template <class P>
void block_rows(const BlockProduct& call, int64_t first, int64_t last, int64_t from, int64_t until) {
  using Word = typename P::Word;
  const Blocks& b = *call.blocks;
  const int64_t numbers = b.width * b.depth, block = numbers / P::kNumbers, start = b.begin[first];
  const auto* values = (const typename P::Number*)call.values;
  auto* packed = (Word*)(call.room + rows_bytes<P>(call.a_columns) + kSumsBytes<P>);
  for (int64_t n = start; packs<P>(b) && n < b.begin[last]; ++n) {
    pack_block<P>(values + b.place[n] * numbers, b, packed + (n - start) * block);
  }
  for (int64_t m = from; m < until; m += P::kChunk) {
    const int64_t some = until - m < P::kChunk ? until - m : P::kChunk;
    Tile<P> t = rows_of<P>(call, m, some);
    t.words = b.depth / P::kNumbers, t.w_step = steps_of<P>(b.width, t.words), t.w_block = block;
    t.a_word = int64_t(sizeof(Word)), t.a_block = t.words * t.a_word;
    for (int64_t i = first; i < last; ++i) {
      const int64_t at = b.begin[i];
      t.index = b.index + at, t.count = b.begin[i + 1] - at;
      if (packs<P>(b)) {
        t.w = packed + (at - start) * block;
      } else {
        t.w = (const Word*)call.values, t.place = b.place + at;
      }
      block_row<P>(call, t, i, m, some);
    }
  }
}

template <class P>
void product(const BlockProduct& call) {
  [[maybe_unused]] const Registers<P> registers;
  const Blocks& b = *call.blocks;
  const int64_t fit = kCached / bytes_of<P>(b);
  for (int64_t from = 0; from < call.rows; from += kSlab) {
    const int64_t until = call.rows - from < kSlab ? call.rows : from + kSlab;
    for (int64_t first = call.first, end; first < call.last; first = end) {
      for (end = first + 1; end < call.last && b.begin[end + 1] - b.begin[first] <= fit;) ++end;
      block_rows<P>(call, first, end, from, until);
    }
  }
}

// ---- the gradient of W ----
// Words of so many rows: whole tiles of AMX.
template <class P>
int64_t words_of(int64_t rows) {
  const int64_t words = (rows + P::kNumbers - 1) / P::kNumbers;
  return P::kAmx ? rounded_up(words, 16) : words;
}
// Rows of a panel, by the numbers of the side that is kept packed.
template <class P>
int64_t panel_rows(int64_t numbers) {
  constexpr int64_t kKept = P::kAmx ? 1 << 20 : kCached;  // with AMX the second-level cache has 2 MB
  const int64_t fit = kKept * P::kNumbers / (numbers * int64_t(sizeof(typename P::Word))) / 64 * 64;
  return fit < 64 ? 64 : fit > P::kPanelRows ? P::kPanelRows : fit;
}

// Panels of the kept side, of the passing one, sums of a block, and which of the kept ones are packed.
template <class P>
int64_t gradient_room(const Blocks& b, int64_t inner_blocks) {
  const int64_t numbers = inner_blocks * b.depth;
  const int64_t panels = words_of<P>(panel_rows<P>(numbers)) * (numbers + b.width);
  return panels * int64_t(sizeof(typename P::Word)) + b.width * b.depth * int64_t(sizeof(typename P::Sum)) +
         inner_blocks;
}

// `some` rows of a block's width of dy or x: words of the rows' direction, [words, width], but [width, words] of dy for
// AMX, whose first factor has its inner dimension in a row.
template <class P>
void pack_panel(const void* from, int64_t from_row, int64_t some, int64_t width, [[maybe_unused]] bool of_dy,
                typename P::Word* to) {
  const auto* numbers = (const typename P::Number*)from;
#if defined(__AVX512BF16__)
  if constexpr (P::kAmx) {
    const int64_t words = words_of<P>(some);
    for (int64_t q = 0; of_dy && q < words; q += 16) {
      for (int64_t p = 0; p < width; p += 16) {
        Floats in[16];
        for (int64_t i = 0; i < 16; ++i) {
          const auto* even = numbers + 2 * (q + i) * from_row + p;
          const int64_t left = some - 2 * (q + i);
          in[i] = left > 0 ? paired(even, left > 1 ? even + from_row : nullptr) : Floats{};
        }
        store_turned(in, to + p * words + q, words);
      }
    }
    if (of_dy) return;
    const int64_t filled = (some + 1) / 2;
    for (int64_t p = 0; p < width; p += 16) memset(to + p * words + filled * 16, 0, (words - filled) * 64);
  }
#endif
  pack_rows<P>(numbers, from_row, some, width, to, steps_of<P>(width, words_of<P>(some)));
}

// Adds dy^T x of a panel to the sums of a block [r, c].
template <class P>
void add_block(const typename P::Word* dy, const typename P::Word* x, int64_t words, int64_t r, int64_t c, bool add,
               typename P::Sum* sums) {
  constexpr int64_t size = sizeof(typename P::Word);
  Tile<P> t{};
  t.a = (const char*)dy, t.a_row = P::kAmx ? words * size : size, t.a_word = P::kAmx ? size : r * size;
  t.w = x, t.w_step = steps_of<P>(c, words), t.words = words, t.count = 1;
  t.add = add, t.c = sums, t.c_row = c;
  products(t, r, c);
}

template <class P>
void gradient(const BlockGradient& call) {
  using Number = typename P::Number;
  using Word = typename P::Word;
  using Sum = typename P::Sum;
  [[maybe_unused]] const Registers<P> registers;
  const Blocks& b = *call.blocks;
  const int64_t r = b.turned ? b.width : b.depth, c = b.turned ? b.depth : b.width, inner = call.inner_blocks;
  const auto *kept = (const Number*)(b.turned ? call.x : call.dy),
             *passing = (const Number*)(b.turned ? call.dy : call.x);
  const int64_t kept_row = b.turned ? call.x_row : call.dy_row, passing_row = b.turned ? call.dy_row : call.x_row;
  const int64_t step = panel_rows<P>(inner * b.depth), most = words_of<P>(step);
  Word *panels = (Word*)call.room, *panel = panels + most * inner * b.depth;
  Sum* of_block = (Sum*)(panel + most * b.width);
  bool* is_packed = (bool*)(of_block + r * c);
  for (int64_t at = 0; at == 0 || at < call.rows; at += step) {
    const int64_t some = call.rows - at < step ? call.rows - at : step, words = words_of<P>(some);
    memset(is_packed, 0, inner);
    for (int64_t i = 0; i < b.rows; ++i) {
      const int64_t first = b.begin[i] > call.first ? b.begin[i] : call.first;
      const int64_t last = b.begin[i + 1] < call.last ? b.begin[i + 1] : call.last;
      if (first >= last) continue;
      pack_panel<P>(passing + at * passing_row + i * b.width, passing_row, some, b.width, b.turned, panel);
      for (int64_t n = first; n < last; ++n) {
        const int64_t k = b.index[n], block = b.place[n] * r * c;
        Word* other = panels + k * most * b.depth;
        if (!is_packed[k]) {
          pack_panel<P>(kept + at * kept_row + k * b.depth, kept_row, some, b.depth, !b.turned, other);
          is_packed[k] = true;
        }
        Sum* sums = P::kInPlace ? (Sum*)call.to + block : call.rows > step ? (Sum*)call.sums + block : of_block;
        add_block<P>(b.turned ? panel : other, b.turned ? other : panel, words, r, c, at > 0, sums);
        if constexpr (!P::kInPlace) {
          if (at + some >= call.rows) narrow_rows(sums, c, r, c, (const Number*)nullptr, (Number*)call.to + block, c);
        }
      }
    }
  }
}

template <class P>
constexpr BlockKernels kKernelsOf = {product_room<P>, product<P>, gradient_room<P>, gradient<P>};

}  // namespace

// By Element.
extern const BlockKernels kBlocks[] = {kKernelsOf<Direct<float>>, kKernelsOf<Widened<BFloat16>>,
                                       kKernelsOf<Widened<Float16>>, kKernelsOf<Direct<double>>};
#if defined(__AVX512BF16__)
extern const BlockKernels kPairBlocks[] = {kKernelsOf<Direct<float>>, kKernelsOf<Pairs>, kKernelsOf<Widened<Float16>>,
                                           kKernelsOf<Direct<double>>};
extern const BlockKernels kAmxBlocks[] = {kKernelsOf<Direct<float>>, kKernelsOf<AmxPairs>, kKernelsOf<Widened<Float16>>,
                                          kKernelsOf<Direct<double>>};
#endif

}  // namespace kdfast::KDFAST_VARIANT

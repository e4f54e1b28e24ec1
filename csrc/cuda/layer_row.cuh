// A row of a student's and a teacher's layer as a group of lanes sees it, 16 bytes at a time.
//
// Columns up to the first 16-byte boundary and after the last are taken one by one, and so are all where memory has no
// boundary that the student's, the teacher's and the gradient's rows share. The lanes keep as many vectors as registers
// hold: of a row that is no longer, every look but the first costs no memory.
#pragma once
#include "cuda/block.cuh"
#include "cuda/divider.h"
#include "cuda/layers.h"
#include "cuda/vector.cuh"

namespace kdfast::cuda {

// Where a row lies. A grid's rows are fewer than 2^31.
struct RowPlace {
  const LayerPair& pair;
  int64_t student_offset, teacher_offset, gradient_offset;
  uint32_t batch;
  float weight;
  bool counted;

  KDFAST_DEVICE RowPlace(const LayerArgs& args, uint32_t index) : RowPlace(args, index, args.by_rows(index)) {}

 private:
  KDFAST_DEVICE RowPlace(const LayerArgs& args, uint32_t index, uint32_t above)
      : RowPlace(args, index, above, args.by_heads(above)) {}
  // `above` counts the layers' heads of all sequences, `sequences` the layers' sequences.
  KDFAST_DEVICE RowPlace(const LayerArgs& args, uint32_t index, uint32_t above, uint32_t sequences)
      : pair(args.layer[args.by_batch(sequences)]) {
    const uint32_t layer = args.by_batch(sequences), heads = uint32_t(args.heads);
    const uint32_t row = index - above * uint32_t(args.rows), head = above - sequences * heads;
    batch = sequences - layer * uint32_t(args.batch);
    const int teacher_head = args.table.teacher[layer * heads + head];
    weight = args.table.weight[layer * heads + head];
    counted = teacher_head >= 0 && (!args.row_mask || args.row_mask[int64_t(batch) * args.rows + row]);
    auto offset = [&](const LayerMemory& m, int64_t h) { return batch * m.batch + h * m.head + row * m.row; };
    student_offset = offset(pair.student, head);
    teacher_offset = offset(pair.teacher, teacher_head < 0 ? 0 : teacher_head);
    gradient_offset = int64_t(index - layer * args.rows_of_layer) * args.columns;
  }
};

// ---- both sides of a row ----

// Of one type, and neighbouring columns.
template <class T>
struct OneType {
  static constexpr int kWidth = Vector<T>::count, kHeld = 4;
  struct Raw {
    uint4 s, t;
  };
  const T *student, *teacher;
  T* gradient;  // null: not wanted

  KDFAST_DEVICE OneType(const LayerArgs&, const RowPlace& at)
      : student((const T*)at.pair.student.data + at.student_offset),
        teacher((const T*)at.pair.teacher.data + at.teacher_offset),
        gradient(at.pair.gradient ? (T*)at.pair.gradient + at.gradient_offset : nullptr) {}

  // The columns before the first vector; all `columns` where there can be none.
  KDFAST_DEVICE int head(int columns) const {
    const int head = int((0 - uintptr_t(student) / sizeof(T)) & (kWidth - 1));
    auto misaligned = [&](const T* p) { return p && uintptr_t(p + head) % 16; };
    const bool none = misaligned(student) || misaligned(teacher) || misaligned(gradient);
    return none || head > columns ? columns : head;
  }
  KDFAST_DEVICE Raw load(int column) const { return {load16(student + column), load16(teacher + column)}; }
  KDFAST_DEVICE void widen(const Raw& raw, float* s, float* t) const {
    Vector<T>::widen(raw.s, s);
    Vector<T>::widen(raw.t, t);
  }
  KDFAST_DEVICE void store(int column, const float* x) const { store16(gradient + column, Vector<T>::narrow(x)); }
  KDFAST_DEVICE float student_at(int column) const { return Vector<T>::widen_one(student[column]); }
  KDFAST_DEVICE float teacher_at(int column) const { return Vector<T>::widen_one(teacher[column]); }
  KDFAST_DEVICE void store_one(int column, float x) const { gradient[column] = Vector<T>::narrow_one(x); }
};

// Of types and strides that only the launch knows.
struct AnyTypes {
  static constexpr int kWidth = 8, kHeld = 1;
  struct Raw {
    uint4 s[2], t[2];  // 16-bit elements take the first
  };
  const char *student, *teacher;
  char* gradient;
  Element student_type, teacher_type;
  int64_t student_step, teacher_step;

  KDFAST_DEVICE AnyTypes(const LayerArgs& args, const RowPlace& at)
      : student((const char*)at.pair.student.data + at.student_offset * size_of(args.student_type)),
        teacher((const char*)at.pair.teacher.data + at.teacher_offset * size_of(args.teacher_type)),
        gradient(at.pair.gradient ? (char*)at.pair.gradient + at.gradient_offset * size_of(args.student_type)
                                  : nullptr),
        student_type(args.student_type),
        teacher_type(args.teacher_type),
        student_step(at.pair.student.column),
        teacher_step(at.pair.teacher.column) {}

  KDFAST_DEVICE int head(int columns) const {
    if (student_step != 1 || teacher_step != 1) return columns;
    // Vectors of 16-bit elements have the fewer boundaries.
    const bool narrow = size_of(student_type) == 2;
    const int head = int((0 - uintptr_t(narrow ? student : teacher) / 2) & (kWidth - 1));
    auto misaligned = [&](const char* p, Element type) { return p && uintptr_t(p + head * size_of(type)) % 16; };
    const bool none =
        misaligned(student, student_type) || misaligned(teacher, teacher_type) || misaligned(gradient, student_type);
    return none || head > columns ? columns : head;
  }
  KDFAST_DEVICE Raw load(int column) const {
    Raw raw;
    load_eight(student_type, student, column, raw.s);
    load_eight(teacher_type, teacher, column, raw.t);
    return raw;
  }
  KDFAST_DEVICE void widen(const Raw& raw, float* s, float* t) const {
    widen_eight(student_type, raw.s, s);
    widen_eight(teacher_type, raw.t, t);
  }
  KDFAST_DEVICE void store(int column, const float* x) const {
    store_vector<float>(student_type, gradient, column, x);
    store_vector<float>(student_type, gradient, column + 4, x + 4);
  }
  KDFAST_DEVICE float student_at(int column) const { return load_any(student_type, student, column * student_step); }
  KDFAST_DEVICE float teacher_at(int column) const { return load_any(teacher_type, teacher, column * teacher_step); }
  KDFAST_DEVICE void store_one(int column, float x) const { store_any(student_type, gradient, column, x); }
};

// ---- what a group of lanes has of it ----
// `kMasked`: columns that do not count are `hidden` on both sides.
template <class Sides, bool kMasked>
struct LayerRow {
  static constexpr int kWidth = Sides::kWidth, kHeld = Sides::kHeld;
  using Raw = typename Sides::Raw;
  Sides sides;
  const bool* mask;
  float hidden;
  int lane, lanes, head, vectors, edges;
  int held = -1;  // the first of the vectors that the lanes have
  Raw raw[kHeld];

  // Of a row that does not count nothing is seen.
  KDFAST_DEVICE LayerRow(const LayerArgs& args, const RowPlace& at, bool counted, int lane, float hidden)
      : sides(args, at), mask(nullptr), hidden(hidden), lane(lane), lanes(1 << args.log_lanes) {
    const int columns = counted ? int(args.columns) : 0;
    if constexpr (kMasked) mask = args.column_mask ? args.column_mask + int64_t(at.batch) * args.columns : nullptr;
    head = sides.head(columns);
    vectors = (columns - head) / kWidth;
    edges = columns - vectors * kWidth;
    load(0);
  }

  // f(student's, teacher's logit) of every column of this lane; what it returns is the gradient, if it is written.
  template <bool kWrite, class F>
  KDFAST_DEVICE void look(F f) {
#pragma unroll 1
    for (int first = 0; first < vectors; first += kHeld * lanes) {
      if (first != held) load(first);
#pragma unroll
      for (int u = 0; u < kHeld; ++u) {
        const int vector = first + u * lanes + lane, column = head + vector * kWidth;
        if (vector >= vectors) continue;
        float s[kWidth], t[kWidth], x[kWidth];
        sides.widen(raw[u], s, t);
        if (kMasked && mask) hide(column, s, t);
#pragma unroll
        for (int e = 0; e < kWidth; ++e) x[e] = f(s[e], t[e]);
        if constexpr (kWrite) sides.store(column, x);
      }
    }
#pragma unroll 1
    for (int e = lane; e < edges; e += lanes) {
      const int column = e < head ? e : e + vectors * kWidth;
      const bool seen = !kMasked || !mask || mask[column];
      const float x = f(seen ? sides.student_at(column) : hidden, seen ? sides.teacher_at(column) : hidden);
      if constexpr (kWrite) sides.store_one(column, x);
    }
  }

 private:
  KDFAST_DEVICE void load(int first) {
#pragma unroll
    for (int u = 0; u < kHeld; ++u) {
      const int vector = first + u * lanes + lane;
      if (vector < vectors) raw[u] = sides.load(head + vector * kWidth);
    }
    held = first;
  }
  KDFAST_DEVICE void hide(int column, float* s, float* t) const {
    uint32_t words[kWidth / 4];
    if (uintptr_t(mask + column) % 4 == 0) {
#pragma unroll
      for (int w = 0; w < kWidth / 4; ++w) words[w] = ((const uint32_t*)(mask + column))[w];
    } else {
#pragma unroll
      for (int w = 0; w < kWidth / 4; ++w) {
        const auto* bytes = (const unsigned char*)mask + column + 4 * w;
        words[w] = uint32_t(bytes[0]) | bytes[1] << 8 | bytes[2] << 16 | uint32_t(bytes[3]) << 24;
      }
    }
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      const bool seen = words[e / 4] & 0xffu << e % 4 * 8;
      s[e] = seen ? s[e] : hidden;
      t[e] = seen ? t[e] : hidden;
    }
  }
};

}  // namespace kdfast::cuda
